"""Training runs in the tests: processes of their own that may be killed, and what they leave, compared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from forked import ENVIRONMENT, ROOT, run_processes
from safetensors.torch import load_file

from data import load_questions
from training import toy_model
from training.run_folder import step_folders

QUESTIONS, BATCH, STEPS = 5, 4, 8  # the batch does not divide the questions, so epochs begin within steps
FLAGS = {"model": "base", "data": "questions.jsonl", "steps": STEPS, "save_every": 2, "prompts_per_rank": 2,
         "accumulation_steps": 2, "max_new_tokens": 8, "lr": 1e-3, "log_completions_every": 1}  # fmt: skip

# ---- commands that may be killed ----


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """The ids of a process and of all that descend from it, dead ones left out. torchrun's workers lead own groups."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    found, living = [pid], {int(child): int(parent) for child, parent, state in rows if not state.startswith("Z")}
    for ancestor in found:
        found += [child for child, parent in living.items() if parent == ancestor]
    return [pid for pid in found if pid in living]


def send(signal_number, pids):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def version(path):
    """Something that differs once a file has been written anew; None while there is no such file."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns


class Start:
    """A training script, started in `folder` with FLAGS and what is given beside them; through torchrun on 2 processes.

    Use it in a `with`: whatever happens, none of its processes survives that.
    """

    def __init__(self, folder, out, *switches, script="grpo_aqa.py", processes=2, torchrun=("--standalone",), **flags):
        launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={processes}"] if torchrun else []
        given = [f"--{name}={value}" for name, value in (FLAGS | flags | {"out": out}).items() if value is not None]
        self.out, self.known, self.config_before = folder / out, [], version(folder / out / "config.json")
        self.step_before = state(folder / out) if self.config_before and "--resume" in switches else 0
        logs = folder / "logs" / f"{out}_{time.monotonic_ns()}"
        logs.parent.mkdir(exist_ok=True)
        self.printed_to, self.errors_to = logs.with_suffix(".out"), logs.with_suffix(".err")
        with open(self.printed_to, "w") as stdout, open(self.errors_to, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / script), *given, *switches],
                cwd=folder, env=os.environ | ENVIRONMENT, stdout=stdout, stderr=stderr,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    def printed(self):
        return self.printed_to.read_text()

    def errors(self):
        return self.errors_to.read_text()

    def new_steps(self):
        """How many steps this start has added to metrics.jsonl."""
        if version(self.out / "config.json") == self.config_before:
            return 0  # the file may still hold what is going to be dropped
        return len(lines(self.out / "metrics.jsonl")) - self.step_before

    def wait_until(self, condition):
        """Return as soon as the condition holds, which it has to before the command ends or hangs."""
        deadline = time.monotonic() + 90
        while not condition():
            ended = "hangs" if time.monotonic() > deadline else self.process.poll()
            assert ended is None, f"{ended}: {self.printed()} {self.errors()[-3000:]}"
            time.sleep(0.001)

    def workers(self):
        """The ids of the training processes that torchrun has started, in the order of their ranks."""
        self.known = sorted(family(self.process.pid)[1:])
        return self.known

    def kill(self):
        """SIGKILL for all of its processes at once, as when a machine goes down."""
        if self.process.poll() is None:
            send(signal.SIGSTOP, [self.process.pid, *self.known])  # so that none does or starts anything meanwhile
            doomed = [self.process.pid, *self.workers()]
            send(signal.SIGKILL, doomed)
            self.process.wait()
            while any(family(pid) for pid in doomed):
                time.sleep(0.01)

    def finish(self, code=0):
        """Wait for its end. Returns what it printed."""
        assert self.process.wait(timeout=300) == code, f"{self.printed()} {self.errors()[-3000:]}"
        return self.printed()


def finish(*args, **kwargs):
    """Start a training script and wait for its good end. Returns what it printed."""
    with Start(*args, **kwargs) as start:
        return start.finish()


@contextmanager
def killed_in(module, name):
    """Inside `with`, the process is killed when it calls that function, as far as an exception can stand in for it."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, killed)
        yield


# ---- what a run folder holds ----


def lines(path):
    """The complete lines of a file; none while there is no such file."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    return []


def names(folder):
    return [path.name for path in step_folders(folder)]


def state(out):
    """The step after which a run would continue; 0 if it would start anew."""
    return int(names(out / "resume")[-1].removeprefix("step_")) if names(out / "resume") else 0


def metrics(out):
    """metrics.jsonl without what may differ between two equal runs."""
    records = [json.loads(line) for line in lines(out / "metrics.jsonl")]
    return [{k: v for k, v in m.items() if not k.startswith("seconds") and k != "peak_memory_gb"} for m in records]


def snapshot(folder):
    """Every file with its content and the time of its last change, but what a save left unfinished, and the cache of
    what is known about clips."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".unfinished" not in str(path)]
    files = [path for path in files if path.name != "audio_headers.json"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- comparing runs ----


def assert_same_weights(folder, expected):
    [file] = [path.name for path in expected.glob("*model.safetensors")]  # a model's or an adapter's
    weights, expected = load_file(folder / file), load_file(expected / file)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def assert_same_run(out, expected):
    """Two run folders hold the same run to the last bit, and nothing unfinished is left over."""
    assert metrics(out) == metrics(expected)
    assert lines(out / "completions.jsonl") == lines(expected / "completions.jsonl")
    assert names(out) == names(expected)
    for name in names(out):
        assert_same_weights(out / name, expected / name)
    assert list(out.rglob("*.unfinished")) == []
    assert [path.name for path in (out / "resume").iterdir()] == [names(expected)[-1]]


# ---- one uninterrupted run ----


def make_runs(folder):
    """A folder with base/, questions.jsonl and a whole run of 2 processes in reference/."""
    rng, records = np.random.default_rng(0), []
    for i in range(QUESTIONS):
        soundfile.write(folder / f"{i}.wav", 0.3 * rng.normal(size=4800 + 1600 * i).clip(-3, 3), 16_000)
        records.append({"audio": f"{i}.wav", "question": f"What is sound {i}?", "choices": ["rain", "a bell"],
                        "answer": ["rain", "a bell"][i % 2]})  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_processes(make_base, (folder,), nprocs=1)
    finish(folder, "reference")


def make_base(rank, folder):
    """Tiny and nearly random, yet so that some completions earn a reward and others none: else nothing would be
    learned."""
    torch.set_num_threads(1)
    os.chdir(folder)
    toy_model.make_base(load_questions("questions.jsonl"), Path("base"), steps=45, random_answers=1.0, seed=0)
