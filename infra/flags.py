"""Command lines: the allowed range of each numeric flag, one-line errors, output in any encoding."""

import argparse
import io
import os
import sys

# Flag -> allowed range; a round bracket excludes the endpoint. A number outside is nonsense or a typing error (1e6 for
# a learning rate of 1e-6), and would waste the run.
LIMITS = {
    # training
    "steps": "[1, 10000000]",
    "prompts_per_rank": "[1, 4096]",
    "accumulation_steps": "[1, 4096]",
    "max_new_tokens": "[1, 100000]",
    "lr": "(0, 1]",
    "max_grad_norm": "(0, 1000000]",
    "seed": "[0, 4294967295]",
    "save_every": "[1, 10000000]",
    "heldout_every": "[0, 10000000]",
    "save_state_every": "[1, 10000000]",
    "keep_last": "[0, 1000000]",
    "lora_rank": "[0, 8192]",
    "lora_alpha": "(0, 100000]",
    "lora_dropout": "[0, 1)",
    # GRPO
    "group_size": "[2, 4096]",
    "temperature": "(0, 100]",
    "beta": "[0, 100]",
    "clip_low": "(0, 1]",
    "clip_high": "(0, 1000]",
    "updates_per_rollout": "[1, 1000]",
    "dynamic_sampling": "[0, 100]",
    "log_completions_every": "[1, 10000000]",
    # evaluation
    "batch_size": "[1, 65536]",
    "limit": "[1, 1000000000]",
    "samples": "[2, 10000]",
    "orders": "[2, 1000]",
    "shuffle_choices": "[0, 4294967295]",
    "check_batching": "[1, 1000000000]",
    # the toy, the paper's table
    "random_answers": "[0, 1]",
    "seeds": "[1, 1000]",
    "nproc_per_node": "[1, 1024]",
    "label_noise": "[0, 1]",
    "heldout_noise": "[0, 1000]",
    "seconds_per_step": "(0, 1000000]",
    # measuring
    "gpus": "[1, 65536]",
    "clip_seconds": "[0.1, 30]",
    "rounds": "[1, 1000]",
    "questions": "[1, 1000000]",
    "seconds_per_point": "(0, 86400]",
}


def on_off(text: str) -> bool:
    """Convert "on" to True and "off" to False."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, not {text!r}")
    return text == "on"


def auto_on_off(text: str) -> bool | None:
    """Convert "on" to True, "off" to False and "auto" to None."""
    return None if text == "auto" else on_off(text)


# Keywords for add_argument: `--name on` becomes a boolean. Give the default as the text "on", "off" or "auto".
ON_OFF = dict(type=on_off, metavar="{on,off}")
AUTO_ON_OFF = dict(type=auto_on_off, metavar="{auto,on,off}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that requires numbers within LIMITS and prints errors as one line, on rank 0 only.

    It also requires texts in UTF-8, because tokenizers and safetensors take no other file names, and makes print safe
    for every character.
    """

    def parse_args(self, args=None, namespace=None):
        escape_other_characters()
        parsed = super().parse_args(args, namespace)
        for name, given in vars(parsed).items():
            for value in given if isinstance(given, list) else [given]:
                if type(value) in (int, float) and (wrong := outside_limits(name, value)):
                    self.error(wrong)
                if isinstance(value, str) and os.fsencode(value) != value.encode(errors="backslashreplace"):
                    self.error(f"--{name} {value!r} is not UTF-8; rename it or set PYTHONUTF8=1")
        return parsed

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (--help lists all settings)", file=sys.stderr, flush=True)
        sys.exit(2)


def escape_other_characters() -> None:
    """Make standard output write an escape for each character that its encoding lacks.

    Without this, print raises UnicodeEncodeError for Chinese questions if the encoding is cp1252 or ASCII. Standard
    error writes escapes anyway. The parser calls this, because every script parses its command line before it prints.
    """
    if sys.stdout is None:  # closed with >&-
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook, which takes every character
        sys.stdout.reconfigure(errors="backslashreplace")


def outside_limits(name: str, value: float) -> str | None:
    """Return an error message if a value of --name is NaN or outside LIMITS, else None."""
    interval = LIMITS[name]
    low, high = map(float, interval[1:-1].split(","))
    if not (value > low if interval[0] == "(" else value >= low):  # NaN fails both
        return f"--{name} must be {'above' if interval[0] == '(' else 'at least'} {low:.10g}, not {value}"
    if not (value < high if interval[-1] == ")" else value <= high):
        return f"--{name} must be {'below' if interval[-1] == ')' else 'at most'} {high:.10g}, not {value}"
    return None
