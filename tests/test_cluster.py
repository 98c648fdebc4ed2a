"""What happens to a run on a cluster: jobs that are ended early, processes that die, slow disks, several nodes."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_resume import (
    ENVIRONMENT,
    STEPS,
    Start,
    assert_same_run,
    assert_same_weights,
    family,
    finish,
    metrics,
    names,
    state,
    uninterrupted,
)

from runtime import on_rank_0, setup_distributed


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """With base/, questions.jsonl and a whole run of 2 processes in reference/."""
    return uninterrupted(tmp_path_factory.getbasetemp() / "runs_to_resume")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- a job that is ended early ----


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one worker"])
def test_sigterm_saves_and_resume_continues(folder, to):
    """Whoever gets the signal, all ranks stop after the same step, with a state of that step and a message."""
    out = f"ended_{to.replace(' ', '_')}"
    with Start(folder, out, save_every=100) as start:
        start.wait_until(lambda: start.new_steps() >= 2)
        os.kill(start.process.pid if to == "torchrun" else start.workers()[1], signal.SIGTERM)
        start.process.wait(timeout=120)
        printed = start.printed()
    step = state(folder / out)
    assert 2 <= step < STEPS and names(folder / out) == []
    assert [m["step"] for m in metrics(folder / out)] == list(range(1, step + 1))
    assert printed.count(f"SIGTERM: stopped after step {step}; --resume continues from there") == 1
    assert to == "torchrun" or start.process.returncode == 0
    assert "[rank" not in start.errors()  # no worker's traceback; torchrun itself always ends with one
    finish(folder, out, "--resume")
    assert metrics(folder / out) == metrics(folder / "reference")
    assert_same_weights(folder / out / "step_000008", folder / "reference" / "step_000008")


@pytest.mark.slow
def test_dead_workers_are_replaced(folder):
    """torchrun starts all processes again, and they continue from the newest state without being told to."""
    with Start(folder, "restarted", torchrun=("--standalone", "--max_restarts=3")) as start:
        for rank, step in enumerate((2, 4)):
            start.wait_until((folder / "restarted" / "resume" / f"step_{step:06d}").exists)
            os.kill(start.workers()[rank], signal.SIGKILL)
            start.wait_until(lambda: start.printed().count("resuming after step") == rank + 1)
        start.finish()
    assert_same_run(folder / "restarted", folder / "reference")


def test_workers_do_not_outlive_torchrun(folder):
    """They notice at their next step, and leave the folder to whoever resumes the run."""
    with Start(folder, "abandoned", steps=10_000, save_every=10_000) as start:
        start.wait_until(lambda: start.new_steps() >= 2)
        workers = start.workers()
        os.kill(start.process.pid, signal.SIGKILL)
        start.process.wait()
        deadline = time.monotonic() + 60
        while any(family(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(family(worker) for worker in workers)
        assert "torchrun is gone" in start.errors()


# ---- several nodes ----


@pytest.mark.slow
def test_two_nodes_train_like_one(folder):
    """Two torchruns of one process each, on one machine, are one run of two processes."""
    port = free_port()
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x")
    with (
        Start(folder, "nodes", processes=1, torchrun=meet) as one,
        Start(folder, "nodes", processes=1, torchrun=meet) as other,
    ):
        printed = one.finish() + other.finish()
    assert printed.count("metrics, curves and checkpoints: nodes") == 1
    assert_same_run(folder / "nodes", folder / "reference")


# ---- waiting and failing together ----


def wait_long(rank, start_line, port, folder):
    """One of two processes whose collectives may take 2 s: rank 0 works for 4 s, then is as late for a collective."""
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
    """The others wait for rank 0's work as long as it takes; for a rank that hangs within a step they do not."""
    mp.spawn(wait_long, (mp.get_context("spawn").Barrier(2), free_port(), str(tmp_path)), nprocs=2)
    assert [torch.load(tmp_path / f"after_{rank}.pt") for rank in range(2)] == [("saved", 2.0)] * 2
    assert (tmp_path / "failed_1.pt").exists()


def test_a_user_mistake_ends_all_ranks_with_one_line(folder):
    """Found by rank 0 alone, printed once, and no rank is left waiting."""
    with Start(folder, "mistake", data="none.jsonl") as start:
        start.finish(code=1)
    errors = [line for line in start.errors().splitlines() if "error: none.jsonl: no such question file" in line]
    assert errors == ["grpo_aqa.py: error: none.jsonl: no such question file"]
    assert "[rank" not in start.errors() and not (folder / "mistake").exists()
