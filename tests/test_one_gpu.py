"""bench.py gpu: parts that fail, hang or die; results files and their table. The parts here are stubs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import one_gpu
from benchmarks.models import save_line
from infra.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

# ---- stubs of parts ----


def works(tiny, save):
    save(first=1.5)
    save_line(save, "rate", 2345.67, "GB/s", "goal 3000")
    assert tiny and not torch.backends.cuda.cudnn_sdp_enabled()


def fails(tiny, save):
    save(found=2)
    raise ValueError("no luck")


def continues(tiny, save):
    save(errors={"one": "ValueError: no luck"})
    save(other=3)


def dies(tiny, save):
    os._exit(3)


def hangs(tiny, save):
    save(child=subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
    time.sleep(600)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run stubs as the parts of `bench.py gpu --tiny`. Returns results by part, and the exit status."""
    before = signal.getsignal(signal.SIGTERM)
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")  # which restores it

    def run(*parts):
        monkeypatch.setattr(one_gpu, "PARTS", {part.__name__: (part, 60) for part in parts})
        names = [part.__name__ for part in parts]
        monkeypatch.setattr(bench, "PARTS", names)
        status = None
        try:
            one_gpu.bench_gpu(bench.parse_args(["gpu", "--tiny", "--out", str(tmp_path), "--parts", *names]))
        except SystemExit as end:
            status = end.code
        return {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}, status

    yield run
    signal.signal(signal.SIGTERM, before)


# ---- the command ----


def test_a_part_that_fails_leaves_its_values_and_the_next_one_runs(run, capsys):
    results, status = run(fails, continues, dies, works)
    assert status == "bench.py: failed: fails, continues, dies"
    assert {name: result["error"] for name, result in results.items()} == {
        "fails": "ValueError: no luck",
        "continues": "RuntimeError: failed: one",
        "dies": "ended with status 3",
        "works": None,
    }
    assert [results[name]["values"] for name in ("fails", "dies")] == [{"found": 2}, {}]
    assert results["continues"]["values"]["other"] == 3
    assert results["works"]["values"]["rate"] == {"value": 2345.67, "unit": "GB/s", "remark": "goal 3000"}
    assert {"machine", "torch", "transformers", "date", "tiny", "seconds"} <= results["works"].keys()
    table = capsys.readouterr().out  # of this process; the parts print through the fork server's output
    assert "FAILED: ValueError: no luck" in table and "2345.7 GB/s     goal 3000" in table


def test_a_part_that_hangs_is_ended_with_its_children(run, monkeypatch, tmp_path):
    start = one_gpu.start

    def start_and_wait(*args):
        """Start a process, and wait until it has saved a value: the limit, 0 s, begins then."""
        process, path = start(*args), args[-1]
        while not path.exists():
            time.sleep(0.01)
        return process

    monkeypatch.setattr(one_gpu, "start", start_and_wait)
    monkeypatch.setattr(one_gpu, "TINY_LIMIT", 0)
    results, status = run(hangs)
    assert status == "bench.py: failed: hangs" and results["hangs"]["error"] == "ended at its time limit of 0 s"
    stat = Path(f"/proc/{results['hangs']['values']['child']}/stat")
    for _ in range(500):  # the kernel takes a moment; Z: a zombie that nobody has collected
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the child is still running")


def test_without_a_gpu_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch finds none; --tiny"):
        one_gpu.bench_gpu(bench.parse_args(["gpu", "--out", str(tmp_path / "new")]))
    assert not (tmp_path / "new").exists()


def test_table_is_made_of_the_files_in_the_folder(tmp_path):
    values = {
        "copies": {"value": 4.284, "unit": "TB/s", "remark": "much"},
        "by_dtype": {"float_32": 1e-7, "bfloat16": {"logprobs": 0.5}},
        "rounds": [{"few": 2, "rate": 12345.678}, "text"],
        "equal": True,
    }
    about = {"machine": "A card", "torch": "2.11", "transformers": "5", "date": "today", "seconds": 12.3}
    (tmp_path / "card.json").write_text(json.dumps(about | {"error": None, "values": values}))
    (tmp_path / "step.json").write_text(json.dumps({"error": "no luck", "values": {}}))
    lines = one_gpu.table(tmp_path).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "card: A card, 12 s, torch 2.11, transformers 5, date today",
        "copies 4.284 TB/s much",
        "by dtype, float 32 1e-07",
        "by dtype, bfloat16, logprobs 0.5",
        "rounds 1: few 2, rate 12345.7",
        "rounds 2: text",
        "equal True",
        "fidelity: no results",
        "memory: no results",
        "decode: no results",
        "train: no results",
        "step: no machine, 0 s",
        "FAILED: no luck",
    ]


@pytest.mark.slow
def test_all_parts_on_the_cpu(tmp_path):
    """The whole command, with the small model."""
    command = [sys.executable, str(ROOT / "bench.py"), "gpu", "--tiny", "--out", str(tmp_path / "results")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = ended.stdout[ended.stdout.rindex("\ncard: ") :]
    for line in (
        "cuDNN's attention on",
        "key lengths with NaN gradients, cuDNN's attention off",
        "peak, accumulation steps 1",
        "floor / decode step, graphs on",
        "decode step: kernel 12",
        "train, accumulation steps 1, checkpointing off",
        "both passes, accumulation steps 1, checkpointing on: kernel 12",
        "plain / ours, clips of 30 s",
        "update: AdamW",
    ):
        assert f"\n  {line}" in table
    assert "FAILED" not in table and "no results" not in table
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {*one_gpu.PARTS}
