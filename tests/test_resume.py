"""A run that is killed and resumed is the run that was never killed: metrics, completions and weights, bit for bit."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

import checkpoint
from checkpoint import find_state, load_state, open_run, save_checkpoint, save_run, save_state
from data import step_indices
from errors import InputError
from files import remove, step_folders
from metrics import cut_jsonl
from optimizer import ShardedAdamW
from policy import load_policy

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS, BATCH, STEPS = 5, 4, 8  # the batch does not divide the questions, so epochs begin within steps
FLAGS = {"model": "base", "data": "questions.jsonl", "steps": STEPS, "save_every": 2, "prompts_per_rank": 2,
         "accumulation_steps": 2, "max_new_tokens": 8, "lr": 1e-3, "log_completions_every": 1}  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # the same sums every time

# ---- commands that may be killed ----


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


# ---- comparing runs ----


def metrics(out):
    """metrics.jsonl without what may differ between two equal runs."""
    records = [json.loads(line) for line in lines(out / "metrics.jsonl")]
    return [{k: v for k, v in m.items() if not k.startswith("seconds") and k != "peak_memory_gb"} for m in records]


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


def snapshot(folder):
    """Every file with its content and the time of its last change, but what a save left unfinished, and the cache of
    what is known about clips."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".unfinished" not in str(path)]
    files = [path for path in files if path.name != "audio_headers.json"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- one uninterrupted run, and one that was killed in the middle ----


@functools.cache
def uninterrupted(folder):
    """A folder with base/, questions.jsonl and a whole run of 2 processes in reference/, made once for all tests."""
    folder.mkdir()
    rng, records = np.random.default_rng(0), []
    for i in range(QUESTIONS):
        soundfile.write(folder / f"{i}.wav", 0.3 * rng.normal(size=4800 + 1600 * i).clip(-3, 3), 16_000)
        records.append({"audio": f"{i}.wav", "question": f"What is sound {i}?", "choices": ["rain", "a bell"],
                        "answer": ["rain", "a bell"][i % 2]})  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    # Tiny and nearly random, yet so that some completions earn a reward and others none: else nothing would be learned.
    make = "import toy, data, pathlib; questions = data.load_questions('questions.jsonl'); " \
           "toy.make_base(questions, pathlib.Path('base'), steps=45, random_answers=1.0, seed=0)"  # fmt: skip
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", make], cwd=folder, env=environment, check=True, capture_output=True)
    finish(folder, "reference")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return uninterrupted(tmp_path_factory.getbasetemp() / "runs_to_resume")


@pytest.fixture(scope="session")
def killed(folder):
    """A run of 2 processes that was killed soon after its state of step 4, with a later step and half a line."""
    with Start(folder, "killed") as start:
        start.wait_until((folder / "killed" / "resume" / "step_000004").exists)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(folder / "killed" / name, "a") as file:
            file.write("\n".join(['{"step": 7}', '{"step": 7, "lo']))
    return folder / "killed"


def test_the_reference_learns(folder):
    """Else every comparison below would be one of weights that never moved."""
    assert sum(m["grad_norm"] > 0.1 and m["equal_reward_groups"] < 1 for m in metrics(folder / "reference")) >= 6
    initial = load_file(folder / "base" / "model.safetensors")
    trained = load_file(folder / "reference" / f"step_{STEPS:06d}" / "model.safetensors")
    moved = [name for name in trained if not torch.equal(trained[name], initial[name])]
    assert len(moved) >= len(trained) - 1  # all but the audio tower's fixed positions


# ---- the kill test ----


def kill_and_resume(folder, out, steps, kills, startup, most):
    """Kill a run in each of the ways in `kills`, resume it each time, and let it end. Returns how many hit a save.

    startup: the seconds until a run's first step, for kills before it. most: of the random numbers of steps after which
    the other kills come.
    """
    saves_hit = 0
    for number, kind in enumerate(kills):
        with Start(folder, out, *(["--resume"] if number else []), steps=steps) as start:
            if kind == "starting":
                time.sleep(random.uniform(0, startup))
            else:
                wanted = random.randint(1, most)
                start.wait_until(lambda: start.new_steps() >= wanted)
            if kind == "training":
                time.sleep(random.uniform(0, 0.3))  # one or two steps, or a save
            if kind == "saving":
                pattern = random.choice(["step_*.unfinished", "resume/step_*.unfinished"])
                start.workers()
                start.wait_until(lambda: any((folder / out).glob(pattern)))
            assert start.process.poll() is None, f"over before kill {number} ({kind})"
            start.kill()
        saves_hit += any((folder / out).rglob("*.unfinished"))
    finish(folder, out, "--resume", steps=steps)
    return saves_hit


def seconds_to_first_step(folder, out, **flags):
    """The time that a whole run takes until its first step is done."""
    began = time.perf_counter()
    with Start(folder, out, **flags) as start:
        start.wait_until(lambda: start.new_steps() >= 1)
        seconds = time.perf_counter() - began
        start.finish()
    return seconds


@pytest.mark.slow
def test_twelve_kills_end_like_none(folder):
    """Kills before there is anything to resume from, in training, and in the middle of saves."""
    random.seed(seed := random.randrange(10**6))
    print("random seed", seed)  # shown where the test fails
    steps = 60  # more than twelve starts do before they are killed
    startup = seconds_to_first_step(folder, "long", steps=steps)
    kills = random.sample(["starting"] * 4 + ["training"] * 4 + ["saving"] * 4, 12)
    saves_hit = kill_and_resume(folder, "twelve", steps, kills, startup, most=5)
    assert_same_run(folder / "twelve", folder / "long")
    assert saves_hit >= 2


@pytest.mark.slow
def test_one_process_in_bfloat16(folder):
    """The float32 masters are restored: weights rounded to bfloat16 would lead to another run."""
    flags = dict(processes=1, torchrun=(), dtype="bfloat16")
    with Start(folder, "half", **flags) as whole, Start(folder, "half_killed", **flags) as start:
        start.wait_until((folder / "half_killed" / "resume" / "step_000004").exists)
        start.kill()
        whole.finish()
    assert state(folder / "half_killed") < STEPS
    finish(folder, "half_killed", "--resume", **flags)
    assert_same_run(folder / "half_killed", folder / "half")
    masters = [saved_states(folder / out)[0] for out in ("half_killed", "half")]
    assert all(torch.equal(masters[0][name]["master"], masters[1][name]["master"]) for name in masters[1])
    assert any(not torch.equal(kept["master"], kept["master"].bfloat16().float()) for kept in masters[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft_aqa.py", "grpo_aqa.py"])
def test_an_adapter_with_dropout(folder, script):
    """LoRA in both scripts, with a frozen audio tower: what is dropped after a resume is what would have been."""
    out = script.removesuffix("_aqa.py")
    flags = dict(script=script, processes=1, torchrun=(), lora_rank=4, lora_dropout=0.2)
    if script == "sft_aqa.py":
        flags["log_completions_every"] = None
    switches = ["--freeze_audio_tower"]
    with Start(folder, out, *switches, **flags) as whole, Start(folder, f"{out}_killed", *switches, **flags) as start:
        start.wait_until((folder / f"{out}_killed" / "resume" / "step_000004").exists)
        start.kill()
        whole.finish()
    assert state(folder / f"{out}_killed") < STEPS
    finish(folder, f"{out}_killed", "--resume", *switches, **flags)
    assert_same_run(folder / f"{out}_killed", folder / out)
    assert max(m["grad_norm"] for m in metrics(folder / out)) > 0.1
    saved = load_file(folder / out / f"step_{STEPS:06d}" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in saved.items() if ".lora_B." in name)
    assert not any("audio_tower" in name for name in saved)


@pytest.mark.slow
def test_three_processes(folder):
    """The sums over three ranks depend on their order, and so on the order that DistributedDataParallel has learned."""
    with Start(folder, "three", processes=3) as whole:
        whole.finish()
    with Start(folder, "three_killed", processes=3) as start:
        start.wait_until((folder / "three_killed" / "resume" / "step_000004").exists)
        start.kill()
    assert state(folder / "three_killed") < STEPS
    finish(folder, "three_killed", "--resume", processes=3)
    assert_same_run(folder / "three_killed", folder / "three")


# ---- continuing with other processes, other settings, and after an interrupted save ----


@pytest.fixture(scope="session")
def continued(folder, killed):
    """Copies of the killed run, continued side by side: name -> what was printed.

    alone: by one process instead of two. planted: among the remains of interrupted saves, with other save settings.
    """
    for name in ("alone", "planted"):
        shutil.copytree(killed, folder / name)
    for name in ("step_000004", "step_000006", "step_000002.removed", "resume/step_000006", "resume/step_000004"):
        remains = folder / "planted" / f"{name}.unfinished"
        remains.mkdir(exist_ok=True)
        (remains / "rank_0.pt").write_bytes(b"half of it")
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        (folder / "planted" / f"{name}.unfinished").write_text("half of i")
    with (
        Start(folder, "alone", "--resume", processes=1, torchrun=(), prompts_per_rank=BATCH) as alone,
        Start(folder, "planted", "--resume", save_every=1, keep_last=2) as planted,
    ):
        return {"alone": alone.finish(), "planted": planted.finish()}


def test_another_number_of_processes_continues(folder, killed, continued):
    """The steps go on where they were, and so do the questions, each used once per epoch."""
    step, out = state(killed), folder / "alone"
    assert f"resuming after step {step}" in continued["alone"]
    assert [m["step"] for m in metrics(out)] == list(range(1, STEPS + 1))
    assert metrics(out)[:step] == metrics(folder / "reference")[:step]
    assert metrics(out)[step]["kl"] > 0  # of the first step after: the weights are not the base model's
    used = [json.loads(line) for line in lines(out / "completions.jsonl")]
    for later in range(step + 1, STEPS + 1):
        expected = [f"{i}.wav" for i in step_indices(QUESTIONS, BATCH * (later - 1), BATCH, rank=0, seed=0)]
        assert [record["audio"] for record in used if record["step"] == later] == expected
    progress = json.loads((out / "resume" / names(out)[-1] / "progress.json").read_text())
    assert (progress["step"], progress["position"], progress["world_size"]) == (STEPS, BATCH * STEPS, 1)


def test_remains_of_interrupted_saves_are_ignored_and_removed(folder, killed, continued):
    """And so are steps after the state and half-written lines; how often to save and what to keep may change."""
    out, reference = folder / "planted", folder / "reference"
    assert f"resuming after step {state(killed)}" in continued["planted"]
    assert metrics(out) == metrics(reference)
    assert (out / "completions.jsonl").read_text() == (reference / "completions.jsonl").read_text()
    assert_same_weights(out / "step_000008", reference / "step_000008")
    assert names(out) == ["step_000007", "step_000008"] and names(out / "resume") == ["step_000008"]
    assert list(out.rglob("*.unfinished")) == []


def test_contradicting_settings_are_refused_in_one_line(folder, killed):
    """With the setting and both values, and without a change to the run's files."""
    changed = folder / "changed"
    changed.mkdir()
    for path in (folder / "base", *folder.glob("*.wav")):
        (changed / path.name).symlink_to(path)
    questions = (folder / "questions.jsonl").read_text()
    (changed / "questions.jsonl").write_text(questions.replace('"answer": "a bell"', '"answer": "rain"', 1))
    cases = {folder / "refused": (dict(lr=0.002), r"lr 0\.001 \(now 0\.002\)"),
             changed / "refused": ({}, r"questions_digest [0-9a-f]+ \(now [0-9a-f]+\)")}  # fmt: skip

    def refuse(out):
        shutil.copytree(killed, out)
        before = snapshot(out)
        with Start(out.parent, out.name, "--resume", processes=1, torchrun=(), **cases[out][0]) as start:
            start.finish(code=1)
            assert snapshot(out) == before
            return start.errors().splitlines()

    with ThreadPoolExecutor(max_workers=2) as pool:
        for errors, (_, expected) in zip(pool.map(refuse, cases), cases.values()):
            assert len(errors) == 1 and re.search(f"error: refused: .*{expected}", errors[0]), errors


# ---- the resume state ----


def saved_states(out):
    """The optimizer's states by parameter name in each rank's file of a run's newest resume state."""
    paths = sorted((out / "resume" / names(out / "resume")[-1]).glob("rank_*.pt"))
    return [torch.load(path, weights_only=True)["optimizer"] for path in paths]


def test_each_rank_saves_its_half(killed):
    """Each trainable parameter is in the file of exactly one rank, 12 bytes a weight; the ranks hold about as much."""
    policy, _ = load_policy(str(killed.parent / "base"), torch.float32, "cpu")
    sizes = {name: p.numel() for name, p in policy.named_parameters() if p.requires_grad}
    states = saved_states(killed)
    assert len(states) == 2 and sorted([*states[0], *states[1]]) == sorted(sizes)
    for rank, kept in enumerate(states):
        for name, tensors in kept.items():
            assert {key: t.numel() for key, t in tensors.items() if key != "step"} == dict.fromkeys(
                ("master", "exp_avg", "exp_avg_sq"), sizes[name]
            )
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        on_disk = next(killed.glob(f"resume/step_*/rank_{rank}.pt")).stat().st_size
        assert on_disk == pytest.approx(12 * sum(sizes.values()) / 2, rel=0.15)


SHAPES = {f"layer{i}.{name}": shape for i in range(3) for name, shape in (("weight", (40, 30 + i)), ("bias", (40,)))}


def save_with_two_load_with_others(rank, folder):
    """Two processes take three steps and save; then four load the state, then one. Each writes what it has loaded."""
    torch.set_num_threads(1)
    for world_size in (2, 4, 1):
        if rank >= world_size:
            continue
        store = dist.FileStore(f"{folder}/store_{world_size}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        random_numbers = torch.Generator().manual_seed(world_size)  # others than those that are loaded
        weights = {name: torch.randn(shape, generator=random_numbers) for name, shape in SHAPES.items()}
        parameters = {name: torch.nn.Parameter(weight.bfloat16()) for name, weight in weights.items()}
        optimizer, generator = ShardedAdamW(parameters), torch.Generator().manual_seed(10 * world_size + rank)
        if world_size == 2:
            for _ in range(3):
                for parameter in parameters.values():
                    parameter.grad = torch.randn(parameter.shape, generator=random_numbers).bfloat16()
                optimizer.step(lr=1e-3, max_grad_norm=1.0)
            save_state(Path(folder), {"step": 3, "position": 12, "before": [0.5, 1.0]}, optimizer, generator)
            progress = None
        else:
            progress = load_state(Path(folder) / "resume" / "step_000003", optimizer, generator)
        outcome = {"state": optimizer.state, "weights": {name: p.detach() for name, p in parameters.items()}}
        outcome |= {"generator": generator.get_state(), "progress": progress}
        torch.save(outcome, f"{folder}/{world_size}_{rank}.pt")
        dist.destroy_process_group()


def test_any_number_of_processes_loads_a_state(tmp_path):
    mp.spawn(save_with_two_load_with_others, (str(tmp_path),), nprocs=4)
    saved = [torch.load(tmp_path / f"2_{rank}.pt") for rank in range(2)]
    expected = saved[0]["state"] | saved[1]["state"]
    for world_size in (4, 1):
        loaded = [torch.load(tmp_path / f"{world_size}_{rank}.pt") for rank in range(world_size)]
        assert sorted(name for rank in loaded for name in rank["state"]) == sorted(SHAPES)
        for rank in loaded:
            torch.testing.assert_close(rank["state"], {name: expected[name] for name in rank["state"]}, rtol=0, atol=0)
            torch.testing.assert_close(rank["weights"], saved[0]["weights"], rtol=0, atol=0)
            progress = {"step": 3, "position": 12, "before": [0.5, 1.0]}
            assert {key: rank["progress"][key] for key in progress} == progress
        sequences = [rank["generator"].tolist() for rank in loaded]
        assert sequences[:2] == [rank["generator"].tolist() for rank in saved][:world_size]
        assert len(set(map(tuple, sequences))) == world_size  # each rank draws numbers of its own


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_state_is_one_clear_line(one_process, tmp_path, damage):
    optimizer, generator = ShardedAdamW({"weight": torch.nn.Parameter(torch.ones(100, 100))}), torch.Generator()
    save_state(tmp_path, {"step": 1}, optimizer, generator)
    file = tmp_path / "resume" / "step_000001" / "rank_0.pt"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="step_000001: cannot be resumed from"):
        load_state(file.parent, optimizer, generator)


def test_too_little_disk_space_is_said_before_anything_is_written(one_process, tmp_path, tiny, monkeypatch):
    """With the folder, what the save takes and what is free; with enough space the same save is made."""
    policy, processor = tiny
    (tmp_path / "metrics.jsonl").write_text("")
    optimizer, generator = ShardedAdamW({"weight": torch.nn.Parameter(torch.ones(9))}), torch.Generator()
    save = functools.partial(save_run, tmp_path, {"step": 1}, policy, processor, optimizer, generator, True, 0)
    size = sum((12 + p.element_size()) * p.numel() for p in policy.parameters() if p.requires_grad)
    monkeypatch.setattr(checkpoint, "draw_curves", lambda out: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(InputError, match=rf"{tmp_path}: .* takes 0\.0\d GB and {size / 1e9:.2f} GB are free"):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size + 10**8))
    save()
    assert names(tmp_path) == names(tmp_path / "resume") == ["step_000001"]


# ---- files and folders that are complete or not there ----


def test_cut_jsonl_keeps_the_complete_lines_up_to_a_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    kept = '{"step": 1}\n{"step": 2, "text": "line\u2028separator, 漢字"}\n'
    file.write_text(kept + '{"step": 3}\n{"step": 4}\n{"step": 2, "te', encoding="utf-8")
    cut_jsonl(file, 2)
    assert file.read_text(encoding="utf-8") == kept
    cut_jsonl(tmp_path / "none.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_jsonl_drops_a_line_that_ends_within_a_character(tmp_path):
    """A killed process may have written half of a character that takes several bytes."""
    file = tmp_path / "completions.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "text": "' + "漢".encode()[:2])
    cut_jsonl(file, 2)
    assert file.read_text() == '{"step": 1}\n'


def test_step_folders_are_the_complete_ones_by_step(tmp_path):
    for name in ("step_1000000", "step_999999", "step_000002.unfinished", "step_000003.removed.unfinished", "step_x"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["step_999999", "step_1000000"]


def test_a_half_removed_folder_does_not_look_complete(tmp_path, monkeypatch):
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove(folder)
    assert names(tmp_path) == []
    remove(next(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_replaced_as_a_whole_or_not_at_all(tmp_path, tiny, monkeypatch):
    model, processor = tiny
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "of_the_earlier_one").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(processor, "save_pretrained", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, model, processor)
    assert [path.name for path in folder.iterdir()] == ["of_the_earlier_one"]
    save_checkpoint(folder, model, processor)  # on top of the remains
    assert names(tmp_path) == ["step_000002"] and list(tmp_path.glob("*.unfinished")) == []
    assert (folder / "model.safetensors").exists() and not (folder / "of_the_earlier_one").exists()


def test_resume_without_a_state_starts_anew_and_keeps_what_was_there(one_process, tmp_path, tiny, capsys):
    """A run that was killed before its first save has metrics and no state; so has one whose move was interrupted."""
    out, config = tmp_path / "run", {"lr": 1.0, "world_size": 1, "launchers": []}

    def start(config):
        state = find_state(out, config, resume=True)
        open_run(out, config, state, tiny[0])
        return state

    assert start(config) is None and "starting at step 1" in capsys.readouterr().out
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    (out / "resume" / "step_000002.unfinished").mkdir(parents=True)
    assert start(config | {"lr": 2.0}) is None
    assert json.loads((out / "config.json").read_text())["lr"] == 2.0
    assert lines(out / "earlier_1" / "metrics.jsonl") == ['{"step": 1}']
    assert not (out / "metrics.jsonl").exists() and list(tmp_path.rglob("*.unfinished")) == []
    (out / "resume" / "step_000002").mkdir(parents=True)
    (out / "config.json").unlink()
    assert start(config) is None
    assert (out / "earlier_2" / "resume" / "step_000002").exists()


@pytest.fixture
def saved(one_process, tmp_path):
    """(folder, config, state) of a run saved after step 2, with a checkpoint of step 4 whose state was not finished."""
    config = {"lr": 1.0, "world_size": 1, "launchers": ["node:1:2"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"version": checkpoint.VERSION}))
    for name in ("resume/step_000001", "resume/step_000002", "resume/step_000004.unfinished", "step_000004"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 5)))
    return tmp_path, config, find_state(tmp_path, config, resume=True)


def test_remains_of_a_save_make_room_before_the_disk_is_checked(saved, tiny, monkeypatch):
    """Else a killed save could fill a disk that has room for two states, and no --resume would start."""
    out, config, state = saved

    def disk_usage(path):
        return SimpleNamespace(free=10**12 if os.listdir(out / "resume") == ["step_000002"] else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    met = {"bad_clips_met": {"q.jsonl, line 2": "is silent"}}
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | met))
    open_run(out, config, state, tiny[0])
    assert names(out) == [] and len(lines(out / "metrics.jsonl")) == 2  # the checkpoint of step 4 will come again
    assert json.loads((out / "config.json").read_text()) == config | met | {"version": checkpoint.VERSION}


def test_a_state_that_appears_meanwhile_is_not_overlooked(saved, tiny):
    out, config, state = saved
    (out / "resume" / "step_000004.unfinished").rename(out / "resume" / "step_000004")
    with pytest.raises(InputError, match="another process"):
        open_run(out, config, state, tiny[0])
    assert len(lines(out / "metrics.jsonl")) == 4 and names(out / "resume")[-1] == "step_000004"


def test_only_the_same_torchrun_continues_unasked(saved):
    out, config, state = saved
    assert find_state(out, config | {"launchers": ["other:1:2", "node:1:2"]}, resume=False) == state
    assert find_state(out, config | {"launchers": ["node:1:3"]}, resume=False) is None
    assert find_state(out, config | {"launchers": []}, resume=False) is None  # without torchrun
