"""Parts of bench.py gpu: kernels are counted; memory that runs out is a result. All parts: tests/test_one_gpu.py."""

from functools import partial

import pytest
import torch

from benchmarks import gpu_parts, speed
from infra.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def saved():
    """The values that save(name=value, ...) has saved, by name."""
    return {}


@pytest.fixture
def save(saved):
    return lambda **values: saved.update(values)


def test_kernels_are_counted(save, saved):
    """Ranges of time that a program names, as DistributedDataParallel does, are no kernels."""
    a, b = torch.ones(64, 64), torch.ones(64)

    def work():
        with torch.profiler.record_function("a range"):
            for _ in range(6):
                a @ a
                torch.exp(b)

    gpu_parts.save_kernels(save, "work", work, CPU, passes=3)
    lines = [line.split() for line in saved["work: kernel"]]  # such as: 0.046 ms 2 x aten::mm
    numbers = {name: float(number) for _, _, number, _, name in lines}
    assert numbers["aten::mm"] == numbers["aten::exp"] == 2 and "a" not in numbers
    assert saved["work: kernels"] == {"value": sum(numbers.values()), "unit": "", "remark": "0 launches"}
    assert sum(float(line[0]) for line in lines) == pytest.approx(saved["work: sum of kernels"]["value"], abs=0.01)


def test_memory_that_runs_out_is_a_result(save, saved):
    for error in (torch.OutOfMemoryError("CUDA out of memory."), InputError("out of GPU memory in phase 'train'")):
        with gpu_parts.noting_full_memory(save, "a step"):
            raise error
        assert saved.pop("a step") == {"value": "out of memory", "unit": "", "remark": str(error)}
    with pytest.raises(InputError), gpu_parts.noting_full_memory(save, "a step"):
        raise InputError("no such file")


def test_a_plain_step_without_memory_does_not_lose_the_rest(save, saved, monkeypatch):
    taken = []

    def step(way, clip_seconds):
        taken.append((way, clip_seconds * 15))
        if taken[-1] == ("plain", 30):
            raise InputError("out of GPU memory in phase 'train'")
        return dict.fromkeys(speed.PHASES, 4.0 if way == "plain" else 1.0)

    both = lambda rank, clip_seconds, args: {way: partial(step, way, clip_seconds) for way in ("plain", "ours")}  # noqa: E731
    monkeypatch.setattr(gpu_parts, "both_ways", both)
    gpu_parts.step_part(True, save)
    assert taken == 2 * [("ours", 10)] + 2 * [("ours", 30)] + 2 * [("plain", 10)] + [("plain", 30)]
    assert saved["step, ours, clips of 30 s"]["value"] == 4 and saved["    update, plain, clips of 10 s"]["value"] == 4
    assert saved["plain / ours, clips of 10 s"]["value"] == 4 and "plain / ours, clips of 30 s" not in saved
    assert saved["plain, clips of 30 s"]["value"] == "out of memory"
    assert {"update: norm", "update: AdamW"} < saved.keys()
