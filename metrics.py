"""metrics.jsonl and completions.jsonl of a run: a line at a time, and the curves that are drawn of them."""

import gc
import json
import math
import os
from pathlib import Path

import torch

from files import replacing, write_text, writing_run

# ---- a line at a time ----


def append_jsonl(path: Path, record: dict) -> None:
    """Add one JSON line to a file of a run folder, as a whole or not at all. Raises InputError."""
    with writing_run(path, path.parent):
        size = path.stat().st_size if path.exists() else 0
        try:
            # A path that is not UTF-8 holds halves of surrogate pairs: their escapes are JSON's own.
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError:
            os.truncate(path, size)
            raise


def cut_jsonl(path: Path, step: int) -> None:
    """Drop the lines of later steps, and the part of a line that a killed process may have left at the end.

    Damaged lines are moved to path.damaged: they do not keep a run from going on.
    """
    if not path.exists():
        return
    lines = _complete_lines(path)
    records = [_parse_line(line) for line in lines]
    damaged = [line + b"\n" for line, record in zip(lines, records) if record is None]
    if damaged:
        aside = f"{path}.damaged"
        with open(aside, "ab") as file:
            file.writelines(damaged)
        print(f"{path}: {len(damaged)} of {len(lines)} lines are damaged; they are now in {aside}", flush=True)
    kept = [line.decode() + "\n" for line, record in zip(lines, records) if record and record["step"] <= step]
    write_text(path, "".join(kept))


def read_jsonl(path: Path) -> list[dict]:
    """The records of a file of a run folder, without damaged lines; none while there is no such file."""
    return [record for record in map(_parse_line, _complete_lines(path)) if record] if path.exists() else []


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _parse_line(line: bytes) -> dict | None:
    """The record of a step that append_jsonl has written as this line; None for anything else."""
    try:
        record = json.loads(line.decode())
        return record if type(record["step"]) is int and 0 < record["step"] < 2**53 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def log_completions(path: Path, step: int, questions, prompts, texts, rewards, advantages) -> None:
    """Add B questions with their G completions each, one line a question. rewards, advantages: [B, G]."""
    group_size = rewards.shape[1]
    for b, question in enumerate(questions):
        record = {
            "step": step,
            "id": question.id,
            "audio": question.audio,
            "prompt": prompts[b],
            "answer": question.answer,
            "completions": texts[b * group_size : (b + 1) * group_size],
            "rewards": rewards[b].tolist(),
            "advantages": [round(advantage, 4) for advantage in advantages[b].tolist()],
        }
        append_jsonl(path, record)


# ---- curves ----

CURVES = {
    "reward": "reward (accuracy + format)",
    "accuracy": "sampled training accuracy",
    "format": "share of well-formed completions",
    "kl": "KL to the reference (nats per token)",
    "entropy": "policy entropy (nats per token)",
    "completion_tokens": "completion length (tokens)",
    "loss": "loss",
    "grad_norm": "norm of the gradient before clipping",
}


def draw_curves(out: Path) -> None:
    """Draw metrics.jsonl as curves.png: each metric over steps, thin, with its running mean over it.

    What is no number is a gap: a picture is no reason to end a run.
    """
    from matplotlib.figure import Figure  # here, because it takes a second that most commands need not wait

    metrics = read_jsonl(out / "metrics.jsonl")
    steps = [m["step"] for m in metrics]
    shown = [name for name in CURVES if any(name in m for m in metrics)]  # supervised training has no rewards
    if not shown:
        return
    columns = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(4 * columns, 6), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, squeeze=False)
    for axis, name in zip(axes.flat, shown):
        values = torch.tensor([_number(m.get(name)) for m in metrics])
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        window = max(1, min(25, len(values) // 4))
        smooth = values.unfold(0, window, 1).mean(-1)
        axis.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.8)
        axis.set_title(CURVES[name], fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    with replacing(out / "curves.png") as unfinished:
        figure.savefig(unfinished, dpi=90, format="png")
    del figure, axes, axis
    gc.collect()  # a figure is full of reference cycles, some MB that would wait for long


def _number(value) -> float:
    """A metric that can be drawn; NaN for what cannot."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else math.nan
