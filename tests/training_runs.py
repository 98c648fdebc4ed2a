"""Start training runs, kill them, and compare their run folders."""

import json
import os
import re
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

QUESTIONS, BATCH, STEPS = 5, 4, 8  # 5 is no multiple of 4: epochs begin within steps
FLAGS = {"model": "base", "data": "questions.jsonl", "steps": STEPS, "save_every": 2, "prompts_per_rank": 2,
         "accumulation_steps": 2, "max_new_tokens": 8, "lr": 1e-3, "log_completions_every": 1,
         "heldout": "questions.jsonl", "heldout_every": 3}  # fmt: skip

# ---- commands that a test may kill ----


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(pid):
    """Return the ids of a process and all its descendants, without dead ones.

    A process group would not do: torchrun's workers lead groups of their own.
    """
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
    """Return a value that changes when the file is rewritten; None if there is no file."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns


class Start:
    """Start a training script in `folder` with FLAGS and the given flags; by default through torchrun on 2 ranks.

    Use it in a `with`: it kills all its processes at the end, whatever happens.
    """

    def __init__(self, folder, out, *switches, script="grpo_aqa.py", ranks=2, torchrun=("--standalone",), **flags):
        launcher = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={ranks}"] if torchrun else []
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
        """Return how many steps this start has added to metrics.jsonl."""
        if version(self.out / "config.json") == self.config_before:
            return 0  # the file may still hold lines that a resume will drop
        return len(lines(self.out / "metrics.jsonl")) - self.step_before

    def wait_until(self, condition):
        """Wait until the condition holds. Fails if the command ends first, or after 90 seconds."""
        deadline = time.monotonic() + 90
        while not condition():
            ended = "hangs" if time.monotonic() > deadline else self.process.poll()
            assert ended is None, f"{ended}: {self.printed()} {self.errors()[-3000:]}"
            time.sleep(0.001)

    def workers(self):
        """Return the process ids of torchrun's workers, in the order of their ranks."""
        self.known = sorted(family(self.process.pid)[1:])
        return self.known

    def kill(self):
        """Kill all its processes at once with SIGKILL, as if the machine went down."""
        if self.process.poll() is None:
            send(signal.SIGSTOP, [self.process.pid, *self.known])  # so that none works or starts another meanwhile
            doomed = [self.process.pid, *self.workers()]
            send(signal.SIGKILL, doomed)
            self.process.wait()
            while any(family(pid) for pid in doomed):
                time.sleep(0.01)

    def finish(self, code=0):
        """Wait for its end, check its exit status and return what it printed."""
        assert self.process.wait(timeout=300) == code, f"{self.printed()} {self.errors()[-3000:]}"
        return self.printed()


def finish(*args, **kwargs):
    """Run a training script, require exit status 0 and return what it printed."""
    with Start(*args, **kwargs) as start:
        return start.finish()


@contextmanager
def killed_in(module, name):
    """Make a function raise KeyboardInterrupt inside the `with`. The exception stands in for a kill of the process."""

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, killed)
        yield


# ---- reading a run folder ----


def lines(path):
    """Return the complete lines of a file; none if there is no file."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    return []


def names(folder):
    return [path.name for path in step_folders(folder)]


def state(out):
    """Return the step after which --resume would continue; 0 if the run would start from the beginning."""
    return int(names(out / "resume")[-1].removeprefix("step_")) if names(out / "resume") else 0


def metrics(out):
    """Read metrics.jsonl without the fields in which equal runs differ: times and memory."""
    records = [json.loads(line) for line in lines(out / "metrics.jsonl")]
    differ = re.compile("seconds|peak_memory_gb|tokens_per_second")
    return [{name: value for name, value in m.items() if not differ.match(name)} for m in records]


def snapshot(folder):
    """Return path -> (modification time, content) of all files but unfinished saves, audio headers and the owner."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".unfinished" not in str(path)]
    files = [path for path in files if path.name not in ("audio_headers.json", "owner.json")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- comparing runs ----


def assert_same_weights(folder, expected):
    [file] = [path.name for path in expected.glob("*model.safetensors")]  # a model's or an adapter's
    weights, expected = load_file(folder / file), load_file(expected / file)
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def assert_same_run(out, expected):
    """Require that two run folders hold the same run to the last bit, and that no unfinished file is left."""
    assert metrics(out) == metrics(expected)
    assert lines(out / "completions.jsonl") == lines(expected / "completions.jsonl")
    assert names(out) == names(expected)
    for name in names(out):
        assert_same_weights(out / name, expected / name)
    assert list(out.rglob("*.unfinished")) == []
    assert [path.name for path in (out / "resume").iterdir()] == [names(expected)[-1]]


# ---- one uninterrupted run ----


def make_runs(folder):
    """Write base/, questions.jsonl and reference/, a complete run on 2 ranks, to a folder."""
    rng, records = np.random.default_rng(0), []
    for i in range(QUESTIONS):
        soundfile.write(folder / f"{i}.wav", 0.3 * rng.normal(size=4800 + 1600 * i).clip(-3, 3), 16_000)
        records.append({"audio": f"{i}.wav", "question": f"What is sound {i}?", "choices": ["rain", "a bell"],
                        "answer": ["rain", "a bell"][i % 2]})  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run_processes(make_base, (folder,), nprocs=1)
    finish(folder, "reference")


def make_base(rank, folder):
    """Write a tiny, nearly random model. Some of its completions earn a reward and some do not: so a run can learn."""
    torch.set_num_threads(1)
    os.chdir(folder)
    toy_model.make_base(load_questions("questions.jsonl"), Path("base"), steps=45, random_answers=1.0, seed=0)
