"""The rows of the tables, and their jobs: folders, settings, and what is already done."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from evaluation.scores import is_right, read_predictions
from training.settings import LORA_LR, LR, TOY_LR, TOY_PROMPTS, TOY_TOKENS


@dataclass(frozen=True)
class Row:
    name: str  # of its folder and for --rows
    title: str  # in the table
    template: str  # for training and evaluation
    script: str = ""  # trains the row; without a script, the starting model is evaluated
    lora: bool = False
    lr: float | None = None  # None: the script's own, times LORA_LR with LoRA
    flags: tuple[tuple[str, Any], ...] = ()  # further flags of the script


SFT, GRPO = "sft_aqa.py", "grpo_aqa.py"
ROWS = (
    Row("untouched_direct", "untouched, direct", "direct"),
    Row("untouched_answer", "untouched, answer", "answer"),
    Row("untouched_think", "untouched, think", "think"),
    Row("sft_full", "SFT, full", "answer", SFT),
    Row("sft_lora", "SFT, LoRA", "answer", SFT, lora=True),
    # With --model and without --tune_rates: SFT's own rate is ten times GRPO's, which alone may explain a difference.
    Row("sft_at_grpo_rate", "SFT, full, GRPO's rate", "answer", SFT, lr=LR[GRPO]),
    Row("grpo_direct", "GRPO, direct", "direct", GRPO),
    Row("grpo_answer", "GRPO, answer", "answer", GRPO),
    Row("grpo_think", "GRPO, think", "think", GRPO),
    Row("grpo_lora", "GRPO, LoRA (answer)", "answer", GRPO, lora=True),
)
BETA_0 = (("beta", 0.0),)
TRANSFER_ROWS = (
    Row("untouched", "base", "answer"),
    *(Row(f"sft_{lr}", "SFT, full", "answer", SFT, lr=float(lr)) for lr in ("1e-4", "3e-4", "1e-3")),
    *(Row(f"grpo_{lr}", "GRPO", "answer", GRPO, lr=float(lr)) for lr in ("1e-4", "3e-4", "1e-3")),
    Row("grpo_beta_0", "GRPO, beta 0", "answer", GRPO, lr=3e-4, flags=BETA_0),
    Row("sft_lora", "SFT, LoRA", "answer", SFT, lora=True, lr=3e-3),
    Row("grpo_lora", "GRPO, LoRA", "answer", GRPO, lora=True, lr=3e-3),
)
# The flags of docs/algorithm.md, all with beta 0: the rows differ from beta_0 by their variant alone.
DR_GRPO = (("normalize_std", "off"), ("loss_average", "constant"), *BETA_0)
DAPO_LOSS = (("loss_average", "token"), ("clip_high", 0.28), *BETA_0)
GSPO = (("ratio", "sequence"), ("clip_low", 3e-4), ("clip_high", 4e-4), ("updates_per_rollout", 4), *BETA_0)
VARIANT_ROWS = (
    Row("paper", "the paper's settings", "answer", GRPO),
    Row("beta_0", "beta 0", "answer", GRPO, flags=BETA_0),
    Row("dr_grpo", "Dr. GRPO", "answer", GRPO, flags=DR_GRPO),
    Row("dapo_loss", "DAPO's loss", "answer", GRPO, flags=DAPO_LOSS),
    Row("dapo", "DAPO's loss, dynamic sampling", "answer", GRPO, flags=(*DAPO_LOSS, ("dynamic_sampling", 3))),
    Row("gspo_4", "GSPO, 4 updates", "answer", GRPO, flags=GSPO),
)
TABLES = {"transfer": TRANSFER_ROWS, "variants": VARIANT_ROWS}  # flag of reproduce.py -> rows
HELDOUT_EVERY = 10  # steps between held-out scores of VARIANT_ROWS
LORA_RANK = 8
RATES = (1.0, 1 / 3, 3.0)  # factors on a row's learning rate that --tune_rates compares


def table_rows(args: argparse.Namespace) -> list[Row]:
    """List all rows of the table that reproduce.py's args ask for, also the ones that --rows leaves out."""
    for kind, rows in TABLES.items():
        if getattr(args, kind):
            return list(rows)
    return [row for row in ROWS if row.lr is None or not (args.toy or args.tune_rates)]


def is_tuned(args: argparse.Namespace, row: Row) -> bool:
    """Tell whether the row's learning rate is chosen: --tune_rates asks for the row, now or in an earlier call."""
    asked = args.tune_rates and (row.name in args.rows or Job(args, 0, row).validation.exists())
    return bool(asked and row.script)


