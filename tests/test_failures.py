"""Failures in the middle of a run: one message, all ranks end, and earlier saves stay as they were."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forked import ENVIRONMENT, NO_LOCKS, ROOT, another_owner
from training_runs import metrics

from data import load_questions
from training import toy_model
from training.run_folder import step_folders

FLAGS = {"model": "base", "data": "questions.jsonl", "steps": 6, "save_every": 2, "prompts_per_rank": 2,
         "accumulation_steps": 1, "max_new_tokens": 8, "lr": 1e-3, "log_completions_every": 1}  # fmt: skip

# grpo_aqa.py with a fault in it. The fault may use `rank`; `at`, which calls `do` before each call of a module's
# function once a step is done; and `limit`, which limits the size of files to size() during those calls.
DRIVER = """
import os, resource, sys, time
sys.path.insert(0, {root!r})
sys.argv[0] = "grpo_aqa.py"
import torch, grpo_aqa
from training import run, run_folder
rank, now = int(os.environ.get("RANK", 0)), [0]

def count(self, *args, record=run.Run.record, **kwargs):
    now[0] = self.step  # the step that is being recorded
    return record(self, *args, **kwargs)

run.Run.record = count

def at(step, module, name, do):
    original = getattr(module, name)
    def instead(*args, **kwargs):
        if now[0] >= step:
            kwargs = do(*args, **kwargs) or kwargs
        return original(*args, **kwargs)
    setattr(module, name, instead)

def limit(step, module, name, size):
    original = getattr(module, name)
    def instead(*args, **kwargs):
        if now[0] >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size(), resource.RLIM_INFINITY))
        try:
            return original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    setattr(module, name, instead)

def fail(error):
    def do(*args, **kwargs):
        raise error
    return do

