"""Numeric flags: every script refuses zero, negative, absurd and NaN values, and names the flag.

Texts: every script prints characters that its output's encoding lacks, and refuses file names that are not UTF-8.
"""

import io
import json
import math
import os
import subprocess
import sys

import pytest
from eval_runs import mmau_record
from forked import ENVIRONMENT, ROOT

import bench
import eval_mmau
import grpo_aqa
import reproduce
import sft_aqa
import toy
from data import parse_record
from infra.errors import InputError
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


# ---- texts ----

CHINESE = {"question": "听到什么?", "choices": ["雨", "铃"], "answer": "雨", "task": "声音"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_takes_every_character(script, monkeypatch):
    parse_args, others, _ = SCRIPTS[script]
    for encoding, expected in (
        ("cp1252", b"\xe9 \xb1 \\u96e8"),
        ("ascii", rb"\xe9 \xb1 \u96e8"),
        ("utf-8", "é ± 雨".encode()),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        parse_args(others)
        print("é ± 雨", end="", flush=True)
        assert sys.stdout.buffer.getvalue() == expected


def test_output_may_be_closed_or_a_notebooks(monkeypatch):
    for output in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", output)
        toy.parse_args(["--listen"])
        print("雨")
        sys.stdout.flush()


@pytest.mark.parametrize("script", SCRIPTS)
def test_file_names_must_be_utf_8(script, capsys):
    parse_args, others, _ = SCRIPTS[script]
    with pytest.raises(SystemExit):
        parse_args([*others, "--out", os.fsdecode(b"runs/\xff")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and r"error: --out 'runs/\udcff' is not UTF-8; rename it or" in said


def test_a_clips_name_must_be_one_that_the_system_can_spell(monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii"))
    assert parse_record(CHINESE | {"audio": "c.wav"}, "line 1", "clips").audio == "clips/c.wav"
    with pytest.raises(InputError, match="^line 2: .* file names, ascii, lacks .* 'clips/雨.wav'; set PYTHONUTF8=1"):
        parse_record(CHINESE | {"audio": "雨.wav"}, "line 2", "clips")


def chinese_questions(mmau, folder):
    clips = mmau / "test-mini-audios"
    records = [mmau_record(i, str(clips / f"clip-{i}.wav"), **CHINESE) for i in range(2)]
    (folder / "q.json").write_text(json.dumps(records))
    return folder / "q.json"


def test_an_evaluation_prints_chinese_tasks_as_escapes(mmau, tmp_path, forker):
    argv = ["eval_mmau.py", "--ckpt", mmau / "model", "--data", chinese_questions(mmau, tmp_path), "--out", "p.json"]
    start = f"import runpy; runpy.run_path({str(ROOT / argv[0])!r}, run_name='__main__')"
    code = f"sys.stdout.reconfigure(encoding='cp1252'); {start}"
    done = forker.run(tmp_path, [*argv, "--max_new_tokens", 32], f"import sys; {code}")
    assert done.returncode == 0 and r"task          \u58f0\u97f3" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["PYTHONIOENCODING=cp1252", "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0"])
def test_commands_print_chinese_questions_in_any_encoding(mmau, tmp_path, encoding):
    same = ["--data", str(chinese_questions(mmau, tmp_path)), "--max_new_tokens", "32"]
    model, out = str(mmau / "model"), str(tmp_path / "p.json")
    for command in (
        ["explain.py", "--model", model, *same],
        ["eval_mmau.py", "--ckpt", model, "--out", out, *same],
        ["eval_mmau.py", "--compare", out, out],
        ["toy.py", "--listen", "--questions", same[1], "--out", str(tmp_path / "sheet.png")],
    ):
        start = ["env", *encoding.split(), "MPL_IGNORE_SYSTEM_FONTS=1", sys.executable, ROOT / command[0]]
        done = subprocess.run([*start, *command[1:]], env=os.environ | ENVIRONMENT, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert done.stderr.count(b"\n") == 1 and rb"such as '\u4e48" in done.stderr
