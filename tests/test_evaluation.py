"""bench.py eval on a tiny model. No times."""

import copy
import json
from argparse import Namespace

import torch

import bench
from benchmarks import evaluation


def test_both_ways_give_the_same_texts(config, monkeypatch, capsys, tmp_path):
    """Clips have different lengths, and each way has its own batches."""
    config = copy.deepcopy(config)
    config.text_config.vocab_size = 4096
    monkeypatch.setattr(evaluation, "hardware", lambda: (config, torch.float32, torch.device("cpu"), 1))
    monkeypatch.setattr(evaluation, "PLAIN_BATCH", 4)
    flags = "--clip_seconds 1 0.5 --rounds 2 --max_new_tokens 6 --questions 7 --batch_size 3".split()
    evaluation.bench_eval(bench.parse_args(["eval", *flags, "--out", f"{tmp_path}/eval.json"]))
    found = json.loads((tmp_path / "eval.json").read_text())["clips"]
    assert found["equal_texts"] == 7 and found["clip_seconds"] == [1.0, 0.5]
    assert {way: len(times) for way, times in found["rounds"].items()} == {"plain": 2, "ours": 2}
    assert "7 questions, clips of 1 and 0.5 s" in capsys.readouterr().out


def test_report():
    """The ratio is the median of the rounds' ratios."""
    args = Namespace(questions=8, clip_seconds=[10.0], max_new_tokens=6)
    lines = evaluation.report(args, {"plain": [8.0, 9.0, 4.0], "ours": [4.0, 2.0, 1.0]}, 8).splitlines()
    assert lines[2].split()[1:] == ["8.00", "s", "1.00", "questions/s"]
    assert lines[4] == "  plain / ours       4.00      8 of 8 texts equal"
