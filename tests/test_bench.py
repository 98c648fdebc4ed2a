"""bench.py: step, sample, train and scale as commands, on a tiny model; wrong settings. No times."""

import json

import pytest
import torch

import bench
from benchmarks import models, scale, speed

CPU = torch.device("cpu")


@pytest.fixture
def on_the_tiny_model(config, monkeypatch, tmp_path):
    """Benchmark the tiny model in an empty folder, with round numbers for the speed of the machine."""
    monkeypatch.setattr(speed, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(scale, "hardware", lambda: (config, torch.float32, CPU, 1))
    monkeypatch.setattr(speed, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(models, "machine_name", lambda: "Some(R) CPU, 2 cores")
    monkeypatch.chdir(tmp_path)


def run(monkeypatch, *words) -> dict:
    """Run bench.py. Return the content of its results file."""
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
            assert [list(seconds) for seconds in clip["rounds"][way]] == 2 * [list(speed.PHASES)]
            assert all(seconds > 0 for times in clip["rounds"][way] for seconds in times.values())
        assert 0 < 1.5 * clip["beside_gb"]["ours"] < clip["beside_gb"]["plain"]
    assert printed.count("plain / ours") == 2


def test_sample(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "sample", "--clip_seconds", "1", "--rounds", "2", "--max_new_tokens", "10")
    assert result["clips"][0]["lengths"] == [1, 2, 10] and len(result["clips"][0]["rounds"]) == 2
    assert "decode step, a token of each of 16" in capsys.readouterr().out


def test_train(on_the_tiny_model, monkeypatch, capsys):
    result = run(monkeypatch, "train", "--clip_seconds", "1", "--rounds", "1", "--max_new_tokens", "4")
    assert result["clips"][0]["rounds"][0].keys() == {"reference", "train"}
    assert "recomputing layers: no" in capsys.readouterr().out


def test_scale(on_the_tiny_model, monkeypatch, capsys, tmp_path):
    sizes = {"group_size": (2, 4), "clip_seconds": (0.5, 1), "max_new_tokens": (2, 4), "prompts_per_rank": (1, 2)}
    monkeypatch.setattr(scale, "SIZES", sizes)
    words = "--clip_seconds 1 --group_size 4 --max_new_tokens 3 --rounds 1".split()
    result = run(monkeypatch, "scale", *words)
    assert {name: [point["size"] for point in curve] for name, curve in result["curves"].items()} == {
        "group_size": [2, 4], "clip_seconds": [0.5, 1], "max_new_tokens": [2, 3, 4], "prompts_per_rank": [1, 2],
    }  # fmt: skip
    here = [result["curves"][name][1]["seconds"] for name in sizes]
    assert here[0] == here[1] == here[2] == here[3] and here[0].keys() == {*speed.PHASES}  # measured once
    assert (tmp_path / "docs" / "bench_scale.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"\n  {label}  " in printed for label in scale.LABELS.values())


@pytest.mark.parametrize(
    "wrong, complaint",
    [
        ([], "arguments are required"),
        (["step", "--clip_seconds", "10", "31"], "--clip_seconds must be at most 30, not 31.0"),
        (["sample", "--max_new_tokens", "9"], "--max_new_tokens must be at least 10"),
        (["scale", "--rounds", "0"], "--rounds must be"),
        (["train", "--gpus", "8"], "unrecognized arguments"),
        (["eval", "--questions", "0"], "--questions must be"),
        (["memory", "--gpus", "0"], "--gpus"),
        (["memory", "--accumulation_steps", "3"], "--accumulation_steps"),
        (["memory", "--clip_seconds", "31"], "--clip_seconds"),
        (["memory", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["gpu", "--parts", "card", "speed"], "invalid choice: 'speed'"),
        (["gpu", "--rounds", "2"], "unrecognized arguments"),
    ],
)
def test_wrong_settings(wrong, complaint, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args(wrong)
    assert complaint in capsys.readouterr().err
