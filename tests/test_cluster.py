"""Runs on a cluster: jobs that end early, workers that die, several nodes, errors that end all ranks together."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import ENVIRONMENT, ROOT
from training_runs import (
    STEPS,
    Start,
    assert_same_run,
    assert_same_weights,
    family,
    finish,
    free_port,
    metrics,
    names,
    send,
    snapshot,
    state,
)

# ---- jobs that end early ----


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one worker"])
def test_sigterm_saves_and_resume_continues(runs, to):
    """All ranks stop after the same step, save its state and print a message, whichever process got the signal."""
    out = f"ended_{to.replace(' ', '_')}"
    with Start(runs, out, save_every=100) as start:
        start.wait_until(lambda: start.new_steps() >= 2)
        os.kill(start.process.pid if to == "torchrun" else start.workers()[1], signal.SIGTERM)
        start.process.wait(timeout=120)
        printed = start.printed()
    step = state(runs / out)
    assert 2 <= step < STEPS and names(runs / out) == []
    assert [m["step"] for m in metrics(runs / out)] == list(range(1, step + 1))
    assert printed.count(f"SIGTERM: stopped after step {step}; --resume continues from there") == 1
    assert to == "torchrun" or start.process.returncode == 0
    assert "[rank" not in start.errors()  # no traceback of a worker; torchrun always prints its own
    finish(runs, out, "--resume")
    assert metrics(runs / out) == metrics(runs / "reference")
    assert_same_weights(runs / out / "step_000008", runs / "reference" / "step_000008")


@pytest.mark.slow
def test_dead_workers_are_replaced(runs):
    """torchrun starts all ranks again, and they continue from the newest state without --resume."""
    with Start(runs, "restarted", torchrun=("--standalone", "--max_restarts=3")) as start:
        for rank, step in enumerate((2, 4)):
            start.wait_until((runs / "restarted" / "resume" / f"step_{step:06d}").exists)
            os.kill(start.workers()[rank], signal.SIGKILL)
            start.wait_until(lambda: start.printed().count("resuming after step") == rank + 1)
        start.finish()
    assert_same_run(runs / "restarted", runs / "reference")


def test_workers_do_not_outlive_torchrun(runs):
    """Workers notice at their next step that torchrun is gone, and end: a resumed run has the folder for itself."""
    with Start(runs, "abandoned", steps=10_000, save_every=10_000) as start:
        start.wait_until(lambda: start.new_steps() >= 2)
        workers = start.workers()
        os.kill(start.process.pid, signal.SIGKILL)
        start.process.wait()
        deadline = time.monotonic() + 60
        while any(family(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(family(worker) for worker in workers)
        assert "torchrun is gone" in start.errors()


# ---- two jobs with one run folder ----


@pytest.mark.slow
def test_a_second_job_changes_nothing(runs):
    """Both training scripts are refused. Evaluating a finished checkpoint and explain.py are not."""
    out, command = runs / "owned", [sys.executable, str(ROOT / "eval_mmau.py"), "--data=questions.jsonl"]
    with Start(runs, "owned") as first:
        first.wait_until((out / "step_000002").exists)
        send(signal.SIGSTOP, first.workers())
        before = snapshot(out)
        for script, flags in {
            "grpo_aqa.py": {"ranks": 2},
            "sft_aqa.py": {"log_completions_every": None, "ranks": 1, "torchrun": ()},
        }.items():
            with Start(runs, "owned", "--resume", script=script, **flags) as second:
                second.finish(code=1)
            [line] = [line for line in second.errors().splitlines() if "error: " in line and script in line]
            assert "owned/owner.json: another job (process " in line
        assert snapshot(out) == before
        command += ["--ckpt=owned/step_000002", "--max_new_tokens=8", "--out=owned/step_000002/p.json"]
        subprocess.run(command, cwd=runs, env=os.environ | ENVIRONMENT, check=True)
        with Start(runs, "owned", script="explain.py", ranks=1, torchrun=()) as explained:
            assert "What the step did" in explained.finish()
        send(signal.SIGCONT, first.workers())
        first.finish()
    assert_same_run(out, runs / "reference")
    assert list(runs.rglob("owned/**/*owner.json")) == []


# ---- several nodes ----


@pytest.mark.slow
def test_two_nodes_train_like_one(runs):
    """Two torchruns with one rank each, on one machine, make the same run as one torchrun with two ranks."""
    port = free_port()
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x")
    with (
        Start(runs, "nodes", ranks=1, torchrun=meet) as one,
        Start(runs, "nodes", ranks=1, torchrun=meet) as other,
    ):
        printed = one.finish() + other.finish()
    assert printed.count("metrics, curves and checkpoints: nodes") == 1
    assert_same_run(runs / "nodes", runs / "reference")


# ---- ending together ----


def test_a_user_mistake_ends_all_ranks_with_one_line(runs):
    """Rank 0 alone finds the mistake. The line is printed once, and no rank is left waiting."""
    with Start(runs, "mistake", data="none.jsonl") as start:
        start.finish(code=1)
    errors = [line for line in start.errors().splitlines() if "error: none.jsonl: no such question file" in line]
    assert errors == ["grpo_aqa.py: error: none.jsonl: no such question file"]
    assert "[rank" not in start.errors() and not (runs / "mistake").exists()
