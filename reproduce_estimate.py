"""What the table will take, said before it starts: time from measured steps, disk from the shapes."""

import argparse
import functools
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoConfig, Qwen2AudioForConditionalGeneration

from bench_speed import count_flops, matmul_rate
from checkpoint import checkpoint_bytes, state_bytes
from errors import InputError
from files import free_bytes
from lora import add_lora, base_of
from metrics import read_jsonl
from policy import pick_dtype
from reproduce_rows import LORA_RANK, ROWS, Row, is_own, is_trained, read_record, row_folder
from training import LORA_TARGETS

GB = 1e9
FLOOR = "their arithmetic, with clips of 10 s and answers of 16 tokens, at this machine's rate of matrix products"
SMALL_FILES = 50_000_000  # of a row: processor, metrics, curves, predictions, log

# ---- time ----


def time_text(args: argparse.Namespace, todo: list[tuple[int, Row]]) -> str:
    """How long the rows (seed, row) will still take, from the steps and evaluations that this folder has measured."""
    seconds, floor, unknown = 0.0, 0.0, Counter()
    for seed, row in todo:
        each = step_seconds(args, seed, row) if row.script else 0
        if each is None:
            unknown[f"trainings by {row.script}"] += 1
            floor += 0 if args.toy else args.steps * floor_seconds(args.model, row.script)
        else:
            done = len(step_times(args, seed, row)) if is_own(args, seed, row) else 0
            seconds += each * max(0, args.steps - done)
    evaluations = evaluation_seconds(args)
    if evaluations:
        seconds += mean(evaluations) * len(todo)
    elif todo:
        unknown["evaluations"] = len(todo)
    parts = [f"about {duration(seconds)}"] if seconds or not unknown else []
    if unknown:
        listed = ", ".join(f"{number} {what}" for what, number in unknown.items())
        parts.append(f"unknown until the first of its kind has run: {listed}")
    if floor:
        parts.append(f"these trainings take {duration(floor)} at the very least: {FLOOR}")
    return "; ".join(parts)


@functools.cache
def floor_seconds(model: str, script: str) -> float:
    """Seconds that no step of a script can be faster than: see FLOOR. The scripts' defaults are 2 questions, G = 8."""
    config, group_size = base_config(model), 8 if script == "grpo_aqa.py" else 1
    step = argparse.Namespace(prompts_per_rank=2, group_size=group_size, max_new_tokens=16)
    flops = count_flops(config, min(10.0, config.audio_config.max_source_positions / 50), step)
    # In a process of its own, which takes its share of the GPU's memory with it when it ends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        rate = process.submit(matmul_rate, *scripts_choice()).result()
    return (sum(flops.values()) if script == "grpo_aqa.py" else flops["train"]) / rate


def step_times(args: argparse.Namespace, seed: int, row: Row) -> list[float]:
    """The seconds of each step that a row's training has written down."""
    steps = read_jsonl(row_folder(args, seed, row) / "run" / "metrics.jsonl")
    return [step["seconds"] for step in steps if isinstance(step.get("seconds"), int | float)]


def step_seconds(args: argparse.Namespace, seed: int, row: Row) -> float | None:
    """Mean seconds of a row's step: its own, or those of rows of the same kind, or --seconds_per_step."""
    every = [(s, r) for s in range(args.seeds) for r in ROWS]
    same_row = [time for s, r in every if r == row for time in step_times(args, s, r)]
    same_script = [time for s, r in every if r.script == row.script for time in step_times(args, s, r)]
    measured = step_times(args, seed, row) or same_row or same_script
    return mean(measured) if measured else args.seconds_per_step


def evaluation_seconds(args: argparse.Namespace) -> list[float]:
    """The seconds of each evaluation that has ended."""
    found = []
    for path in Path(args.out).glob("seed_*/*/row.json"):
        seconds = read_record(path).get("evaluation_seconds")
        found += [] if seconds is None else [seconds]
    return found


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def scripts_choice() -> tuple[torch.dtype, torch.device]:
    """The dtype and device that the scripts choose on this machine unless they are told otherwise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return pick_dtype("auto", device), device


def base_config(model: str):
    """The configuration of a model or of an adapter's base."""
    return AutoConfig.from_pretrained(base_of(model), trust_remote_code=False)


# ---- disk ----


def sizes(model: str) -> dict[bool, tuple[int, int]]:
    """(bytes of a checkpoint, bytes of a resume state) of full fine-tuning, [False], and of LoRA, [True].

    Counted from the model's configuration on tensors without data; of an adapter, from its base's.
    """
    dtype, _ = scripts_choice()
    with torch.device("meta"):
        shapes: Any = Qwen2AudioForConditionalGeneration(base_config(model))
        shapes.to(dtype)
    shapes.model.audio_tower.embed_positions.requires_grad_(False)  # as policy.load_policy has it

    full = checkpoint_bytes(shapes), state_bytes(shapes)
    add_lora(shapes, model, LORA_RANK, 1.0, 0.0, LORA_TARGETS.split(","), freeze_audio_tower=False, seed=0)
    return {False: full, True: (checkpoint_bytes(shapes), state_bytes(shapes))}


def disk_bytes(args: argparse.Namespace, todo: list[tuple[int, Row]]) -> int:
    """The most that the rows (seed, row) will add to the disk at one time.

    A finished row keeps its last checkpoint. While a row is saved, the state before it and the checkpoint before it
    are there as well. What unfinished rows of the same settings already hold is not added again, and one that only
    has to be evaluated takes no more. The toy takes next to nothing.
    """
    needed = SMALL_FILES * len(todo)
    untrained = [(seed, row) for seed, row in todo if row.script and not is_trained(args, seed, row)]
    if args.toy or not untrained:
        return needed
    size = sizes(args.model)
    needed += sum(size[row.lora][0] for _, row in untrained)
    needed += max(size[row.lora][0] + 2 * size[row.lora][1] for _, row in untrained)
    own = [row_folder(args, *job) for job in untrained if is_own(args, *job)]
    held = sum(path.stat().st_size for folder in own for path in folder.rglob("*") if path.is_file())
    return max(SMALL_FILES, needed - held)


def disk_text(args: argparse.Namespace, needed: int) -> str:
    """disk_bytes' number beside what is free."""
    return f"{needed / GB:.1f} GB at most, {free_bytes(Path(args.out)) / GB:.1f} GB are free"


def require_disk(args: argparse.Namespace, needed: int) -> None:
    """Raise InputError if disk_bytes' number is more than is free."""
    free = free_bytes(Path(args.out))
    if free < needed:
        raise InputError(
            f"{args.out}: the table takes up to {needed / GB:.1f} GB and {free / GB:.1f} GB are free; make room, or "
            "name a folder on another disk with --out"
        )
