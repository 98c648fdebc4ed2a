"""bench.py step, sample, eval, train and scale as commands, on a tiny model. No times."""

import copy
import json
from argparse import Namespace

import pytest
import torch

import bench
import bench_eval
import bench_models
import bench_scale
import bench_speed

CPU = torch.device("cpu")


@pytest.fixture
def on_the_tiny_model(config, monkeypatch, tmp_path):
    """The benchmarks of this model, with round numbers for the machine's speed, in an empty folder."""
    monkeypatch.setattr(bench_speed, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_scale, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_speed, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(bench_speed, "copy_bandwidth", lambda device: 1e9)
    for module in (bench_speed, bench_models):
        monkeypatch.setattr(module, "machine_name", lambda: "Some(R) CPU, 2 cores")
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, *words) -> dict:
    """Run bench.py. Returns the results file that it writes."""
    monkeypatch.setattr("sys.argv", ["bench.py", *words])
    bench.main()
    with open(f"bench_results/{words[0]}_Some_R_CPU_2_cores.json") as file:
        return json.load(file)


def test_step(on_the_tiny_model, monkeypatch, capsys):
    words = "--clip_seconds 0.5 1 --rounds 2 --group_size 3 --max_new_tokens 5".split()
    result = run(monkeypatch, "step", *words)
    printed = capsys.readouterr().out
    assert result["machine"] == "Some(R) CPU, 2 cores" and result["torch"] == torch.__version__
    assert result["settings"]["rounds"] == 2 and [clip["clip_seconds"] for clip in result["clips"]] == [0.5, 1.0]
    for clip in result["clips"]:
        for way in ("plain", "ours"):
            assert [list(seconds) for seconds in clip["rounds"][way]] == 2 * [list(bench_speed.PHASES)]
            assert all(seconds > 0 for times in clip["rounds"][way] for seconds in times.values())
        assert 0 < 2 * clip["beside_gb"]["ours"] < clip["beside_gb"]["plain"]
    assert printed.count("plain / ours") == 2


def test_sample(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "sample", "--clip_seconds", "1", "--rounds", "2", "--max_new_tokens", "10")
    assert result["clips"][0]["lengths"] == [1, 2, 10] and len(result["clips"][0]["rounds"]) == 2
    assert "decode step, a token of each of 16" in capsys.readouterr().out
    found = {"rounds": [[0.5, 1.0, 5.0]], "weight_bytes": 3e7, "cache_bytes": 1e7}
    report = bench_speed.sample_report(found, 1e9, Namespace(prompts_per_rank=2, group_size=8, max_new_tokens=50))
    for expected in ("0.5000 s", "100.000 ms         160 tokens/s", "40.000 ms         40% of", "0.030 GB of weights"):
        assert expected in report


def test_eval(on_the_tiny_model, config, monkeypatch, capsys):
    """Both ways give the same texts, of clips of different lengths and in batches of their own."""
    config = copy.deepcopy(config)
    config.text_config.vocab_size = 4096
    monkeypatch.setattr(bench_eval, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(bench_eval, "PLAIN_BATCH", 4)
    flags = ["--clip_seconds", "1", "0.5", "--rounds", "2", "--max_new_tokens", "6", "--questions", "7"]
    found = run(monkeypatch, "eval", *flags, "--batch_size", "3")["clips"]
    assert found["equal_texts"] == 7 and {way: len(times) for way, times in found["rounds"].items()} == {
        "plain": 2, "ours": 2
    }  # fmt: skip
    assert "7 questions, clips of 1 and 0.5 s" in capsys.readouterr().out
    args = Namespace(questions=8, clip_seconds=[10.0], max_new_tokens=6)
    report = bench_eval.report(args, {"plain": [8.0, 9.0, 4.0], "ours": [4.0, 2.0, 1.0]}, 8).splitlines()
    assert report[2].split()[1:] == ["8.00", "s", "1.00", "questions/s"] and report[4].split()[3] == "4.00"


def test_train(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "train", "--clip_seconds", "1", "--rounds", "1", "--max_new_tokens", "4")
    assert result["clips"][0]["rounds"][0].keys() == {"reference", "train"}
    found = {"rounds": [{"reference": 1.0, "train": 4.0}], "flops": {"sample": 1, "reference": 5e11, "train": 1e12}}
    _, train, reference, _ = bench_speed.train_report(found, rate=1e12).splitlines()
    assert train.split()[-4:] == "4.000 1.000 0.250 25.0%".split()
    assert reference.split()[-4:] == "1.000 0.500 0.500 50.0%".split()
    assert "recomputing layers: no" in capsys.readouterr().out


def test_scale(on_the_tiny_model, monkeypatch, capsys, tmp_path):
    sizes = {"group_size": (2, 4), "clip_seconds": (0.5, 1), "max_new_tokens": (2, 4), "prompts_per_rank": (1, 2)}
    monkeypatch.setattr(bench_scale, "SIZES", sizes)
    words = "--clip_seconds 1 --group_size 4 --max_new_tokens 3 --rounds 1".split()
    result = run(monkeypatch, "scale", *words)
    assert {name: [point["size"] for point in curve] for name, curve in result["curves"].items()} == {
        "group_size": [2, 4], "clip_seconds": [0.5, 1], "max_new_tokens": [2, 3, 4], "prompts_per_rank": [1, 2],
    }  # fmt: skip
    here = [result["curves"][name][1]["seconds"] for name in sizes]
    assert here[0] == here[1] == here[2] == here[3] and here[0].keys() == {*bench_speed.PHASES}  # measured once
    assert (tmp_path / "docs" / "bench_scale.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"  {label}: " in printed for label in bench_scale.LABELS.values())


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ([], "arguments are required"),
        (["step", "--clip_seconds", "10", "31"], "--clip_seconds must be at most 30, not 31.0"),
        (["sample", "--max_new_tokens", "9"], "--max_new_tokens must be at least 10"),
        (["scale", "--rounds", "0"], "--rounds must be"),
        (["train", "--gpus", "8"], "unrecognized arguments"),
        (["eval", "--questions", "0"], "--questions must be"),
        (["--memory", "--gpus", "0"], "--gpus"),
        (["--memory", "--accumulation_steps", "3"], "--accumulation_steps"),
        (["--memory", "--clip_seconds", "31"], "--clip_seconds"),
        (["--memory", "--max_new_tokens", "0"], "--max_new_tokens"),
    ],
)
def test_settings_that_cannot_be(wrong, complaint, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(wrong)
    assert complaint in capsys.readouterr().err
