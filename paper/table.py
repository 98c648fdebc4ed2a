"""The paper's table: results.json, table.md and table.png from the predictions of the finished rows."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from data import Question
from evaluation import scores
from evaluation.report import TASKS, escape_markdown
from evaluation.versions import name_files
from infra.files import write_text
from infra.pictures import save_picture
from paper.rows import RATES, Job, chosen_rate, is_tuned, jobs, table_rows, validation_accuracy

# Accuracy on MMAU test-mini in percent (arXiv 2503.11197, table 2). Its SFT uses the template `direct`, ours `answer`.
# Its row of zero-shot chain of thought is left out, because its prompt is another one than our `think`.
PAPER = {
    "untouched_direct": {"sound": 54.95, "music": 50.98, "speech": 42.04, "average": 49.20},
    "sft_full": {"sound": 60.96, "music": 49.19, "speech": 45.35, "average": 51.80},
    "sft_lora": {"sound": 58.26, "music": 58.08, "speech": 52.58, "average": 56.40},
    "grpo_answer": {"sound": 69.37, "music": 66.77, "speech": 57.36, "average": 64.50},
    "grpo_think": {"sound": 66.67, "music": 62.87, "speech": 53.75, "average": 61.10},
}
COMPARED = (("grpo_answer", "sft_full"), ("grpo_answer", "sft_at_grpo_rate"))  # the paper claims that GRPO is better

# ---- numbers ----


def results(args: argparse.Namespace, finished: list[Job]) -> dict:
    """Score the finished jobs at their rows' chosen rates: for each row the figures of every seed, and their spread.

    Accuracies, intervals and deviations are in percent. `average` is the accuracy over all questions, as in MMAU.
    """
    rights, said, questions = {}, {}, []
    every = table_rows(args)
    finished = [job for job in finished if job.rate == chosen_rate(args, job.row)]
    for job in sorted(finished, key=lambda job: (every.index(job.row), job.seed)):
        questions, predictions = scores.read_predictions(str(job.predictions))
        rights[job.row.name, job.seed] = [
            scores.is_right(question, text) for question, text in zip(questions, predictions, strict=True)
        ]
        said[str(job)] = predictions
    tasks = {question.task for question in questions if question.task is not None}
    columns = [*scores.in_order(tasks | TASKS), "average"]
    rows = []
    for row in every:
        own_rights = {seed: own for (name, seed), own in rights.items() if name == row.name}
        seeds = {seed: _score(questions, own) for seed, own in own_rights.items()}
        spread = {}
        for column in columns:
            shares = [own[column]["accuracy"] for own in seeds.values() if column in own]
            if shares:
                spread[column] = {"mean": mean(shares), "min": min(shares), "max": max(shares)}
                spread[column]["deviation"] = stdev(shares) if len(shares) > 1 else None
        if seeds:
            low, high = scores.resampled_interval(list(own_rights.values()))
            spread["average"] |= {"low": 100 * low, "high": 100 * high}
        lr = Job(args, 0, row, chosen_rate(args, row)).lr if row.script else None
        paper = None if args.toy else PAPER.get(row.name)
        rows.append({"row": row.name, "title": row.title, "lr": lr, "seeds": seeds, "spread": spread, "paper": paper})
    pairs = [compare(rights, *pair) for pair in COMPARED]
    chance = 100 * scores.guessing(questions) if questions else None
    found = {"questions": len(questions), "guessing": chance, "columns": columns, "rows": rows}
    found |= {"pairs": [pair for pair in pairs if pair["seeds"]]}
    files = name_files({str(job): str(job.predictions) for job in finished})
    return found | {"exact_comparison": scores.exact_figures(questions, said), "question_file": files}


def compare(rights: dict[tuple[str, int], list[bool]], a: str, b: str) -> dict:
    """Compare two rows on the same questions, seed by seed: McNemar's exact test, and the mean difference in percent.

    rights: (row, seed) -> whether each question is right. The 95% interval is of resampled_interval.
    """
    seeds, differences = {}, []
    for seed in sorted({seed for _, seed in rights}):
        if (a, seed) in rights and (b, seed) in rights:
            only_a, only_b = scores.discordant(rights[a, seed], rights[b, seed])
            seeds[seed] = {"only_a": only_a, "only_b": only_b, "p": scores.mcnemar_exact(only_a, only_b)}
            differences.append([x - y for x, y in zip(rights[a, seed], rights[b, seed])])
    found: dict = {"a": a, "b": b, "seeds": seeds}
    if differences:
        low, high = scores.resampled_interval(differences)
        found |= {"difference": 100 * mean(map(mean, differences)), "low": 100 * low, "high": 100 * high}
    return found


def tuned(args: argparse.Namespace, finished: list[Job]) -> list[dict]:
    """List the accuracy on the validation questions, in percent, for each row and learning rate of seed 0."""
    found = []
    for job in finished:
        if job.seed == 0 and is_tuned(args, job.row):
            accuracy, chosen = 100 * validation_accuracy(job), job.rate == chosen_rate(args, job.row)
            found.append({"row": job.row.name, "rate": job.rate, "lr": job.lr, "accuracy": accuracy, "chosen": chosen})
    return found


def _score(questions: list[Question], rights: list[bool]) -> dict[str, dict]:
    """Compute accuracy in percent with its 95% Wilson interval, for each task with questions and for all questions."""
    total = scores.Score(sum(rights), len(rights))
    figures = {}
    for column, score in (scores.accuracy_by(questions, rights, "task") | {"average": total}).items():
        low, high = scores.wilson_interval(*score)
        figures[column] = {"accuracy": 100 * score.correct / score.total, "low": 100 * low, "high": 100 * high}
        figures[column] |= {"right": score.correct, "questions": score.total}
    return figures


# ---- files ----


def write_table(args: argparse.Namespace, finished: list[Job], picture: bool) -> str:
    """Write results.json and table.md into args.out and, if asked for, table.png. Return the table's text."""
    found = caption(args, finished) | results(args, finished) | {"rates": tuned(args, finished)}
    drawing = partial(draw, published=not args.toy) if picture and found["questions"] else None
    return write_files(args, found, markdown(args, finished, found), drawing)


