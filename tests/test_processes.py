"""Ranks wait for each other and end together, phases are timed, running out of memory is one line."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from forked import ENVIRONMENT, run_processes
from training_runs import free_port

import bench
from infra import processes
from infra.errors import InputError
from infra.processes import (
    LESS_MEMORY,
    START,
    Clock,
    catch_sigterm,
    choose_kernels,
    memory_errors,
    on_rank_0,
    setup_distributed,
)

# ---- join, wait, end ----


@pytest.mark.parametrize("start", [setup_distributed, bench.main])
def test_cudnns_attention_and_tf32_are_off_before_anything_runs(monkeypatch, start):
    """In training and evaluation, which join the ranks first, and in benchmarks."""

    class Chosen(Exception):
        pass

    def stop():
        choose_kernels()
        raise Chosen

    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    for module in (processes, bench):
        monkeypatch.setattr(module, "choose_kernels", stop)
    monkeypatch.setattr("sys.argv", ["bench.py", "memory"])
    with pytest.raises(Chosen):
        start()
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32


def wait_long(rank, start_line, port, folder):
    """Run one of two ranks whose collectives may take 2 s. Rank 0 works for 4 s, then is 4 s late for a collective."""
    os.environ |= ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    start_line.wait()
    setup_distributed(timeout=timedelta(seconds=2))
    done = on_rank_0(lambda: time.sleep(4) or "saved")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    torch.save((done, ones.item()), f"{folder}/after_{rank}.pt")
    if rank == 0:
        time.sleep(4)
    try:
        dist.barrier()
    except RuntimeError as error:
        torch.save(str(error), f"{folder}/failed_{rank}.pt")
    os._exit(0)


def test_a_slow_save_does_not_trip_the_timeout_of_collectives(tmp_path):
    """The others wait for rank 0's work however long it takes, but not for a rank that hangs within a step."""
    run_processes(
        wait_long, (multiprocessing.get_context("forkserver").Barrier(2), free_port(), str(tmp_path)), nprocs=2
    )
    assert [torch.load(tmp_path / f"after_{rank}.pt") for rank in range(2)] == [("saved", 2.0)] * 2
    assert (tmp_path / "failed_1.pt").exists()


def test_the_watcher_ends_before_the_process_group(monkeypatch):
    """Otherwise the interpreter may shut down while the thread is in C++ code, which aborts the process."""
    asking = threading.Event()
    store = SimpleNamespace(check=lambda keys: asking.set() or time.sleep(0.3))  # as slow as over a busy network
    watcher = threading.Thread(target=processes._end_with_the_others, daemon=True)
    for name, value in {"_store": store, "_watcher": watcher, "_finished": threading.Event()}.items():
        monkeypatch.setattr(processes, name, value, raising=False)
    monkeypatch.setattr(processes, "_patient_group", None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    watcher.start()
    assert processes.finish_together("x.py", lambda: asking.wait(timeout=10), interrupted=str) == 0
    assert asking.is_set() and not watcher.is_alive() and not dist.is_initialized()


def test_ctrl_c_prints_what_was_saved(one_rank, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_store", dist.HashStore(), raising=False)
    monkeypatch.setattr(processes.os, "_exit", lambda status: sys.exit(status))
    with pytest.raises(SystemExit) as ended:
        processes.finish_together("x.py", interrupted, interrupted=lambda: "nothing was written")
    assert ended.value.code == 130 and capsys.readouterr().err == "x.py: interrupted; nothing was written\n"


@pytest.mark.parametrize("other", ["cpu", "cuda"])
def test_ranks_with_and_without_a_gpu_do_not_wait_for_each_other(monkeypatch, capsys, other):
    store = dist.HashStore()
    monkeypatch.setattr(processes, "_store", store, raising=False)
    monkeypatch.setattr(processes.os, "_exit", lambda status: sys.exit(status))
    store.set("device/1", other)
    if other == "cpu":
        return processes._require_same_device(0, 2, torch.device("cpu"))
    for spoken in (1, 0):
        with pytest.raises(SystemExit):
            processes._require_same_device(0, 2, torch.device("cpu"))
        said = capsys.readouterr().err
        assert said.count("\n") == spoken and ("no GPU for rank 0, " in said) == bool(spoken)


def test_ranks_that_share_a_gpu_are_refused(one_rank, monkeypatch):
    """Every run but the toy's calls this check."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for gpus in (0, 8):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        processes.require_gpu_each()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    with pytest.raises(InputError, match="^8 ranks, but 7 GPU.*--nproc_per_node.*CUDA_VISIBLE_DEVICES="):
        processes.require_gpu_each()


def test_sigterm_sets_an_event_and_ends_nothing():
    handler = signal.getsignal(signal.SIGTERM)
    try:
        announced = catch_sigterm()
        assert not announced.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert announced.wait(timeout=10)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_launchers_tell_torchruns_apart(one_rank, monkeypatch):
    """By machine, process id and start time. Without torchrun there is none."""
    monkeypatch.setattr(processes, "_launcher", os.getppid())
    assert processes.launchers() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    [one] = processes.launchers()
    assert f":{os.getppid()}:" in one and processes.launchers() == [one]
    monkeypatch.setattr(processes, "_launcher", 1)
    assert processes.launchers() != [one]


# ---- memory ----


@pytest.mark.parametrize("phase", ["sample", "the start"])
@pytest.mark.parametrize("error, where", [
    (MemoryError(), "memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\n to allocate 99 bytes"), "memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU memory"),
    (dist.DistBackendError("NCCL error: unhandled cuda error\n Cuda failure 2 'out of memory'"), "GPU memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU memory"),
])  # fmt: skip
def test_out_of_memory_names_the_phase_and_the_remedy(phase, error, where):
    with pytest.raises(InputError) as raised, memory_errors(phase):
        raise error
    said = str(raised.value)
    assert said.startswith(f"out of {where} in phase '{phase}': {LESS_MEMORY.get(phase, START)}") and "\n" not in said


def test_other_errors_pass_through():
    for error in (RuntimeError("shapes differ"), ValueError("odd")):
        with pytest.raises(type(error), match=str(error)), memory_errors("sample"):
            raise error


# ---- measure ----


def test_a_clock_adds_up_each_phase(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    for phase, seconds in (("data", 1), ("sample", 5), ("data", 2)):
        now[0] += 0.25  # between phases
        with clock(phase):
            now[0] += seconds
    assert clock.phases == {"data": 3, "sample": 5} and clock.total() == 8.75
