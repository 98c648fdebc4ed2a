"""The paper's table: results.json, table.md and table.png from the predictions of its finished rows."""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from data import Question
from eval_report import TASKS, escape_markdown
from files import replacing, write_text
from reproduce_rows import ROWS, jobs, predictions_file
from reward import guessing
from scores import (
    Score,
    accuracy_by,
    discordant,
    in_order,
    is_right,
    mcnemar_exact,
    p_text,
    read_predictions,
    wilson_interval,
)

# MMAU test-mini, accuracy in percent (arXiv 2503.11197). Rows that are not here: the paper's figure is not known to us.
PAPER = {
    "untouched_direct": {"sound": 54.95, "music": 50.98, "speech": 42.04, "average": 49.20},
    "grpo_answer": {"sound": 69.37, "music": 66.77, "speech": 57.36, "average": 64.50},
}
COMPARED = ("grpo_answer", "sft_full")  # the paper's claim: the first is the better one

# ---- numbers ----


def results(args: argparse.Namespace, finished: list[tuple[int, str]]) -> dict:
    """What the finished rows, as (seed, row's name), score: for each row every seed's figures and their spread.

    Accuracies, intervals and deviations are in percent. `average` is the accuracy over all questions, as MMAU has it.
    """
    rights, questions = {}, []
    for row in ROWS:
        for seed in sorted(s for s, name in finished if name == row.name):
            questions, said = read_predictions(str(predictions_file(args, seed, row)))
            rights[row.name, seed] = [is_right(q, text) for q, text in zip(questions, said, strict=True)]
    columns = [*TASKS, *in_order({q.task for q in questions if q.task is not None} - set(TASKS)), "average"]
    rows = []
    for row in ROWS:
        seeds = {seed: _scores(questions, own) for (name, seed), own in rights.items() if name == row.name}
        spread = {}
        for column in columns:
            shares = [own[column]["accuracy"] for own in seeds.values() if column in own]
            if shares:
                spread[column] = {"mean": mean(shares), "min": min(shares), "max": max(shares)}
                spread[column]["deviation"] = stdev(shares) if len(shares) > 1 else None
        paper = None if args.toy else PAPER.get(row.name)
        rows.append({"row": row.name, "title": row.title, "seeds": seeds, "spread": spread, "paper": paper})
    tests = []
    for seed in sorted({seed for seed, _ in finished}):
        pair = [rights[name, seed] for name in COMPARED if (name, seed) in rights]
        if len(pair) == len(COMPARED):
            only_first, only_second = discordant(*pair)
            tests.append({"seed": seed, "a": COMPARED[0], "b": COMPARED[1], "only_a": only_first})
            tests[-1] |= {"only_b": only_second, "p": mcnemar_exact(only_first, only_second)}
    chance = 100 * guessing([q.choices for q in questions]) if questions else None
    return {"questions": len(questions), "guessing": chance, "columns": columns, "rows": rows, "mcnemar": tests}


def _scores(questions: list[Question], rights: list[bool]) -> dict[str, dict]:
    """Accuracy in percent with its 95% Wilson interval, for each task that has questions and in total."""
    found = accuracy_by(questions, rights, "task") | {"average": Score(sum(rights), len(rights))}
    scores = {}
    for column, score in found.items():
        low, high = wilson_interval(*score)
        scores[column] = {"accuracy": 100 * score.correct / score.total, "low": 100 * low, "high": 100 * high}
        scores[column] |= {"right": score.correct, "questions": score.total}
    return scores


# ---- for people ----


def write_report(args: argparse.Namespace, finished: list[tuple[int, str]], picture: bool) -> str:
    """Write results.json and table.md into args.out and, if asked for, table.png. Returns the table's text."""
    found, out = results(args, finished), Path(args.out)
    found = caption(args, finished) | found
    text = markdown(args, found)
    write_text(out / "results.json", json.dumps(found, indent=2) + "\n")
    write_text(out / "table.md", text)
    if picture and found["questions"]:
        draw(out / "table.png", args, found)
    return text


def caption(args: argparse.Namespace, finished: list[tuple[int, str]]) -> dict:
    """What the table is of."""
    about = {"model": "the toy's, 0.8 million weights" if args.toy else args.model, "steps": args.steps}
    about |= {"seeds": len({seed for seed, _ in finished}), "evaluated_on": args.mmau}
    return about | ({"label_noise": args.label_noise, "heldout_noise": args.heldout_noise} if args.toy else {})