{fault}
sys.exit(grpo_aqa.run_training(grpo_aqa.parse_args(), "grpo_aqa.py", "GRPO", grpo_aqa.train))
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a tiny model and questions about six clips."""
    folder = tmp_path_factory.mktemp("failures")
    rng = np.random.default_rng(0)
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.normal(size=8_000), 16_000)
    records = [{"id": f"q{i}", "audio": f"{i}.wav", "question": "What?", "choices": ["x", "y"], "answer": "x"}
               for i in range(6)]  # fmt: skip
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    model, processor = toy_model.make_model(load_questions(str(folder / "questions.jsonl")), seconds=1, seed=0)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder


def command(out, switches, flags):
    return [*(f"--{name}={value}" for name, value in (FLAGS | flags | {"out": out}).items()), *switches]


def torchrun(home, out, fault, **flags):
    """Run the driver on two ranks to its end. Raises if that takes more than two minutes."""
    driver = home / f"{Path(out).name}_driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), fault=fault))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(driver)]
    started += command(out, (), flags)
    return subprocess.run(started, cwd=home, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120)


def errors(done):
    """Return the lines on stderr that grpo_aqa.py itself has printed."""
    return [line for line in done.stderr.splitlines() if line.startswith("grpo_aqa.py: ")]


# ---- several ranks ----

NO_SPACE = "OSError(28, 'No space left on device')"
FAULTS = {
    "data loading": (
        "if rank == 1: at(3, run, 'to_device', fail(run.InputError('clip 7 is bad')))",
        "error: clip 7 is bad",
    ),
}
MORE_FAULTS = {  # slow
    "a pass through the model, while the other rank waits for no one": (
        "at(3, grpo_aqa, 'sample_group', fail(ValueError('odd shapes')) if rank else lambda *args: time.sleep(300))",
        "error: rank 1: ValueError: odd shapes",
    ),
    "saving a state": (
        f"if rank == 1: at(4, torch, 'save', fail({NO_SPACE}))",
        "rank_1.pt: could not be written ([Errno 28] No space left on device)",
    ),
    "the backward pass": (
        "if rank == 1: at(3, grpo_aqa, 'grpo_loss', fail(ValueError('odd shapes')))",
        "error: rank 1: ValueError: odd shapes",
    ),
    "saving a checkpoint": (
        f"if rank == 0: at(4, run_folder, 'save_checkpoint', fail({NO_SPACE}))",
        "step_000004: could not be written ([Errno 28] No space left on device)",
    ),
    "a rank that is killed": (
        "if rank == 1: at(3, grpo_aqa, 'sample_group', lambda *args, **kwargs: os.kill(os.getpid(), 9))",
        "lost its connection; was another killed?",
    ),
}


@pytest.mark.parametrize("where", [*FAULTS, *(pytest.param(where, marks=pytest.mark.slow) for where in MORE_FAULTS)])
def test_an_error_on_one_rank_ends_all_with_its_message_once(home, where):
    fault, message = (FAULTS | MORE_FAULTS)[where]
    out = re.sub(r"\W+", "_", where)
    done = torchrun(home, out, fault)
    assert done.returncode != 0
    assert len(errors(done)) == 1 and message in errors(done)[0], done.stderr
    # An error in the code, not in the user's input, prints a traceback on its rank alone. torchrun adds its own
    # traceback.
    ours = done.stderr.split("torch/distributed/run.py")[0]
    assert ours.count("Traceback (most recent call last)") - 1 == ("ValueError" in message), done.stderr
    assert [folder.name for folder in step_folders(home / out / "resume")] == ["step_000002"]
    assert step_folders(home / out)[0].name == "step_000002"


# ---- failed writes ----

# what is written: (step after which a function writes files of limited size, the limit, the name in the message)
WRITES = {
    "metrics": ("3, run, 'append_jsonl'", "os.path.getsize('{out}/metrics.jsonl') + 9", "metrics.jsonl"),
    "completions": (
        "3, run, 'log_completions'",
        "os.path.getsize('{out}/completions.jsonl') + 9",
        "completions.jsonl",
    ),
    "a state": ("4, torch, 'save'", "100_000", "rank_0.pt"),
}
MORE_WRITES = {  # slow
    "a checkpoint": ("4, run_folder, 'save_checkpoint'", "100_000", "step_000004"),
    "the curves": ("4, run_folder, 'draw_curves'", "1_000", "curves.png"),
    "the progress within a state": ("4, run_folder, 'write_text'", "10", "resume/step_000004"),
}


@pytest.fixture(scope="module")
def run(home, forker):
    """A function that runs the driver on one rank to its end."""

    def run(out, *switches, fault="", **flags):
        code = DRIVER.format(root=str(ROOT), fault=fault)
        return forker.run(home, ["grpo_aqa.py", *command(out, switches, flags)], code)

    return run


@pytest.fixture(scope="module")
def undisturbed(home, run):
    """The metrics of an undisturbed run, without times and memory."""
    assert run("undisturbed").returncode == 0
    return metrics(home / "undisturbed")


@pytest.mark.parametrize("what", [*WRITES, *(pytest.param(what, marks=pytest.mark.slow) for what in MORE_WRITES)])
def test_a_failed_write_is_named_and_loses_nothing(home, run, undisturbed, what):
    """A limit on the size of files stands in for a full disk. --resume continues once there is space again."""
    place, size, named = (WRITES | MORE_WRITES)[what]
    out = what.replace(" ", "_")
    done = run(out, fault=f"limit({place}, lambda: {size.format(out=out)})")
    assert done.returncode == 1
    assert len(errors(done)) == 1 and "Traceback" not in done.stderr, done.stderr
    assert named in errors(done)[0] and "could not be written" in errors(done)[0]
    assert ("inline_container" if what == "a state" else "File too large") in errors(done)[0]  # torch.save's message
    assert "--resume continues after step 2" in errors(done)[0]
    assert [
        json.loads(line)["step"] for line in (home / out / "metrics.jsonl").read_text().splitlines()
    ]  # no torn line
    assert run(out, "--resume").returncode == 0
    assert metrics(home / out) == undisturbed


def test_an_error_of_the_machine_is_one_line(home, run):
    """For example an error while reading from a disk."""
    done = run("unreadable", fault="at(3, run, 'to_device', fail(OSError(5, 'Input/output error', 'x.wav')))")
    assert done.returncode == 1 and errors(done) == ["grpo_aqa.py: error: [Errno 5] Input/output error: 'x.wav'"]
    assert "Traceback" not in done.stderr


# ---- two jobs with one run folder ----


def test_a_second_job_is_refused_before_it_writes(home, run, forker):
    shared = {name: value for name, value in FLAGS.items() if name != "log_completions_every"}
    sft = [*(f"--{name}={value}" for name, value in shared.items()), "--out=owned/run"]
    with another_owner(home / "owned" / "run" / "owner.json"):
        for done in (run("owned/run"), forker.run(home, ["sft_aqa.py", *sft])):
            assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
            assert "_aqa.py: error: owned/run/owner.json: another job (process " in done.stderr
            assert [path.name for path in (home / "owned" / "run").iterdir()] == ["owner.json"]
    assert not (home / "owned" / "run").exists()


@pytest.mark.slow
def test_without_locks_the_older_job_stops(home, run, undisturbed):
    """All its ranks end, with one line. The newer job's run is like an undisturbed one."""
    slow = NO_LOCKS + "at(2, grpo_aqa, 'sample_group', lambda *args, **kwargs: time.sleep(1))"
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(torchrun, home, "taken", slow, steps=10_000, prompts_per_rank=1)
        while not (home / "taken" / "step_000002").exists():
            assert not older.done(), older.result().stderr
            time.sleep(0.1)
        newer = run("taken", fault=NO_LOCKS)
        assert newer.returncode == 0, newer.stderr
        done = older.result()
    assert done.returncode != 0 and len(errors(done)) == 1, done.stderr
    assert re.search(r"error: taken/owner.json: (another job \(process .* has taken over|was removed)", errors(done)[0])
    assert done.stderr.split("torch/distributed/run.py")[0].count("Traceback") == 1  # torchrun's
    assert metrics(home / "taken") == undisturbed
    assert [folder.name for folder in step_folders(home / "taken" / "earlier_1")] == ["step_000002"]
    assert list((home / "taken").rglob("*owner.json")) == list((home / "taken").rglob("*.unfinished")) == []


