"""A run that is killed and resumed is the run that was never killed: metrics, completions and weights, bit for bit."""

import json
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    BATCH,
    QUESTIONS,
    STEPS,
    Start,
    assert_same_run,
    assert_same_weights,
    finish,
    lines,
    metrics,
    names,
    snapshot,
    state,
)

from data import step_indices
from model.checkpoints import load_policy


@pytest.fixture(scope="session")
def killed(runs):
    """A run of 2 processes that was killed soon after its state of step 4, with a later step and half a line."""
    with Start(runs, "killed") as start:
        start.wait_until((runs / "killed" / "resume" / "step_000004").exists)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(runs / "killed" / name, "a") as file:
            file.write("\n".join(['{"step": 7}', '{"step": 7, "lo']))
    return runs / "killed"


def test_the_reference_learns(runs):
    """Else every comparison below would be one of weights that never moved."""
    assert sum(m["grad_norm"] > 0.1 and m["equal_reward_groups"] < 1 for m in metrics(runs / "reference")) >= 6
    initial = load_file(runs / "base" / "model.safetensors")
    trained = load_file(runs / "reference" / f"step_{STEPS:06d}" / "model.safetensors")
    moved = [name for name in trained if not torch.equal(trained[name], initial[name])]
    assert len(moved) >= len(trained) - 1  # all but the audio tower's fixed positions


# ---- the kill test ----


def kill_and_resume(runs, out, steps, kills, startup, most):
    """Kill a run in each of the ways in `kills`, resume it each time, and let it end. Returns how many hit a save.

    startup: the seconds until a run's first step, for kills before it. most: of the random numbers of steps after which
    the other kills come.
    """
    saves_hit = 0
    for number, kind in enumerate(kills):
        with Start(runs, out, *(["--resume"] if number else []), steps=steps) as start:
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
                start.wait_until(lambda: any((runs / out).glob(pattern)))
            assert start.process.poll() is None, f"over before kill {number} ({kind})"
            start.kill()
        saves_hit += any((runs / out).rglob("*.unfinished"))
    finish(runs, out, "--resume", steps=steps)
    return saves_hit


def seconds_to_first_step(runs, out, **flags):
    """The time that a whole run takes until its first step is done."""
    began = time.perf_counter()
    with Start(runs, out, **flags) as start:
        start.wait_until(lambda: start.new_steps() >= 1)
        seconds = time.perf_counter() - began
        start.finish()
    return seconds


@pytest.mark.slow
def test_twelve_kills_end_like_none(runs):
    """Kills before there is anything to resume from, in training, and in the middle of saves."""
    random.seed(seed := random.randrange(10**6))
    print("random seed", seed)  # shown where the test fails
    steps = 60  # more than twelve starts do before they are killed
    startup = seconds_to_first_step(runs, "long", steps=steps)
    kills = random.sample(["starting"] * 4 + ["training"] * 4 + ["saving"] * 4, 12)
    saves_hit = kill_and_resume(runs, "twelve", steps, kills, startup, most=5)
    assert_same_run(runs / "twelve", runs / "long")
    assert saves_hit >= 2