def write_files(args: argparse.Namespace, found: dict, text: str, draw: Callable[[Path, dict], None] | None) -> str:
    """Write results.json and table.md into args.out and, if there is a `draw`, table.png. Return the table's text."""
    out = Path(args.out)
    write_text(out / "results.json", json.dumps(found, indent=2) + "\n")
    write_text(out / "table.md", text)
    if draw:
        draw(out / "table.png", found)
    return text


def caption(args: argparse.Namespace, finished: list[Job]) -> dict:
    """Collect the settings that results.json begins with."""
    about = {"model": "the toy's, 0.8 million weights" if args.toy else args.model, "steps": args.steps}
    about |= {"seeds": len({job.seed for job in finished}), "evaluated_on": args.mmau}
    return about | ({"label_noise": args.label_noise, "heldout_noise": args.heldout_noise} if args.toy else {})


def markdown(args: argparse.Namespace, finished: list[Job], found: dict) -> str:
    """Format the table as in the paper, with notes above and McNemar's tests below. found: caption and results."""
    columns, published = found["columns"], not args.toy
    known = ("sound", "music", "speech", "average") if published else ()
    table = [["", "rate", *map(escape_markdown, columns), *(f"paper: {column}" for column in known)]]
    for row in found["rows"]:
        cells = [_cell(row, column) for column in columns]
        table.append([row["title"], rate_text(row["lr"]), *cells, *(_published(row, column) for column in known)])
    if found["questions"]:
        table.append(["guessing", *[""] * len(columns), f"{found['guessing']:.2f}", *[""] * len(known)])

    noise = f"; label noise {args.label_noise:g}, held-out noise {args.heldout_noise:g}" if args.toy else ""
    lines = [
        "# GRPO against supervised fine-tuning",
        "",
        escape_markdown(f"Model: {found['model']}. {found['questions']} questions of {args.mmau}{noise}."),
        f"Every trained row: {args.steps} steps on the same questions in the same order, evaluated by its last "
        "checkpoint, greedily, with the template it was trained with.",
        "Accuracy in percent by MMAU's rule; average: over all questions. In brackets: 95% intervals.",
    ]
    if found["seeds"] > 1:
        lines[-1] += (
            f" Mean ± standard deviation over {found['seeds']} seeds; intervals from resampling seeds and questions."
        )
        lines[-1] += "" if args.toy else " The untouched model is the same for every seed."
    lines += unfinished(args, finished)
    if published:
        lines.append(
            "Paper: arXiv 2503.11197, MMAU test-mini from before v05.15.25, whose questions differ; empty if the paper "
            "has no such row. Its SFT uses the template `direct`."
        )
    lines += ["", *table_lines(table), "", *rates_lines(found["rates"]), *verdicts(found)]
    lines += [f"- {escape_markdown(line)}" for line in found["exact_comparison"] + found["question_file"]]
    return "\n".join(lines).rstrip() + "\n"