# ---- numbers that are not finite, too little memory ----


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run(home, run, ranks):
    """The message names the step, the questions of that rank, and the last saves. The saves stay as they are."""
    fault = (
        "def poison(logprobs, *args, **kwargs):\n    with torch.no_grad(): logprobs.mul_(float('nan'))\n"
        f"if rank == {ranks - 1}: at(3, grpo_aqa, 'grpo_loss', poison)"
    )
    out = f"nan_{ranks}"
    done = run(out, fault=fault) if ranks == 1 else torchrun(home, out, fault)
    assert done.returncode == 1 and len(errors(done)) == 1, done.stderr
    assert re.search(r"error: step 4: the loss is not finite, with the questions q\d, q\d;", errors(done)[0])
    assert f"the last checkpoint is {out}/step_000002, and --resume continues after step 2" in errors(done)[0]
    assert [folder.name for folder in step_folders(home / out)] == ["step_000002"]


@pytest.mark.parametrize(
    "module, name, phase, flag",
    [
        ("grpo_aqa", "sample_group", "sample", "--max_new_tokens"),
        ("grpo_aqa", "completion_logprobs", "reference", "--beta 0"),
        ("grpo_aqa", "accumulate_gradients", "train", "--accumulation_steps"),
        ("grpo_aqa", "clip_scale", "update", "--lora_rank"),
        ("grpo_aqa", "data_parallel", "the start", "--lora_rank"),
    ],
)
def test_running_out_of_memory_names_the_phase_and_a_remedy(home, capsys, monkeypatch, module, name, phase, flag):
    """On one rank, a function that replaces one of grpo_aqa.py raises the error that torch raises on a GPU."""
    import torch

    import grpo_aqa
    from infra import processes

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.chdir(home)
    monkeypatch.setattr(grpo_aqa, name, exhausted)
    monkeypatch.setattr(processes.os, "_exit", lambda status: sys.exit(status))
    flags = [f"--{name}={value}" for name, value in (FLAGS | {"out": f"memory_{name}"}).items()]
    with pytest.raises(SystemExit):
        grpo_aqa.run_training(grpo_aqa.parse_args(flags), "grpo_aqa.py", "GRPO", grpo_aqa.train)
    processes.dist.destroy_process_group()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"grpo_aqa.py: error: out of GPU memory in phase '{phase}': " in last and flag in last and "2.00 GiB" in last


def test_a_gradient_that_is_not_finite_stops_the_run(home, run):
    """The loss is finite, the gradient is not. No weight changes: the run can continue from its state, undisturbed."""
    fault = (
        "def poison(ddp_policy, *args, **kwargs):\n"
        "    weight = next(p for p in ddp_policy.parameters() if p.requires_grad)\n"
        "    weight.register_hook(lambda gradient: gradient * float('inf'))\n"
        "at(3, grpo_aqa, 'accumulate_gradients', poison)\n"
        "def step(*args, **kwargs): raise AssertionError('the optimizer took a step')\n"
        "at(3, grpo_aqa.ShardedAdamW, 'step', step)"
    )
    done = run("infinite", fault=fault)
    assert done.returncode == 1 and len(errors(done)) == 1, done.stderr
    message = r"error: step 4: the norm of the gradient is (inf|nan), with the questions q\d, q\d;"
    assert re.search(message, errors(done)[0])
    assert [folder.name for folder in step_folders(home / "infinite")] == ["step_000002"]


# ---- bad clips that are found during training ----


