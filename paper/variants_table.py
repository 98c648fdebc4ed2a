"""The table of reproduce.py --variants: results.json, table.md and table.png from the finished rows."""

import argparse
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import geometric_mean, mean, stdev

from evaluation.scores import is_right, read_predictions
from infra.errors import InputError
from infra.pictures import save_picture
from paper.rows import HELDOUT_EVERY, VARIANT_ROWS, Job
from paper.table import compare, table_lines, unfinished, verdicts, write_files
from paper.transfer_table import spread
from training.metrics import HELDOUT, read_jsonl

TARGET = 0.9  # held-out accuracy
PAPER = "paper"  # the row whose time is 1
# Each detail by itself: rows whose test accuracy is compared.
COMPARED = (
    ("beta_0", PAPER),
    ("dr_grpo", "beta_0"),
    ("dapo_loss", "beta_0"),
    ("dapo", "dapo_loss"),
    ("gspo_4", "beta_0"),
)
COLUMNS = {  # name -> title, digits
    "steps": (f"steps until {TARGET:.2f}", 0),
    "seconds": (f"seconds until {TARGET:.2f}", 0),
    "time": ("time against the paper's settings", 2),
    "seconds_per_step": ("seconds per step", 3),
    "accuracy": ("test accuracy", 1),
    "equal": ("equal-reward groups", 0),
}

# ---- numbers ----


