"""Numeric flags: every script refuses zero, negative, absurd and NaN values, and names the flag."""

import math

import pytest

import bench
import eval_mmau
import grpo_aqa
import reproduce
import sft_aqa
import toy
from infra.flags import LIMITS, outside_limits

CHECKPOINT = ["--ckpt", "m", "--out", "p", "--data", "q.jsonl"]
TRAINING = ("steps", "prompts_per_rank", "accumulation_steps", "max_new_tokens", "lr", "max_grad_norm", "seed",
            "save_every", "save_state_every", "keep_last", "lora_rank", "lora_alpha", "lora_dropout")  # fmt: skip
GRPO = ("group_size", "temperature", "beta", "clip_low", "clip_high", "updates_per_rollout", "log_completions_every")
EVALUATION = ("batch_size", "limit", "max_new_tokens", "samples", "shuffle_choices", "check_batching", "seed")
MEASURING = ("group_size", "prompts_per_rank", "clip_seconds", "max_new_tokens")
REPRODUCE = ("seeds", "steps", "nproc_per_node", "label_noise", "heldout_noise", "seconds_per_step")
# script: (what parses its command line, what else the command needs, its numeric flags)
SCRIPTS = {
    "grpo_aqa.py": (grpo_aqa.parse_args, [], TRAINING + GRPO),
    "sft_aqa.py": (sft_aqa.parse_args, [], TRAINING),
    "eval_mmau.py": (eval_mmau.parse_args, CHECKPOINT, EVALUATION),
    "eval_mmau.py, sampling": (eval_mmau.parse_args, [*CHECKPOINT, "--samples", "2"], ("temperature",)),
    "reproduce.py": (reproduce.parse_args, [], REPRODUCE),
    "toy.py": (toy.parse_args, ["--questions", "q", "--out", "x"], ("random_answers", "steps", "seed")),
    "bench.py memory": (bench.parse_args, ["memory"], (*MEASURING, "gpus", "accumulation_steps", "beta", "lora_rank")),
    "bench.py scale": (bench.parse_args, ["scale"], (*MEASURING, "rounds", "seconds_per_point")),
    "bench.py eval": (
        bench.parse_args,
        ["eval"],
        ("clip_seconds", "max_new_tokens", "rounds", "questions", "batch_size"),
    ),
}
SCRIPTS |= {
    f"bench.py {name}": (bench.parse_args, [name], (*MEASURING, "rounds")) for name in ("step", "sample", "train")
}
ZERO_IS_FINE = {"seed", "keep_last", "lora_rank", "lora_dropout", "beta", "shuffle_choices", "random_answers",
                "label_noise", "heldout_noise"}  # fmt: skip
CASES = [(script, flag) for script, (_, _, flags) in SCRIPTS.items() for flag in flags]


@pytest.mark.parametrize("script, flag", CASES)
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "1e30", str(10**30), "many", ""])
def test_absurd_numbers_are_refused_by_name(script, flag, value, capsys):
    parse_args, others, _ = SCRIPTS[script]
    if value == "0" and flag in ZERO_IS_FINE:
        parse_args([*others, f"--{flag}=0"])
        return
    with pytest.raises(SystemExit):
        parse_args([*others, f"--{flag}={value}"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "error: " in said and f"--{flag}" in said


def test_messages_name_the_limit():
    assert outside_limits("lr", 1e-6) is None and outside_limits("lr", 1.0) is None
    assert outside_limits("lr", 0.0) == "--lr must be above 0, not 0.0"
    assert outside_limits("lr", 1.1) == "--lr must be at most 1, not 1.1"
    assert outside_limits("lr", math.nan) == "--lr must be above 0, not nan"
    assert outside_limits("lora_dropout", 1.0) == "--lora_dropout must be below 1, not 1.0"
    assert outside_limits("steps", 0) == "--steps must be at least 1, not 0"


def test_every_numeric_flag_has_limits():
    """A flag without limits would raise KeyError. All defaults are within their limits."""
    for parse_args, others, flags in SCRIPTS.values():
        numbers = {name for name, value in vars(parse_args(others)).items() if type(value) in (int, float)}
        assert numbers <= set(LIMITS) and set(flags) <= set(LIMITS)


def test_under_torchrun_only_rank_0_prints_errors(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        grpo_aqa.parse_args(["--lr", "7"])
    assert capsys.readouterr().err == ""