@dataclass(frozen=True)
class Job:
    """Train and evaluate one row with one seed. args: the table's settings, from reproduce.parse_args."""

    args: argparse.Namespace
    seed: int
    row: Row
    rate: float = 1.0  # factor on the row's learning rate

    def __str__(self) -> str:
        return f"{self.folder.name} of seed {self.seed}"

    # ---- files ----

    @property
    def folder(self) -> Path:
        name = self.row.name if self.rate == 1 else f"{self.row.name}_x{self.rate:.2g}"
        return Path(self.args.out) / f"seed_{self.seed}" / name

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
    def validation(self) -> Path:
        """The predictions that chosen_rate scores."""
        return self.folder / "validation.json"

    @property
    def clean(self) -> Path:
        """The predictions for clips without extra noise, with --transfer."""
        return self.folder / "clean.json"

    @property
    def measured(self) -> Path:
        """The figures of transfer.measure."""
        return self.folder / "measured.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def base_model(self) -> str:
        """The name or folder of the model that all rows of this seed start from."""
        return str(self.folder.parent / "base") if self.args.toy else self.args.model

    @property
    def evaluated(self) -> str:
        """The model that answers: the checkpoint of a trained row, else the base model."""
        return str(self.checkpoint) if self.row.script else self.base_model

    # ---- settings ----

    @property
    def lr(self) -> float:
        """The learning rate of the row's training."""
        own = (TOY_LR if self.args.toy else LR)[self.row.script] * (LORA_LR if self.row.lora else 1)
        return (own if self.row.lr is None else self.row.lr) * self.rate

    def training_flags(self) -> dict:
        """Return the flags that decide what the row learns. All other flags keep the script's defaults."""
        flags = {"template": self.row.template, "steps": self.args.steps, "seed": self.seed}
        if self.args.toy:
            flags |= {"lr": self.lr, "dtype": "float32", "max_new_tokens": TOY_TOKENS}
            flags |= {"prompts_per_rank": TOY_PROMPTS // self.args.nproc_per_node}
        elif self.row.lr is not None or self.rate != 1:
            flags["lr"] = self.lr
        if self.row.lora:
            flags["lora_rank"] = LORA_RANK
        return flags | dict(self.row.flags)

    def evaluations(self) -> dict[Path, tuple[str, str | None]]:
        """Return the row's predictions files, each with its question file and the folder of relative audio paths."""
        found: dict = {self.predictions: (self.args.mmau, self.args.mmau_audio_dir)}
        if self.args.transfer:
            found[self.clean] = (self.args.clean, None)
        if self.seed == 0 and is_tuned(self.args, self.row):
            found[self.validation] = (self.args.validation, self.args.validation_audio_dir)
        return found

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
        """Tell whether all results exist, were made with this job's settings and have not been changed since."""
        results = [*self.evaluations(), *([self.measured] if self.args.transfer else [])]
        return self.has_same_settings() and all(map(self.has_result, results))

    def has_result(self, path: Path) -> bool:
        """Tell whether row.json holds the digest of this file of results."""
        return path.exists() and read_record(self.record).get(f"{path.stem}_sha256") == sha256(path)


def jobs(args: argparse.Namespace, seeds: int | None = None, all_rows: bool = False) -> list[Job]:
    """List the jobs of a table, seed by seed.

    seeds: how many, by default args.seeds. all_rows: also the rows that --rows leaves out.
    The real model is the same for every seed and evaluation is greedy, so its untouched rows need one seed only. With
    --tune_rates, seed 0 trains at all RATES, later seeds at the chosen one.
    """
    return [
        Job(args, seed, row, rate)
        for seed in range(seeds or args.seeds)
        for row in table_rows(args)
        if (all_rows or row.name in args.rows) and (seed == 0 or args.toy or row.script)
        for rate in (RATES if seed == 0 and is_tuned(args, row) else [chosen_rate(args, row)])
    ]


def chosen_rate(args: argparse.Namespace, row: Row) -> float:
    """Return the factor on the row's learning rate that is best on the validation questions with seed 0.

    If several rates are equally good, take the first of them in RATES. Rates without a finished job are left out.
    Return 1 if the row is not tuned.
    """
    if not is_tuned(args, row):
        return 1.0
    tried = [job for job in (Job(args, 0, row, rate) for rate in RATES) if job.is_finished()]
    return max(tried, key=validation_accuracy).rate if tried else 1.0


def validation_accuracy(job: Job) -> float:
    """Compute a finished job's accuracy on the validation questions."""
    return _accuracy(str(job.validation), sha256(job.validation))


@cache
def _accuracy(path: str, digest: str) -> float:
    """Score a predictions file once for each of its contents."""
    questions, predictions = read_predictions(path)
    return mean(map(is_right, questions, predictions))


def finished_jobs(args: argparse.Namespace) -> list[Job]:
    """List all finished jobs, even if --rows and --seeds do not ask for them."""
    numbers = [path.name.removeprefix("seed_") for path in Path(args.out).glob("seed_*")]
    seeds = max([args.seeds, *(int(number) + 1 for number in numbers if number.isdecimal())])
    return [job for job in jobs(args, seeds, all_rows=True) if job.is_finished()]


def read_record(path: Path) -> dict:
    """Read a row.json. Returns an empty dict if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
