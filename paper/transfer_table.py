"""The table of reproduce.py --transfer: results.json, table.md and table.png from the finished rows."""

import argparse
import json
from itertools import compress
from operator import not_
from pathlib import Path
from statistics import mean, stdev

from data import Question
from evaluation import scores
from infra.pictures import save_picture
from paper.rows import TRANSFER_ROWS, Job
from paper.table import compare, rate_text, table_lines, unfinished, verdicts, write_files
from paper.transfer import NOISE, TRAINED

COLUMNS = {
    "trained": "sound (trained)",
    "others": "music and speech",
    "average": "average",
    "among_choices": "music and speech, among the choices",
    "clean": "average, clean clips",
    "kl": "KL to base",
}
# Fixed before the rows were run: the methods at equal rates and at the toy's own, the KL penalty, LoRA.
COMPARED = (
    ("grpo_1e-4", "sft_1e-4"),
    ("grpo_3e-4", "sft_3e-4"),
    ("grpo_1e-3", "sft_1e-3"),
    ("grpo_3e-4", "sft_1e-3"),
    ("grpo_beta_0", "grpo_3e-4"),
    ("grpo_lora", "sft_lora"),
)

# ---- numbers ----


def job_figures(job: Job) -> dict[str, list[float]]:
    """Return a finished job's values for each column: one value for each question that the column is about.

    Accuracies: 0 or 1. kl: nats per completion.
    """
    questions, predictions = scores.read_predictions(str(job.predictions))
    measured = json.loads(job.measured.read_text(encoding="utf-8"))
    clean = scores.read_predictions(str(job.clean))

    def right(questions: list[Question], predictions: list[str]) -> list[float]:
        return [float(scores.is_right(*pair)) for pair in zip(questions, predictions, strict=True)]

    average, among_choices = right(questions, predictions), right(questions, measured["among_choices"])
    others = [question.task != TRAINED for question in questions]
    return {
        "trained": list(compress(average, map(not_, others))),
        "others": list(compress(average, others)),
        "average": average,
        "among_choices": list(compress(among_choices, others)),
        "clean": right(*clean),
        "kl": measured["kl"],
    }


def transfer_results(finished: list[Job]) -> dict:
    """Summarize the finished jobs: each row's mean, deviation over seeds and 95% interval, and the pairs of COMPARED.

    Accuracies are in percent. The pairs are compared on the areas that are not trained.
    """
    figures = {(job.row.name, job.seed): job_figures(job) for job in finished}
    rows = []
    for row in TRANSFER_ROWS:
        own = {seed: values for (name, seed), values in figures.items() if name == row.name}
        columns = {column: spread({s: v[column] for s, v in own.items()}, column) for column in COLUMNS if own}
        title = ", ".join(filter(None, (row.title, rate_text(row.lr))))
        about = {"row": row.name, "title": title, "lr": row.lr, "beta": dict(row.flags).get("beta"), "lora": row.lora}
        rows.append(about | {"columns": columns})
    others = {key: [value == 1 for value in values["others"]] for key, values in figures.items()}
    pairs = [compare(others, a, b) for a, b in COMPARED]
    return {"rows": rows, "pairs": [pair for pair in pairs if pair["seeds"]]}


def spread(values: dict[int, list[float]], column: str) -> dict:
    """Summarize a column of a row. values: seed -> a value for each question. Accuracies become percent."""
    factor = 1 if column == "kl" else 100
    means = {seed: factor * mean(own) for seed, own in values.items()}
    low, high = scores.resampled_interval(list(values.values()))
    found: dict = {"seeds": means, "mean": mean(means.values()), "low": factor * low, "high": factor * high}
    return found | {"deviation": stdev(means.values()) if len(means) > 1 else None}


# ---- files ----


def write_transfer(args: argparse.Namespace, finished: list[Job], picture: bool) -> str:
    """Write results.json and table.md into args.out and, if asked for, table.png. Return the table's text."""
    seeds = sorted({job.seed for job in finished})
    found = {"transfer": True, "steps": args.steps, "seeds": seeds, "noise": NOISE} | transfer_results(finished)
    drawing = draw_transfer if picture and finished else None
    return write_files(args, found, transfer_markdown(args, finished, found), drawing)


def transfer_markdown(args: argparse.Namespace, finished: list[Job], found: dict) -> str:
    """Format the table, with notes above and the comparisons of pairs below. found: from write_transfer."""
    table = [["", *COLUMNS.values()]]
    for row in found["rows"]:
        if row["columns"] or row["row"] in args.rows:
            cells = [_cell(row["columns"].get(column), digits=2 if column == "kl" else 1) for column in COLUMNS]
            table.append([row["title"], *cells])
    lines = [
        "# Trained on sounds alone, tested on all areas",
        "",
        f"Toy: {args.steps} steps of 16 questions about sounds, in one wording, with {NOISE:g} times the noise. The "
        "test questions are about all areas, in two other wordings, with the same noise; clean clips: without it.",
        "Accuracy in percent, greedy. Among the choices: the choice that the model finds most likely. KL to base: nats "
        "per completion on test questions.",
    ]
    if len(found["seeds"]) > 1:
        lines.append(f"Mean ± standard deviation over {len(found['seeds'])} seeds, each with a base model of its own.")
    lines.append("In brackets: 95% intervals, from resampling seeds and questions.")
    lines += [*unfinished(args, finished), "", *table_lines(table), ""]
    if found["pairs"]:
        lines += ["Music and speech, compared:", "", *verdicts(found)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(figure: dict | None, digits: int) -> str:
    if figure is None:
        return "-"
    # + 0: no negative zero
    center, low, high = (f"{round(figure[name], digits) + 0:.{digits}f}" for name in ("mean", "low", "high"))
    deviation = "" if figure["deviation"] is None else f" ± {figure['deviation']:.{digits}f}"
    return f"{center}{deviation} [{low}, {high}]"


def draw_transfer(path: Path, found: dict) -> None:
    """Draw the trained area against the others: a point for each row and seed, an arrow from the seed's base model.

    Color: method; size of a circle: learning rate; other markers: no KL penalty, LoRA.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    rows = {row["row"]: row for row in found["rows"] if row["columns"]}
    points = {name: row["columns"]["trained"]["seeds"] for name, row in rows.items()}
    heights = {name: row["columns"]["others"]["seeds"] for name, row in rows.items()}
    for name, row in rows.items():
        color = {"untouched": "black", "sft": "tab:orange", "grpo": "tab:blue"}[name.split("_")[0]]
        marker = "D" if row["beta"] == 0 else "^" if row["lora"] else "o"
        size = {1e-4: 5, 3e-4: 8, 1e-3: 11}.get(row["lr"], 8)
        seeds = points[name]
        for seed in seeds.keys() & points.get("untouched", {}).keys() if name != "untouched" else ():
            start, end = ((points[at][seed], heights[at][seed]) for at in ("untouched", name))
            axis.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=color, alpha=0.3, shrinkB=4))
        axis.plot(seeds.values(), [heights[name][seed] for seed in seeds], marker, color=color, markersize=size,
                  markeredgecolor="white", linestyle="", label=row["title"])  # fmt: skip
    axis.set_xlabel("sound, the area of training: accuracy (%)")
    axis.set_ylabel("music and speech, the other areas: accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")
    save_picture(figure, path, dpi=85)