def test_bad_clips_are_replaced_alike_in_a_resumed_run(home, run):
    """--skip_bad_audio leaves out a clip with a bad header, and replaces a clip with bad samples when it is decoded.
    Both are counted. A kill and a resume change nothing."""
    broken = home / "broken.jsonl"
    lines = (home / "questions.jsonl").read_text().splitlines()
    soundfile.write(home / "silent.wav", np.zeros(8_000), 16_000)
    for line, clip in ((1, "silent.wav"), (4, "gone.wav")):
        lines[line] = json.dumps(json.loads(lines[line]) | {"audio": clip})
    broken.write_text("\n".join(lines))
    done = run("stopped", data="broken.jsonl")
    assert done.returncode == 1 and "1 of 6 questions have no usable clip" in done.stderr
    assert (
        "broken.jsonl, line 5: gone.wav: no audio file" in done.stderr and not (home / "stopped/config.json").exists()
    )

    done = run("skipped", "--skip_bad_audio", data="broken.jsonl")
    assert done.returncode == 0, done.stderr
    assert "1 of 6 questions have no usable clip; going on without them" in done.stdout
    assert done.stdout.count("silent.wav: has only zeros") == 1 and "1 bad clips so far" in done.stdout
    config = json.loads((home / "skipped" / "config.json").read_text())
    assert config["skipped_questions"] == 1 and [*config["bad_clips_met"]] == ["broken.jsonl, line 2"]
    replaced = [record["replaced_questions"] for record in metrics(home / "skipped")]
    assert len(replaced) == 6 and 2 <= sum(replaced) <= 3  # 12 times one of five questions, of which one is bad
    trained = [json.loads(line)["id"] for line in (home / "skipped" / "completions.jsonl").read_text().splitlines()]
    assert "q1" not in trained and "q4" not in trained and set(trained) == {"q0", "q2", "q3", "q5"}

    fault = "at(3, grpo_aqa, 'sample_group', lambda *args, **kwargs: os.kill(os.getpid(), 9))"
    assert run("killed", "--skip_bad_audio", data="broken.jsonl", fault=fault).returncode != 0
    assert run("killed", "--skip_bad_audio", "--resume", data="broken.jsonl").returncode == 0
    assert metrics(home / "killed") == metrics(home / "skipped")
    assert json.loads((home / "killed" / "config.json").read_text())["bad_clips_met"] == config["bad_clips_met"]


def test_a_run_stopped_by_a_bad_clip_goes_on_without_it(home, run):
    """--resume --skip_bad_audio continues from the last state before the bad clip."""
    lines = (home / "questions.jsonl").read_text().splitlines()
    soundfile.write(home / "quiet.wav", np.zeros(8_000), 16_000)
    lines[5] = json.dumps(json.loads(lines[5]) | {"audio": "quiet.wav"})
    (home / "quiet.jsonl").write_text("\n".join(lines))
    done = run("quiet", data="quiet.jsonl", save_every=1)
    assert done.returncode == 1 and "--resume --skip_bad_audio" in errors(done)[0]
    assert re.search(r"error: step \d: quiet.jsonl, line 6: quiet.wav: has only zeros", errors(done)[0])
    assert run("quiet", "--resume", "--skip_bad_audio", data="quiet.jsonl", save_every=1).returncode == 0
    assert [record["step"] for record in metrics(home / "quiet")] == [1, 2, 3, 4, 5, 6]


# ---- long runs ----


@pytest.mark.slow
def test_two_thousand_steps_need_no_more_memory_than_two_hundred(tmp_path):
    """The toy with small groups: from step 200 on, resident memory stays within 5% and the number of open files does
    not grow. All metrics are there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    small = ["--steps", "2000", "--prompts_per_rank", "2", "--group_size", "4", "--max_new_tokens", "12"]
    rare = ["--save_every", "200", "--keep_last", "2", "--heldout_every", "500"]
    command = [sys.executable, str(ROOT / "grpo_aqa.py"), *small, *rare]
    seen = {}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        lines = tmp_path / "runs" / "toy" / "metrics.jsonl"
        while process.poll() is None:
            time.sleep(0.2)
            step = lines.read_bytes().count(b"\n") if lines.exists() else 0
            if step % 250 > 205 and step // 250 not in seen:  # after the first save
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1))
                seen[step // 250] = resident, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert sorted(seen) == list(range(8)), seen
    assert abs(seen[7][0] / seen[0][0] - 1) <= 0.05 and seen[7][1] <= seen[0][1], seen
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 2001))
    assert [record["step"] for record in records if "heldout_accuracy" in record] == [500, 1000, 1500, 2000]
    names = [{name for name in record if "heldout" not in name} for record in records]
    assert all(own == names[0] for own in names) and not any(None in record.values() for record in records)