@pytest.mark.slow
def test_one_process_in_bfloat16(runs):
    """The float32 masters are restored: weights rounded to bfloat16 would lead to another run."""
    flags = dict(processes=1, torchrun=(), dtype="bfloat16")
    with Start(runs, "half", **flags) as whole, Start(runs, "half_killed", **flags) as start:
        start.wait_until((runs / "half_killed" / "resume" / "step_000004").exists)
        start.kill()
        whole.finish()
    assert state(runs / "half_killed") < STEPS
    finish(runs, "half_killed", "--resume", **flags)
    assert_same_run(runs / "half_killed", runs / "half")
    masters = [saved_states(runs / out)[0] for out in ("half_killed", "half")]
    assert all(torch.equal(masters[0][name]["master"], masters[1][name]["master"]) for name in masters[1])
    assert any(not torch.equal(kept["master"], kept["master"].bfloat16().float()) for kept in masters[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft_aqa.py", "grpo_aqa.py"])
def test_an_adapter_with_dropout(runs, script):
    """LoRA in both scripts, with a frozen audio tower: what is dropped after a resume is what would have been."""
    out = script.removesuffix("_aqa.py")
    flags = dict(script=script, processes=1, torchrun=(), lora_rank=4, lora_dropout=0.2)
    if script == "sft_aqa.py":
        flags["log_completions_every"] = None
    switches = ["--freeze_audio_tower"]
    with Start(runs, out, *switches, **flags) as whole, Start(runs, f"{out}_killed", *switches, **flags) as start:
        start.wait_until((runs / f"{out}_killed" / "resume" / "step_000004").exists)
        start.kill()
        whole.finish()
    assert state(runs / f"{out}_killed") < STEPS
    finish(runs, f"{out}_killed", "--resume", *switches, **flags)
    assert_same_run(runs / f"{out}_killed", runs / out)
    assert max(m["grad_norm"] for m in metrics(runs / out)) > 0.1
    saved = load_file(runs / out / f"step_{STEPS:06d}" / "adapter_model.safetensors")
    assert any(weight.any() for name, weight in saved.items() if ".lora_B." in name)
    assert not any("audio_tower" in name for name in saved)


@pytest.mark.slow
def test_three_processes(runs):
    """The sums over three ranks depend on their order, and so on the order that DistributedDataParallel has learned."""
    with Start(runs, "three", processes=3) as whole:
        whole.finish()
    with Start(runs, "three_killed", processes=3) as start:
        start.wait_until((runs / "three_killed" / "resume" / "step_000004").exists)
        start.kill()
    assert state(runs / "three_killed") < STEPS
    finish(runs, "three_killed", "--resume", processes=3)
    assert_same_run(runs / "three_killed", runs / "three")


# ---- continuing with other processes, other settings, and after an interrupted save ----


@pytest.fixture(scope="session")
def continued(runs, killed):
    """Copies of the killed run, continued side by side: name -> what was printed.

    alone: by one process instead of two. planted: among the remains of interrupted saves, with other save settings.
    """
    for name in ("alone", "planted"):
        shutil.copytree(killed, runs / name)
    for name in ("step_000004", "step_000006", "step_000002.removed", "resume/step_000006", "resume/step_000004"):
        remains = runs / "planted" / f"{name}.unfinished"
        remains.mkdir(exist_ok=True)
        (remains / "rank_0.pt").write_bytes(b"half of it")
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        (runs / "planted" / f"{name}.unfinished").write_text("half of i")
    with (
        Start(runs, "alone", "--resume", processes=1, torchrun=(), prompts_per_rank=BATCH) as alone,
        Start(runs, "planted", "--resume", save_every=1, keep_last=2) as planted,
    ):
        return {"alone": alone.finish(), "planted": planted.finish()}


def test_another_number_of_processes_continues(runs, killed, continued):
    """The steps go on where they were, and so do the questions, each used once per epoch."""
    step, out = state(killed), runs / "alone"
    assert f"resuming after step {step}" in continued["alone"]
    assert [m["step"] for m in metrics(out)] == list(range(1, STEPS + 1))
    assert metrics(out)[:step] == metrics(runs / "reference")[:step]
    assert metrics(out)[step]["kl"] > 0  # of the first step after: the weights are not the base model's
    used = [json.loads(line) for line in lines(out / "completions.jsonl")]
    for later in range(step + 1, STEPS + 1):
        expected = [f"{i}.wav" for i in step_indices(QUESTIONS, BATCH * (later - 1), BATCH, rank=0, seed=0)]
        assert [record["audio"] for record in used if record["step"] == later] == expected
    progress = json.loads((out / "resume" / names(out)[-1] / "progress.json").read_text())
    assert (progress["step"], progress["position"], progress["world_size"]) == (STEPS, BATCH * STEPS, 1)


def test_remains_of_interrupted_saves_are_ignored_and_removed(runs, killed, continued):
    """And so are steps after the state and half-written lines; how often to save and what to keep may change."""
    out, reference = runs / "planted", runs / "reference"
    assert f"resuming after step {state(killed)}" in continued["planted"]
    assert metrics(out) == metrics(reference)
    assert (out / "completions.jsonl").read_text() == (reference / "completions.jsonl").read_text()
    assert_same_weights(out / "step_000008", reference / "step_000008")
    assert names(out) == ["step_000007", "step_000008"] and names(out / "resume") == ["step_000008"]
    assert list(out.rglob("*.unfinished")) == []


def test_contradicting_settings_are_refused_in_one_line(runs, killed):
    """With the setting and both values, and without a change to the run's files."""
    changed = runs / "changed"
    changed.mkdir()
    for path in (runs / "base", *runs.glob("*.wav")):
        (changed / path.name).symlink_to(path)
    questions = (runs / "questions.jsonl").read_text()
    (changed / "questions.jsonl").write_text(questions.replace('"answer": "a bell"', '"answer": "rain"', 1))
    cases = {runs / "refused": (dict(lr=0.002), r"lr 0\.001 \(now 0\.002\)"),
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


# ---- what each rank has saved ----


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
