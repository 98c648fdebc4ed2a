"""Command lines: which numbers a flag takes, and a user's mistake in one line. The same for every script."""

import argparse
import os
import sys

# Flag: the numbers that it takes, as an interval; a round bracket leaves its end out. What lies outside is nonsense or
# a slip of the keyboard (a learning rate of 1e6 for 1e-6), and a run that starts with it is lost.
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
    "log_completions_every": "[1, 10000000]",
    # evaluation
    "batch_size": "[1, 65536]",
    "limit": "[1, 1000000000]",
    "samples": "[2, 10000]",
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps numbers within LIMITS and says a mistake in one line, on rank 0 alone."""

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for name, given in vars(parsed).items():
            for value in given if isinstance(given, list) else [given]:
                if type(value) in (int, float) and (wrong := outside_limits(name, value)):
                    self.error(wrong)
        return parsed

    def error(self, message: str):
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (--help lists all settings)", file=sys.stderr, flush=True)
        sys.exit(2)


def outside_limits(name: str, value: float) -> str | None:
    """What is wrong with a number for the flag --name, if it is outside LIMITS or not a number at all."""
    interval = LIMITS[name]
    low, high = map(float, interval[1:-1].split(","))
    if not (value > low if interval[0] == "(" else value >= low):  # neither is true of NaN
        return f"--{name} must be {'above' if interval[0] == '(' else 'at least'} {low:.10g}, not {value}"
    if not (value < high if interval[-1] == ")" else value <= high):
        return f"--{name} must be {'below' if interval[-1] == ')' else 'at most'} {high:.10g}, not {value}"
    return None
