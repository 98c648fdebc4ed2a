"""The rows of the paper's table: how each is trained and evaluated, as command lines of the scripts."""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from training import LORA_LR, TOY_PROMPTS

ROOT = Path(__file__).resolve().parent  # where the scripts are


@dataclass(frozen=True)
class Row:
    name: str  # its folder, and its name for --rows
    title: str  # in the table
    template: str  # of training and evaluation
    script: str = ""  # what trains it; without one, the starting model is evaluated
    lora: bool = False


ROWS = (
    Row("untouched_direct", "untouched, direct", "direct"),
    Row("untouched_answer", "untouched, answer", "answer"),
    Row("untouched_think", "untouched, think", "think"),
    Row("sft_full", "SFT, full", "answer", "sft_aqa.py"),
    Row("sft_lora", "SFT, LoRA", "answer", "sft_aqa.py", lora=True),
    Row("grpo_direct", "GRPO, direct", "direct", "grpo_aqa.py"),
    Row("grpo_answer", "GRPO, answer", "answer", "grpo_aqa.py"),
    Row("grpo_think", "GRPO, think", "think", "grpo_aqa.py"),
    Row("grpo_lora", "GRPO, LoRA (answer)", "answer", "grpo_aqa.py", lora=True),
)

TOY_LR = {"grpo_aqa.py": 3e-4, "sft_aqa.py": 1e-3}  # the real model has its scripts' own rates
LORA_RANK = 8
TOY_TOKENS = 32  # longest completion


def jobs(args: argparse.Namespace) -> list[tuple[int, Row]]:
    """(seed, row) of all that args asks for, seed by seed.

    The real model is the same for every seed and evaluation is greedy: its untouched rows need one seed.
    """
    return [
        (seed, row)
        for seed in range(args.seeds)
        for row in ROWS
        if row.name in args.rows and (seed == 0 or args.toy or row.script)
    ]


def row_folder(args: argparse.Namespace, seed: int, row: Row) -> Path:
    return Path(args.out) / f"seed_{seed}" / row.name


def base_model(args: argparse.Namespace, seed: int) -> str:
    """The model that all rows of a seed start from."""
    return str(Path(args.out) / f"seed_{seed}" / "base") if args.toy else args.model


def last_checkpoint(args: argparse.Namespace, seed: int, row: Row) -> Path:
    """What a trained row is evaluated by."""
    return row_folder(args, seed, row) / "run" / f"step_{args.steps:06d}"


def predictions_file(args: argparse.Namespace, seed: int, row: Row) -> Path:
    return row_folder(args, seed, row) / "predictions.json"


def settings(args: argparse.Namespace, seed: int, row: Row) -> dict:
    """All that a row's figures depend on, beside the model and the questions that the whole table shares."""
    found = {"seed": seed, "evaluation": evaluation_flags(args, row)}
    if row.script:
        flags = training_flags(args, seed, row)
        # A toy's step has the same questions on any number of processes.
        flags["prompts_per_rank"] = TOY_PROMPTS if args.toy else f"{args.nproc_per_node} processes"
        found["training"] = {"script": row.script} | flags
    return found


def read_record(path: Path) -> dict:
    """What a row.json says; empty where there is none, or one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_own(args: argparse.Namespace, seed: int, row: Row) -> bool:
    """Whether a row's folder is there and of these settings."""
    return read_record(row_folder(args, seed, row) / "row.json").get("settings") == settings(args, seed, row)


def is_trained(args: argparse.Namespace, seed: int, row: Row) -> bool:
    """Whether a row's last checkpoint is there, of these settings."""
    return is_own(args, seed, row) and last_checkpoint(args, seed, row).exists()


def is_finished(args: argparse.Namespace, seed: int, row: Row) -> bool:
    """Whether a row has its predictions, of these settings and as they were written."""
    written = read_record(row_folder(args, seed, row) / "row.json").get("predictions_sha256")
    predictions = predictions_file(args, seed, row)
    return is_own(args, seed, row) and predictions.exists() and written == sha256(predictions)


def finished_rows(args: argparse.Namespace) -> list[tuple[int, str]]:
    """(seed, row's name) of all rows that the table can show, whether or not --rows and --seeds ask for them."""
    numbers = [path.name.removeprefix("seed_") for path in Path(args.out).glob("seed_*")]
    seeds = max([args.seeds, *(int(number) + 1 for number in numbers if number.isdecimal())])
    every = argparse.Namespace(**vars(args) | {"rows": [row.name for row in ROWS], "seeds": seeds})
    return [(seed, row.name) for seed, row in jobs(every) if is_finished(args, seed, row)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def training_flags(args: argparse.Namespace, seed: int, row: Row) -> dict:
    """Flags that decide what a row learns; what is not among them has the script's default, the paper's."""
    flags = {"template": row.template, "steps": args.steps, "seed": seed}
    if args.toy:
        lr = TOY_LR[row.script] * (LORA_LR if row.lora else 1)
        flags |= {"lr": lr, "dtype": "float32", "accumulation_steps": 1, "max_new_tokens": TOY_TOKENS}
        flags |= {"prompts_per_rank": TOY_PROMPTS // args.nproc_per_node}
    if row.lora:
        flags["lora_rank"] = LORA_RANK
    return flags


def evaluation_flags(args: argparse.Namespace, row: Row) -> dict:
    flags: dict = {"template": row.template}
    if args.toy:
        flags |= {"max_new_tokens": TOY_TOKENS, "dtype": "float32", "batch_size": 50}
    return flags


def training_command(args: argparse.Namespace, seed: int, row: Row) -> list[str]:
    """Starts a row's training, or continues it."""
    paths = {"model": base_model(args, seed), "data": args.data, "audio_dir": args.audio_dir}
    paths["out"] = row_folder(args, seed, row) / "run"
    saving = {"save_every": 100, "keep_last": 1}
    return [*_command(args, row.script, paths | training_flags(args, seed, row) | saving), "--resume"]


def evaluation_command(args: argparse.Namespace, seed: int, row: Row) -> list[str]:
    paths = {"ckpt": last_checkpoint(args, seed, row) if row.script else base_model(args, seed)}
    paths |= {"data": args.mmau, "audio_dir": args.mmau_audio_dir, "out": predictions_file(args, seed, row)}
    return _command(args, "eval_mmau.py", paths | evaluation_flags(args, row))


def _command(args: argparse.Namespace, script: str, flags: dict) -> list[str]:
    launcher = []
    if args.nproc_per_node > 1:
        # --standalone finds a free port; the timeout lets the workers of a run that is ended save the real model.
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc_per_node}"]
        launcher += ["--shutdown_timeout=600"]
    texts = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    texts += ["--skip_bad_audio"] * args.skip_bad_audio
    return [sys.executable, *launcher, str(ROOT / script), *texts]