def unfinished(args: argparse.Namespace, finished: list[Job]) -> list[str]:
    """Name the missing rows of all seeds, also of seeds that only an earlier call asked for. Returns at most a line."""
    seeds = max([args.seeds, *(job.seed + 1 for job in finished)])
    missing = [str(job) for job in jobs(args, seeds) if job not in finished]
    return [f"Not finished: {', '.join(missing)}."] if missing else []


def rates_lines(rates: list[dict]) -> list[str]:
    """Format the accuracy of each row at each learning rate, with the chosen one in bold."""
    if not rates:
        return []
    cells: dict[str, dict[float, str]] = {}
    for own in rates:
        text = f"{own['accuracy']:.2f} ({rate_text(own['lr'])})"
        cells.setdefault(own["row"], {})[own["rate"]] = f"**{text}**" if own["chosen"] else text
    order = sorted(RATES)
    table = [["", *(f"x{rate:.2g}" for rate in order)]]
    table += [[row, *(own.get(rate, "-") for rate in order)] for row, own in cells.items()]
    about = "Accuracy with seed 0 on the validation questions, learning rate in brackets. Bold: the chosen rate."
    return [about, "", *table_lines(table), ""]


def verdicts(found: dict) -> list[str]:
    """Compare the rows of each pair: the mean difference, and McNemar's exact test for each seed."""
    titles, lines = {row["row"]: row["title"] for row in found["rows"]}, []
    for pair in found["pairs"]:
        a, b = titles[pair["a"]], titles[pair["b"]]
        lines.append(f"- {a} minus {b}: {pair['difference']:+.2f} points [{pair['low']:+.2f}, {pair['high']:+.2f}]")
        for seed, test in pair["seeds"].items():
            lines.append(f"  - seed {seed}: {scores.verdict(test['only_a'], test['only_b'], a, b)}")
    return lines


def rate_text(lr: float | None) -> str:
    """Format a learning rate, as in 3e-4. Rows without a training have none."""
    return "" if lr is None else f"{lr:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _cell(row: dict, column: str) -> str:
    """Format a row's figure in a column; "-" if the row has not run yet or the column has no questions."""
    spread = row["spread"].get(column)
    if spread is None:
        return "-"
    if len(row["seeds"]) > 1:
        interval = f" [{spread['low']:.2f}, {spread['high']:.2f}]" if "low" in spread else ""
        return f"{spread['mean']:.2f} ± {spread['deviation']:.2f}{interval}"
    (own,) = row["seeds"].values()
    return f"{own[column]['accuracy']:.2f} [{own[column]['low']:.2f}, {own[column]['high']:.2f}]"


def _published(row: dict, column: str) -> str:
    return f"{row['paper'][column]:.2f}" if row["paper"] else ""


def table_lines(table: list[list[str]]) -> list[str]:
    """Format a Markdown table whose source is aligned and easy to read, too."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = []
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]


def draw(path: Path, found: dict, published: bool) -> None:
    """Draw one bar per row: accuracy over all questions, with its interval or, for several seeds, a point per seed.

    published: whether the paper's figures are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(found["rows"]):
        seeds = [own["average"] for own in row["seeds"].values()]
        if not seeds:
            continue
        method = row["row"].split("_")[0]
        color = {"untouched": "tab:gray", "sft": "tab:orange", "grpo": "tab:blue"}[method]
        average = row["spread"]["average"]
        axis.barh(y, average["mean"], color=color, alpha=0.65)
        low, high = (seeds[0]["low"], seeds[0]["high"]) if len(seeds) == 1 else (average["min"], average["max"])
        axis.hlines(y, low, high, color="black", linewidth=1.2)
        if len(seeds) > 1:
            axis.plot([own["accuracy"] for own in seeds], [y] * len(seeds), "k.", markersize=5)
        axis.text(high + 1, y, f"{average['mean']:.1f}", va="center", fontsize=9)
        if row["paper"]:
            axis.plot(row["paper"]["average"], y, "D", color="tab:red", markersize=5)
    axis.axvline(found["guessing"], color="gray", linestyle=":", linewidth=1)
    axis.text(found["guessing"], -0.75, "guessing", color="gray", fontsize=8, ha="center")
    axis.set_yticks(range(len(found["rows"])), [row["title"] for row in found["rows"]])
    axis.set_ylim(len(found["rows"]) - 0.4, -0.95)
    axis.set_xlim(0, 108)
    shown = "lines: 95% intervals"
    if found["seeds"] > 1:
        shown = "lines: lowest to highest seed, or the 95% interval of a single one"
    shown += "; diamonds: the paper" if published else ""
    axis.set_xlabel(f"accuracy over all {found['questions']} questions (%); {shown}")
    axis.grid(axis="x", alpha=0.3)
    save_picture(figure, path, dpi=100)