def markdown(args: argparse.Namespace, found: dict) -> str:
    """The table in the paper's layout, and what to know about it."""
    columns, published = found["columns"], not args.toy
    seeds_of = {row["row"]: row["seeds"] for row in found["rows"]}
    last = max((seed for seeds in seeds_of.values() for seed in seeds), default=0)  # of an earlier call, it may be
    asked = argparse.Namespace(**vars(args) | {"seeds": max(args.seeds, last + 1)})
    missing = [f"{row.name} of seed {seed}" for seed, row in jobs(asked) if seed not in seeds_of[row.name]]
    known = ("sound", "music", "speech", "average") if published else ()
    table = [["", *map(escape_markdown, columns), *(f"paper: {column}" for column in known)]]
    for row in found["rows"]:
        cells = [_cell(row, column) for column in columns]
        table.append([row["title"], *cells, *(_published(row, column) for column in known)])
    if found["questions"]:
        table.append(["guessing", *[""] * (len(columns) - 1), f"{found['guessing']:.2f}", *[""] * len(known)])

    noise = f"; label noise {args.label_noise:g}, held-out noise {args.heldout_noise:g}" if args.toy else ""
    lines = [
        "# GRPO against supervised fine-tuning",
        "",
        escape_markdown(f"Model: {found['model']}. {found['questions']} questions of {args.mmau}{noise}."),
        f"Every trained row: {args.steps} steps on the same questions in the same order, evaluated by its last "
        "checkpoint, greedily, with the template it was trained with.",
        "Accuracy in percent by MMAU's rule; average: over all questions. In brackets: 95% Wilson intervals.",
    ]
    if found["seeds"] > 1:
        lines[-1] += f" Of {found['seeds']} seeds: mean ± standard deviation (lowest to highest)."
        lines[-1] += "" if args.toy else " The untouched model is the same for every seed."
    if missing:
        lines.append(f"Not finished: {', '.join(missing)}.")
    if published:
        lines.append("Paper: arXiv 2503.11197, MMAU test-mini; empty where its figure is not known to us.")
    lines += ["", *_lines(table), "", *verdict(found)]
    return "\n".join(lines).rstrip() + "\n"


def verdict(found: dict) -> list[str]:
    """Whether GRPO beats supervised fine-tuning, seed by seed."""
    lines = []
    titles = {row.name: row.title for row in ROWS}
    for test in found["mcnemar"]:
        first, second = titles[test["a"]], titles[test["b"]]
        better = first if test["only_a"] > test["only_b"] else second
        told = "no difference can be told" if test["p"] >= 0.05 else f"{better} is better"
        lines.append(
            f"- seed {test['seed']}: only {first} right: {test['only_a']}, only {second} right: {test['only_b']}; "
            f"McNemar's exact test: p = {p_text(test['p'])}, {told}"
        )
    return lines


def _cell(row: dict, column: str) -> str:
    """A row's figure in a column of the table; - where it has not run yet or there are no such questions."""
    spread = row["spread"].get(column)
    if spread is None:
        return "-"
    if len(row["seeds"]) > 1:
        return f"{spread['mean']:.2f} ± {spread['deviation']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
    (own,) = row["seeds"].values()
    return f"{own[column]['accuracy']:.2f} [{own[column]['low']:.2f}, {own[column]['high']:.2f}]"


def _published(row: dict, column: str) -> str:
    return f"{row['paper'][column]:.2f}" if row["paper"] else ""


def _lines(table: list[list[str]]) -> list[str]:
    """A Markdown table that can be read as it stands, too."""
    widths = [max(map(len, cells)) for cells in zip(*table)]
    rows = [
        "| " + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)) + " |"
        for pairs in (list(zip(cells, widths)) for cells in table)
    ]
    rule = "| " + " | ".join("-" * (width - 1) + (":" if i else "-") for i, width in enumerate(widths)) + " |"
    return [rows[0], rule, *rows[1:]]


def draw(path: Path, args: argparse.Namespace, found: dict) -> None:
    """A bar a row: accuracy over all questions, with its interval or, for several seeds, each of them as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(found["rows"]):
        seeds = [own["average"] for own in row["seeds"].values()]
        if not seeds:
            continue
        color = {"u": "tab:gray", "s": "tab:orange", "g": "tab:blue"}[row["row"][0]]
        average = row["spread"]["average"]
        axis.barh(place, average["mean"], color=color, alpha=0.65)
        low, high = (seeds[0]["low"], seeds[0]["high"]) if len(seeds) == 1 else (average["min"], average["max"])
        axis.hlines(place, low, high, color="black", linewidth=1.2)
        if len(seeds) > 1:
            axis.plot([own["accuracy"] for own in seeds], [place] * len(seeds), "k.", markersize=5)
        axis.text(high + 1, place, f"{average['mean']:.1f}", va="center", fontsize=9)
        if row["paper"]:
            axis.plot(row["paper"]["average"], place, "D", color="tab:red", markersize=5)
    axis.axvline(found["guessing"], color="gray", linestyle=":", linewidth=1)
    axis.text(found["guessing"], -0.75, "guessing", color="gray", fontsize=8, ha="center")
    axis.set_yticks(range(len(found["rows"])), [row["title"] for row in found["rows"]])
    axis.set_ylim(len(found["rows"]) - 0.4, -0.95)
    axis.set_xlim(0, 108)
    shown = "lines: 95% intervals"
    if found["seeds"] > 1:
        shown = "lines: lowest to highest seed, or the 95% interval of a single one"
    shown += "" if args.toy else "; diamonds: the paper"
    axis.set_xlabel(f"accuracy over all {found['questions']} questions (%); {shown}")
    axis.grid(axis="x", alpha=0.3)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")