def job_figures(job: Job) -> dict:
    """Return a finished job's values for the columns, its curve of held-out accuracy, and which test answers are right.

    A point of the curve is (step, seconds of training, accuracy between 0 and 1). steps and seconds are None if the
    curve never reaches TARGET. Raises InputError if the curve has no points.
    """
    path = job.run_folder / "metrics.jsonl"
    records = read_jsonl(path)
    ends = list(accumulate(record["seconds"] for record in records))
    curve = [(record["step"], end, record[HELDOUT]) for record, end in zip(records, ends) if HELDOUT in record]
    if not curve:
        raise InputError(f"{path}: no record has a {HELDOUT}; remove {job.folder} and start again")
    steps, seconds, _ = next((point for point in curve if point[2] >= TARGET), (None, None, None))
    late = records[len(records) * 2 // 3 :]
    found = {"steps": steps, "seconds": seconds, "seconds_per_step": ends[-1] / len(ends)}
    found |= {"equal": 100 * mean(record["equal_reward_groups"] for record in late)}
    found |= {"curve": [(step, round(end, 1), round(share, 4)) for step, end, share in curve]}
    questions, predictions = read_predictions(str(job.predictions))
    return found | {"rights": list(map(is_right, questions, predictions))}


def variants_results(finished: list[Job]) -> dict:
    """Summarize the finished jobs: each row's columns and curves, and the pairs of COMPARED.

    Accuracies and shares of the columns are in percent.
    """
    figures: dict[str, dict[int, dict]] = {row.name: {} for row in VARIANT_ROWS}
    for job in finished:
        figures[job.row.name][job.seed] = job_figures(job)
    rows = []
    for row in VARIANT_ROWS:
        own = figures[row.name]
        columns = _columns(own, figures[PAPER]) if own else {}
        curves = {seed: found["curve"] for seed, found in own.items()}
        about = {"row": row.name, "title": row.title, "flags": dict(row.flags)}
        rows.append(about | {"columns": columns, "curves": curves})
    rights = {(name, seed): found["rights"] for name, own in figures.items() for seed, found in own.items()}
    pairs = [compare(rights, a, b) for a, b in COMPARED]
    return {"rows": rows, "pairs": [pair for pair in pairs if pair["seeds"]]}


def _columns(own: dict[int, dict], paper: dict[int, dict]) -> dict[str, dict]:
    """Summarize a row's jobs. own, paper: seed -> job_figures, of the row and of the row PAPER."""

    def each(name: str) -> dict:
        return {seed: found[name] for seed, found in own.items()}

    both = {seed: (found["seconds"], paper[seed]["seconds"]) for seed, found in own.items() if seed in paper}
    ratios = {seed: None if None in pair else pair[0] / pair[1] for seed, pair in both.items()}
    return {
        "steps": summary(each("steps")),
        "seconds": summary(each("seconds")),
        "time": summary(ratios, geometric_mean),
        "seconds_per_step": {"mean": mean(each("seconds_per_step").values())},
        "accuracy": spread(each("rights"), "accuracy"),
        "equal": {"mean": mean(each("equal").values())},
    }


def summary(seeds: dict[int, float | None], average: Callable = mean) -> dict:
    """Summarize a value of each seed. If a seed has none, there is no mean: it would be one over the lucky seeds."""
    known = [value for value in seeds.values() if value is not None]
    if len(known) < len(seeds) or not seeds:
        return {"seeds": seeds, "mean": None, "deviation": None}
    return {"seeds": seeds, "mean": average(known), "deviation": stdev(known) if len(known) > 1 else None}


# ---- files ----


def write_variants(args: argparse.Namespace, finished: list[Job], picture: bool) -> str:
    """Write results.json and table.md into args.out and, if asked for, table.png. Return the table's text."""
    seeds = sorted({job.seed for job in finished})
    found = {"variants": True, "steps": args.steps, "target": TARGET, "seeds": seeds} | variants_results(finished)
    drawing = draw_variants if picture and finished else None
    return write_files(args, found, variants_markdown(args, finished, found), drawing)


def variants_markdown(args: argparse.Namespace, finished: list[Job], found: dict) -> str:
    """Format the table, with notes above and the comparisons of test accuracy below. found: from write_variants."""
    table = [["", "flags", *(title for title, _ in COLUMNS.values())]]
    for row in found["rows"]:
        if row["columns"] or row["row"] in args.rows:
            flags = " ".join(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
                             for name, value in row["flags"].items())  # fmt: skip
            cells = [_cell(row["columns"].get(name), digits) for name, (_, digits) in COLUMNS.items()]
            table.append([row["title"], flags, *cells])
    lines = [
        "# What each variant of GRPO buys",
        "",
        f"Toy: {args.steps} steps of 16 questions. Until {TARGET:.2f}: up to the first held-out score of at least "
        f"{TARGET:.2f}. The held-out questions are scored greedily every {HELDOUT_EVERY} steps. They are neither "
        "trained on nor part of the test. Seconds: of training, without held-out scores and saves.",
        "Test accuracy: of the last checkpoint, greedy, in percent, with the 95% interval from resampling seeds and "
        "questions. Equal-reward groups: in percent, before any is replaced, over the last third of the steps.",
    ]
    if len(found["seeds"]) > 1:
        lines.append(
            f"Mean ± standard deviation over {len(found['seeds'])} seeds, each with a base model of its own; for the "
            "ratio of times, the geometric mean. In round brackets: each seed. A seed that never reaches "
            f"{TARGET:.2f} is shown as -, and then there is no mean."
        )
    lines += [*unfinished(args, finished), "", *table_lines(table), ""]
    if found["pairs"]:
        lines += ["Test accuracy, compared:", "", *verdicts(found)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(figure: dict | None, digits: int) -> str:
    """Format a column's mean and deviation, with its interval or its seeds if there are any."""
    if not figure or not figure.get("seeds", True):
        return "-"
    seeds = ["-" if value is None else f"{value:.{digits}f}" for value in figure.get("seeds", {}).values()]
    text = f"{len(seeds) - seeds.count('-')} of {len(seeds)} seeds"
    if figure["mean"] is not None:
        text = f"{figure['mean']:.{digits}f}"
        text += f" ± {figure['deviation']:.{digits}f}" if figure.get("deviation") is not None else ""
    if "low" in figure:
        return f"{text} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
    return f"{text} ({', '.join(seeds)})" if len(seeds) > 1 else text


def draw_variants(path: Path, found: dict) -> None:
    """Draw a line for each row: held-out accuracy over seconds of training, both averaged over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for row in found["rows"]:
        if scored := list(zip(*row["curves"].values())):  # for each scored step, a point of each seed
            _, seconds, accuracy = zip(*([mean(values) for values in zip(*points)] for points in scored))
            axis.plot(seconds, accuracy, label=row["title"], linewidth=1.5)
    axis.axhline(TARGET, color="gray", linestyle=":", linewidth=1)
    axis.set_xlabel("seconds of training, without the held-out scores")
    axis.set_ylabel("accuracy on held-out questions, greedy")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    save_picture(figure, path, dpi=100)
