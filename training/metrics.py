"""Metrics of a step; metrics.jsonl and completions.jsonl, written one line at a time; curves.png."""

import gc
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data import build_prompt
from evaluation.scores import wilson_interval
from infra.files import write_text
from infra.pictures import save_picture
from reward import REWARDS
from training.groups import Groups, equal_rewards

# ---- a step ----


def summarize(sampled: list[Groups], trained: Groups, stop_ids: list[int], seconds: float) -> dict[str, float]:
    """Compute the metrics of a rank's completions. Run.record averages them over the ranks.

    sampled: the groups of each round of sampling; trained: the groups to train on, of replace_equal. stop_ids: those of
    sample_group. seconds: time of all rounds. Rewards and lengths are those of the first round, so that they describe
    the policy, not the choice of groups.
    """
    scores, rewards, mask = sampled[0].scores, sampled[0].rewards, sampled[0].mask

    def share(true: Tensor) -> float:
        return true.float().mean().item()

    ended = torch.isin(sampled[0].completions, torch.tensor(stop_ids, device=mask.device)).any(dim=1)  # [N]
    equal = equal_rewards(rewards)  # [B]
    tokens = sum(groups.mask.sum().item() for groups in sampled)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(dim=1).mean().item(),  # within groups: advantages are made of it
        **{name: score.mean().item() for name, score in scores.items()},
        "equal_reward_groups": share(equal),
        "replaced_groups": share(equal & ~equal_rewards(trained.rewards)),
        "sampling_rounds": float(len(sampled)),
        "completion_tokens": mask.sum(dim=1).float().mean().item(),
        "truncated_completions": share(~ended),
        "tokens_per_second": tokens / seconds * dist.get_world_size(),  # the mean is the sum over the ranks
    }
    if "accuracy" in scores:
        metrics["all_right_groups"] = share((scores["accuracy"] == 1).all(dim=1))
        metrics["all_wrong_groups"] = share((scores["accuracy"] == 0).all(dim=1))
    return metrics


# ---- one line at a time ----


def append_jsonl(path: Path, record: dict) -> None:
    """Add one JSON line to a file of a run folder, whole or not at all."""
    size = path.stat().st_size if path.exists() else 0
    try:
        # A path that is not UTF-8 holds halves of surrogate pairs; their escapes are JSON's own.
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError:
        os.truncate(path, size)
        raise


def cut_jsonl(path: Path, step: int) -> None:
    """Drop the lines of later steps, and an incomplete last line of a killed run.

    Damaged lines are moved to path.damaged, so that they do not stop the run from continuing.
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
        print(f"{path}: {len(damaged)} of {len(lines)} lines are damaged; moved to {aside}", flush=True)
    kept = [line.decode() + "\n" for line, record in zip(lines, records) if record and record["step"] <= step]
    write_text(path, "".join(kept))


def read_jsonl(path: Path) -> list[dict]:
    """Return the undamaged records of a file of a run folder; none if there is no such file."""
    return [record for record in map(_parse_line, _complete_lines(path)) if record] if path.exists() else []


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _parse_line(line: bytes) -> dict | None:
    """Return the record of a step that append_jsonl wrote as this line; None for anything else."""
    try:
        record = json.loads(line.decode())
        return record if type(record["step"]) is int and 0 < record["step"] < 2**53 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def log_completions(
    path: Path,
    step: int,
    template: str,
    groups: Groups,
    advantages: Tensor,
) -> list[dict]:
    """Add B questions with their G completions each to completions.jsonl, one line per question. Return the lines.

    advantages: [B, G].
    """
    group_size, records = groups.rewards.shape[1], []
    for b, question in enumerate(groups.questions):
        record = {
            "step": step,
            "id": question.id,
            "audio": question.audio,
            "prompt": build_prompt(question, template),
            "answer": question.answer,
            "completions": groups.texts[b * group_size : (b + 1) * group_size],
            "rewards": groups.rewards[b].tolist(),
        }
        record |= {name: score[b].tolist() for name, score in groups.scores.items()}
        record["advantages"] = [round(advantage, 4) for advantage in advantages[b].tolist()]
        append_jsonl(path, record)
        records.append(record)
    return records


# ---- curves ----

HELDOUT, SHARES = "heldout_accuracy", "shares"
TITLES = {
    HELDOUT: "held-out accuracy (greedy, 95% interval)",
    SHARES: "shares of groups and completions",
    "reward": "reward (weighted sum)",
    "accuracy": "sampled training accuracy",
    "format": "share of well-formed completions",
    "kl": "KL to the reference (nats per token)",
    "entropy": "policy entropy (nats per token)",
    "completion_tokens": "completion length (tokens)",
    "loss": "loss",
    "grad_norm": "norm of the gradient before clipping",
}
LINES = {SHARES: {"all_right_groups": "tab:green", "all_wrong_groups": "tab:red", "truncated_completions": "tab:gray"}}


def draw_curves(out: Path) -> None:
    """Draw metrics.jsonl as curves.png: each metric over the steps as a thin line, its running mean as a thick one.

    Non-numeric values become gaps: drawing never stops a run.
    """
    from matplotlib.figure import Figure  # imported here because it takes a second

    metrics = read_jsonl(out / "metrics.jsonl")
    steps = [m["step"] for m in metrics]
    names = dict.fromkeys(["reward", *REWARDS, *TITLES])  # in this order, each once
    shown = {}  # name of a panel -> its metrics with their colors
    for name in names:
        lines = LINES.get(name, {name: "tab:blue"})
        lines = {metric: color for metric, color in lines.items() if any(metric in m for m in metrics)}
        shown |= {name: lines} if lines else {}  # supervised fine-tuning has no rewards
    if not shown:
        return
    columns = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(4 * columns, 6), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, squeeze=False)
    for axis, (name, lines) in zip(axes.flat, shown.items()):
        axis.set_title(TITLES.get(name, f"{name} reward"), fontsize=10)
        axis.grid(alpha=0.3)
        if name == HELDOUT:
            _draw_heldout(axis, metrics)
            continue
        for metric, color in lines.items():
            values = torch.tensor([_number(m.get(metric)) for m in metrics])
            axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
            window = max(1, min(25, len(values) // 4))
            smooth = values.unfold(0, window, 1).mean(-1)
            axis.plot(steps[window - 1 :], smooth, color=color, linewidth=1.8, label=metric.replace("_", " "))
        if name in LINES:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    if len(shown) % 2:  # nothing is below the last panel of the first row
        axes[1, -1].set_axis_off()
        axes[0, -1].tick_params(labelbottom=True)
        axes[0, -1].set_xlabel("step")
    save_picture(figure, out / "curves.png", dpi=90)
    del figure, axes, axis
    gc.collect()  # a figure is full of reference cycles: some MB that would stay for long


def _draw_heldout(axis, metrics: list[dict]) -> None:
    """Draw the held-out accuracy of the steps that have one, with Wilson's interval as a band."""
    scored = [m for m in metrics if _number(m.get(HELDOUT)) >= 0 and _number(m.get("heldout_questions")) >= 1]
    steps, totals = [m["step"] for m in scored], [int(m["heldout_questions"]) for m in scored]
    shares = [min(1.0, m[HELDOUT]) for m in scored]
    ends = [wilson_interval(round(share * total), total) for share, total in zip(shares, totals)]
    axis.fill_between(steps, [low for low, _ in ends], [high for _, high in ends], alpha=0.2, linewidth=0)
    axis.plot(steps, shares, marker="o", markersize=3, color="tab:blue", linewidth=1.8)


def _number(value) -> float:
    """Return a metric as a number that can be drawn; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e30 else math.nan
