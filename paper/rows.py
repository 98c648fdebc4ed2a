"""The rows of the paper's table, and their jobs: folders, settings, and what is already done."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from training.settings import LORA_LR, TOY_LR, TOY_PROMPTS, TOY_TOKENS


@dataclass(frozen=True)
class Row:
    name: str  # of its folder and for --rows
    title: str  # in the table
    template: str  # for training and evaluation
    script: str = ""  # trains the row; without a script, the starting model is evaluated
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
NAMES = [row.name for row in ROWS]
LORA_RANK = 8


@dataclass(frozen=True)
class Job:
    """Train and evaluate one row with one seed. args: the table's settings, from reproduce.parse_args."""

    args: argparse.Namespace
    seed: int
    row: Row

    def __str__(self) -> str:
        return f"{self.row.name} of seed {self.seed}"

    # ---- files ----

    @property
    def folder(self) -> Path:
        return Path(self.args.out) / f"seed_{self.seed}" / self.row.name

    @property
    def record(self) -> Path:
        """The file with the settings of everything in the folder and, once finished, the digest of the predictions."""
        return self.folder / "row.json"

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the training."""
        return self.run_folder / f"step_{self.args.steps:06d}"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def base_model(self) -> str:
        """The name or folder of the model that all rows of this seed start from."""
        return str(self.folder.parent / "base") if self.args.toy else self.args.model

    # ---- settings ----

    def training_flags(self) -> dict:
        """Return the flags that decide what the row learns. All other flags keep the script's defaults."""
        flags = {"template": self.row.template, "steps": self.args.steps, "seed": self.seed}
        if self.args.toy:
            lr = TOY_LR[self.row.script] * (LORA_LR if self.row.lora else 1)
            flags |= {"lr": lr, "dtype": "float32", "max_new_tokens": TOY_TOKENS}
            flags |= {"prompts_per_rank": TOY_PROMPTS // self.args.nproc_per_node}
        if self.row.lora:
            flags["lora_rank"] = LORA_RANK
        return flags

    def evaluation_flags(self) -> dict:
        flags: dict = {"template": self.row.template}
        if self.args.toy:
            flags |= {"max_new_tokens": TOY_TOKENS, "dtype": "float32", "batch_size": 50}
        return flags

    def settings(self) -> dict:
        """Collect everything that the row's figures depend on, except the model and questions of the whole table."""
        found = {"seed": self.seed, "evaluation": self.evaluation_flags()}
        if self.row.script:
            flags = self.training_flags()
            # A step of the toy has the same questions on any number of ranks. Saved row.json files hold this text.
            flags["prompts_per_rank"] = TOY_PROMPTS if self.args.toy else f"{self.args.nproc_per_node} processes"
            found["training"] = {"script": self.row.script} | flags
        return found

    # ---- progress ----

    def has_same_settings(self) -> bool:
        """Tell whether the folder exists and was made with this job's settings."""
        return read_record(self.record).get("settings") == self.settings()

    def is_trained(self) -> bool:
        return self.has_same_settings() and self.checkpoint.exists()

    def is_finished(self) -> bool:
        """Tell whether the predictions exist, were made with this job's settings and have not been changed since."""
        written = read_record(self.record).get("predictions_sha256")
        return self.has_same_settings() and self.predictions.exists() and written == sha256(self.predictions)


def jobs(args: argparse.Namespace, seeds: int | None = None, names: list[str] | None = None) -> list[Job]:
    """List the jobs of a table, seed by seed. The defaults of seeds and of names of rows are args.seeds and args.rows.

    The real model is the same for every seed and evaluation is greedy, so its untouched rows need one seed only.
    """
    return [
        Job(args, seed, row)
        for seed in range(seeds or args.seeds)
        for row in ROWS
        if row.name in (names or args.rows) and (seed == 0 or args.toy or row.script)
    ]


def finished_jobs(args: argparse.Namespace) -> list[Job]:
    """List all finished jobs, even if --rows and --seeds do not ask for them."""
    numbers = [path.name.removeprefix("seed_") for path in Path(args.out).glob("seed_*")]
    seeds = max([args.seeds, *(int(number) + 1 for number in numbers if number.isdecimal())])
    return [job for job in jobs(args, seeds, NAMES) if job.is_finished()]


def read_record(path: Path) -> dict:
    """Read a row.json. Returns an empty dict if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
