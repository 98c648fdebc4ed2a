"""A run's log for TensorBoard: metrics, settings and completions. `tensorboard --logdir runs` shows it."""

import argparse
import json
import re
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from infra.errors import InputError
from reward import REWARDS

FOLDER = "tensorboard"  # in a run folder
HEADINGS = ("seconds", "heldout", "completion", "groups", "reward")  # of the metrics that have the word in their name


def require_tensorboard() -> None:
    """Raise InputError if the package tensorboard is missing or does not work with torch."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except Exception as error:  # versions that do not fit raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--tensorboard needs a package: pip install --upgrade tensorboard ({reason})") from None


class TensorBoard:
    """Writes the log. Does nothing without --tensorboard, and on ranks other than 0.

    A failure never stops the run: it prints one line, and nothing more is written.
    """

    def __init__(self, args: argparse.Namespace, config: dict, step: int):
        """Start the log, or continue it after `step`: TensorBoard then drops later steps, which an earlier start wrote.

        config: the settings to show.
        """
        self.on = args.tensorboard and dist.get_rank() == 0
        self.folder, self.first = Path(args.out, FOLDER), step + 1
        self.writer: Any = None  # made by the first write
        self._write(self.first, texts={"settings": f"```\n{json.dumps(config, indent=2)}\n```"})

    def log_metrics(self, record: dict) -> None:
        """Write the numbers in a line of metrics.jsonl."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        self._write(record["step"], {f"{heading(name)}/{name}": value for name, value in numbers.items()})

    def log_completions(self, records: list[dict]) -> None:
        """Write the lines of a step in completions.jsonl as tables."""
        self._write(records[0]["step"], texts={"completions": completions_tables(records)})

    def _write(self, step: int, scalars: dict[str, float] | None = None, texts: dict[str, str] | None = None) -> None:
        if not self.on:
            return
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter  # imported here because the package is optional

                _silence_writer_thread()
                self.writer = SummaryWriter(self.folder, purge_step=self.first)
            for name, value in (scalars or {}).items():
                self.writer.add_scalar(name, value, step)
            for name, text in (texts or {}).items():
                self.writer.add_text(name, text, step)
            self.writer.flush()  # a killed run keeps what it has written; errors of the writer's thread arrive here
        except Exception as error:
            self.on = False
            tqdm.write(f"--tensorboard: {' '.join(str(error).split())}; the run continues without it")


def _silence_writer_thread() -> None:
    """Let the writer's thread end without a traceback: its errors reach TensorBoard._write, which prints them."""
    hook = threading.excepthook

    def quiet(args):
        if type(args.thread).__name__ != "_AsyncWriterThread":
            hook(args)

    threading.excepthook = quiet


def heading(name: str) -> str:
    """Return the heading under which TensorBoard shows a metric."""
    return "reward" if name in REWARDS else next((word for word in HEADINGS if word in name), "training")


def completions_tables(records: list[dict]) -> str:
    """Return lines of completions.jsonl as Markdown: each question with its right answer and a table of its group."""
    parts = []
    for record in records:
        columns = {name: values for name, values in record.items() if isinstance(values, list)}
        rows = [["---"] * len(columns), *([_escape(cell) for cell in row] for row in zip(*columns.values()))]
        table = "\n".join(f"| {' | '.join(row)} |" for row in [list(columns), *rows])
        parts += [f"**Question:** {_escape(record['prompt'])} **Answer:** {_escape(record['answer'])}", table]
    return "\n\n".join(parts)


def _escape(value: str | float) -> str:
    """Return a text or number such that Markdown and HTML show it as it is."""
    text = value if isinstance(value, str) else f"{value:.4g}"
    return re.sub(r"[^\w ]|_", lambda match: f"&#{ord(match[0])};", text)
