"""Estimate what the table will take: time from measured steps, disk from the shapes of the model."""

import argparse
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

from infra.errors import InputError
from infra.files import free_bytes
from model.checkpoints import pick_dtype
from model.lora import add_lora, base_of
from model.qwen2_audio import freeze_position_table
from paper.rows import LORA_RANK, RATES, Job, jobs, read_record
from training.disk import checkpoint_bytes, state_bytes
from training.metrics import read_jsonl
from training.settings import LORA_TARGETS

GB = 1e9
SMALL_FILES = 50_000_000  # bytes of a row's processor, metrics, curves, predictions and log
TOY_CLIPS = 500_000_000  # bytes

# ---- time ----


def time_text(args: argparse.Namespace, todo: list[Job]) -> str:
    """Tell how long the jobs will take, from the steps and evaluations measured in args.out."""
    seconds, unknown = 0.0, Counter()
    for job in todo:
        if job.row.script:
            each = step_seconds(job)
            if each is None:
                unknown[f"training by {job.row.script}"] += 1
            else:
                done = len(step_times(job)) if job.has_same_settings() else 0
                seconds += each * max(0, args.steps - done)
    remedy = "; give --seconds_per_step to estimate the trainings" if unknown else ""
    evaluations = evaluation_seconds(args.out)
    if evaluations:
        seconds += mean(evaluations) * len(todo)
    elif todo:
        unknown["evaluation"] = len(todo)
    parts = [f"about {duration(seconds)}"] if seconds or not unknown else []
    if unknown:
        listed = ", ".join(f"{number} x {kind}" for kind, number in unknown.items())
        parts.append(f"unknown until the first row of its kind has run: {listed}{remedy}")
    return "; ".join(parts)


def rates_text(args: argparse.Namespace) -> str:
    """Tell how much longer seed 0 takes if all RATES of its rows are trained, or that this is unknown."""
    trained = [job for job in jobs(args, seeds=1) if job.row.script and job.row.lr is None]
    each = [step_seconds(job) for job in trained]
    if None in each:
        return "unknown"
    return duration((len(RATES) - 1) * args.steps * sum(seconds for seconds in each if seconds is not None))


def step_times(job: Job) -> list[float]:
    """Read the seconds of each step that the job's training has recorded. Held-out scores are part of their step."""
    steps = read_jsonl(job.run_folder / "metrics.jsonl")
    timed = [step for step in steps if isinstance(step.get("seconds"), int | float)]
    return [step["seconds"] + step.get("seconds_heldout", 0) for step in timed]


def step_seconds(job: Job) -> float | None:
    """Average the step times of this job, or else of its row or its script. Falls back to --seconds_per_step."""
    every = jobs(job.args, all_rows=True)
    same_row = [time for other in every if other.row == job.row for time in step_times(other)]
    same_script = [time for other in every if other.row.script == job.row.script for time in step_times(other)]
    measured = step_times(job) or same_row or same_script
    return mean(measured) if measured else job.args.seconds_per_step


def evaluation_seconds(out: str) -> list[float]:
    """Read the seconds of each finished evaluation."""
    records = [read_record(path) for path in Path(out).glob("seed_*/*/row.json")]
    return [seconds for record in records if (seconds := record.get("evaluation_seconds")) is not None]


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


# ---- disk ----


class Size(NamedTuple):
    """Bytes of a training's two kinds of saves."""

    checkpoint: int
    state: int  # to resume from


def sizes(model: str) -> dict[bool, Size]:
    """Count the sizes of a training's saves: {False: full fine-tuning, True: LoRA}. model: a model or an adapter.

    Builds the model from its configuration on the meta device, without data.
    """
    dtype = pick_dtype("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # as the scripts do
    config = AutoConfig.from_pretrained(base_of(model), trust_remote_code=False)
    with torch.device("meta"):
        shapes: Any = Qwen2AudioForConditionalGeneration(config)
        shapes.to(dtype)
    freeze_position_table(shapes)  # load_policy freezes them, too

    full = Size(checkpoint_bytes(shapes), state_bytes(shapes))
    targets = LORA_TARGETS.split(",")
    add_lora(shapes, model, rank=LORA_RANK, alpha=1.0, dropout=0.0, targets=targets, freeze_audio_tower=False, seed=0)
    return {False: full, True: Size(checkpoint_bytes(shapes), state_bytes(shapes))}


def disk_bytes(args: argparse.Namespace, todo: list[Job]) -> int:
    """Compute the most that the jobs will add to the disk at any time.

    Each trained row keeps its last checkpoint. During a save, the previous checkpoint and the previous state are on
    the disk as well. What unfinished jobs with the same settings already hold is subtracted. A job that only has to be
    evaluated needs SMALL_FILES. So does every job of the toy, whose clips are counted once.
    """
    needed = SMALL_FILES * len(todo)
    untrained = [job for job in todo if job.row.script and not job.is_trained()]
    if args.toy or not untrained:
        return needed + TOY_CLIPS * bool(args.toy and todo)
    size = sizes(args.model)
    needed += sum(size[job.row.lora].checkpoint for job in untrained)
    needed += max(size[job.row.lora].checkpoint + 2 * size[job.row.lora].state for job in untrained)
    folders = [job.folder for job in untrained if job.has_same_settings()]
    held = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    return max(SMALL_FILES, needed - held)


def disk_text(out: str, needed: int) -> str:
    """Tell how many bytes are needed and how many are free."""
    return f"{needed / GB:.1f} GB at most, {free_bytes(Path(out)) / GB:.1f} GB are free"


def require_disk(out: str, needed: int) -> None:
    """Raise InputError if fewer than `needed` bytes are free."""
    free = free_bytes(Path(out))
    if free < needed:
        raise InputError(
            f"{out}: the table takes up to {needed / GB:.1f} GB and {free / GB:.1f} GB are free; make room, or "
            "name a folder on another disk with --out"
        )
