"""A killed and resumed run equals a run that was never killed, bit for bit: metrics, completions and weights."""

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
    """A run on 2 ranks, killed soon after its state of step 4. The checkpoint before that is of step 3.

    Its .jsonl files have a later step and half a line.
    """
    with Start(runs, "killed", save_every=3, save_state_every=4) as start:
        start.wait_until((runs / "killed" / "resume" / "step_000004").exists)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(runs / "killed" / name, "a") as file:
            file.write("\n".join(['{"step": 7}', '{"step": 7, "lo']))
    return runs / "killed"


def test_the_reference_learns(runs):
    """Otherwise the tests below would compare weights that never moved."""
    assert sum(m["grad_norm"] > 0.1 and m["equal_reward_groups"] < 1 for m in metrics(runs / "reference")) >= 6
    initial = load_file(runs / "base" / "model.safetensors")
    trained = load_file(runs / "reference" / f"step_{STEPS:06d}" / "model.safetensors")
    moved = [name for name in trained if not torch.equal(trained[name], initial[name])]
    assert len(moved) >= len(trained) - 1  # all but the audio tower's fixed positions


# ---- kills ----


def kill_and_resume(runs, out, kills, startup, most, **flags):
    """Kill a run once for each kind in `kills`, resume it each time, and let it end. Returns how many kills hit a save.

    startup: seconds until a run's first step; kills while "starting" come before that. most: the other kills come after
    a random number of steps from 1 to `most`.
    """
    saves_hit = 0
    for number, kind in enumerate(kills):
        with Start(runs, out, *(["--resume"] if number else []), **flags) as start:
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
    finish(runs, out, "--resume", **flags)
    return saves_hit


def seconds_to_first_step(runs, out, **flags):
    """Return how many seconds a run took until its first step was done. The run itself is completed."""
    began = time.perf_counter()
    with Start(runs, out, **flags) as start:
        start.wait_until(lambda: start.new_steps() >= 1)
        seconds = time.perf_counter() - began
        start.finish()
    return seconds


@pytest.mark.slow
def test_a_run_killed_twelve_times_equals_an_undisturbed_one(runs):
    """Kills come during starts (even before there is a state), during training and in the middle of saves.

    The newest checkpoint is older than the state, newer, or of the same step.
    """
    random.seed(seed := random.randrange(10**6))
    print("random seed", seed)  # pytest shows it if the test fails
    steps = 60  # more steps than twelve killed starts take
    startup = seconds_to_first_step(runs, "long", steps=steps)
    flags = dict(steps=steps, save_state_every=3)
    kills = random.sample(["starting"] * 4 + ["training"] * 4 + ["saving"] * 4, 12)
    saves_hit = kill_and_resume(runs, "twelve", kills, startup, most=5, **flags)
    assert_same_run(runs / "twelve", runs / "long")
    assert saves_hit >= 2


@pytest.mark.slow
def test_one_rank_in_bfloat16(runs):
    """A resume restores the float32 master weights. With weights rounded to bfloat16, the run would differ."""
    flags = dict(ranks=1, torchrun=(), dtype="bfloat16")
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
    """LoRA in both scripts, with a frozen audio tower. After a resume, dropout drops what it would have dropped."""
    out = script.removesuffix("_aqa.py")
    flags = dict(script=script, ranks=1, torchrun=(), lora_rank=4, lora_dropout=0.2)
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
def test_three_ranks(runs):
    """Sums over three ranks depend on their order, and so on the bucket order that DistributedDataParallel learned.

    With dynamic sampling, steps use a different number of questions, and two ranks continue where three have stopped.
    With beta 0, ranks leave out different numbers of groups.
    """
    flags = dict(group_size=2, dynamic_sampling=2, beta=0)
    with Start(runs, "three", ranks=3, **flags) as whole:
        whole.finish()
    with Start(runs, "three_killed", ranks=3, **flags) as start:
        start.wait_until((runs / "three_killed" / "resume" / "step_000004").exists)
        start.kill()
    assert (step := state(runs / "three_killed")) < STEPS
    for name in ("two", "two_killed"):
        shutil.copytree(runs / "three_killed", runs / name)
    finish(runs, "three_killed", "--resume", ranks=3, **flags)
    assert_same_run(runs / "three_killed", runs / "three")

    finish(runs, "two", "--resume", **flags)
    with Start(runs, "two_killed", "--resume", **flags) as start:
        start.wait_until((runs / "two_killed" / "resume" / "step_000006").exists)
        start.kill()
    assert state(runs / "two_killed") < STEPS
    finish(runs, "two_killed", "--resume", **flags)
    assert_same_run(runs / "two_killed", runs / "two")
    done = {name: [round(own["sampling_rounds"]) for own in metrics(runs / name)] for name in ("three", "two")}
    assert len(set(done["three"])) > 1 and done["two"][:step] == done["three"][:step]
    position = 2 * (3 * sum(done["two"][:step]) + 2 * sum(done["two"][step:]))
    assert (
        json.loads((runs / "two" / "resume" / names(runs / "two")[-1] / "progress.json").read_text())["position"]
        == position
    )


# ---- resuming on another number of ranks, with other settings, and after an interrupted save ----


@pytest.fixture(scope="session")
def continued(runs, killed):
    """Resume two copies of the killed run side by side. Returns name -> what was printed.

    alone: on one rank instead of two. planted: with other save settings, among leftovers of interrupted saves and a
    checkpoint newer than the state, which has wrong weights.
    """
    for name in ("alone", "planted"):
        shutil.copytree(killed, runs / name)
    for name in ("step_000004", "step_000006", "step_000002.removed", "resume/step_000006", "resume/step_000004"):
        leftovers = runs / "planted" / f"{name}.unfinished"
        leftovers.mkdir(exist_ok=True)
        (leftovers / "rank_0.pt").write_bytes(b"half of it")
    shutil.copytree(killed / "step_000003", runs / "planted" / "step_000006", dirs_exist_ok=True)
    for name in ("config.json", "metrics.jsonl", "curves.png"):
        (runs / "planted" / f"{name}.unfinished").write_text("half of i")
    with (
        Start(runs, "alone", "--resume", ranks=1, torchrun=(), prompts_per_rank=BATCH) as alone,
        Start(runs, "planted", "--resume", save_every=1, save_state_every=3, keep_last=3) as planted,
    ):
        return {"alone": alone.finish(), "planted": planted.finish()}


def test_another_number_of_ranks_continues(runs, killed, continued):
    """Steps and questions continue where the killed run stopped. Each question is used once an epoch."""
    step, out = state(killed), runs / "alone"
    assert f"resuming after step {step}" in continued["alone"]
    assert [m["step"] for m in metrics(out)] == list(range(1, STEPS + 1))
    assert metrics(out)[:step] == metrics(runs / "reference")[:step]
    assert metrics(out)[step]["kl"] > 0  # in the first step after the resume: the weights are not the base model's
    used = [json.loads(line) for line in lines(out / "completions.jsonl")]
    for later in range(step + 1, STEPS + 1):
        expected = [f"{i}.wav" for i in step_indices(QUESTIONS, BATCH * (later - 1), BATCH, rank=0, seed=0)]
        assert [record["audio"] for record in used if record["step"] == later] == expected
    progress = json.loads((out / "resume" / names(out)[-1] / "progress.json").read_text())
    assert (progress["step"], progress["position"], progress["world_size"]) == (STEPS, BATCH * STEPS, 1)


def test_leftovers_of_interrupted_saves_are_ignored_and_removed(runs, killed, continued):
    """So are steps and checkpoints after the state, and half-written lines. A resume may change how often it saves."""
    out, reference = runs / "planted", runs / "reference"
    assert "removed checkpoints newer than the state: step_000006\n" in continued["planted"]
    assert f"resuming after step {state(killed)}\n" in continued["planted"]
    assert metrics(out) == metrics(reference)
    assert (out / "completions.jsonl").read_text() == (reference / "completions.jsonl").read_text()
    for name in ("step_000006", "step_000008"):
        assert_same_weights(out / name, reference / name)
    assert names(out) == ["step_000006", "step_000007", "step_000008"] and names(out / "resume") == ["step_000008"]
    assert list(out.rglob("*.unfinished")) == []


def test_contradicting_settings_are_refused_in_one_line(runs, killed):
    """The line names the setting and both values. The run's files do not change."""
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
        with Start(out.parent, out.name, "--resume", ranks=1, torchrun=(), **cases[out][0]) as start:
            start.finish(code=1)
            assert snapshot(out) == before
            return start.errors().splitlines()

    with ThreadPoolExecutor(max_workers=2) as pool:
        for errors, (_, expected) in zip(pool.map(refuse, cases), cases.values()):
            assert len(errors) == 1 and re.search(f"error: refused: .*{expected}", errors[0]), errors


# ---- the files of each rank ----


def saved_states(out):
    """Return the optimizer state by parameter name, for each rank's file of a run's newest resume state."""
    paths = sorted((out / "resume" / names(out / "resume")[-1]).glob("rank_*.pt"))
    return [torch.load(path, weights_only=True)["optimizer"] for path in paths]


def test_each_rank_saves_its_half(killed):
    """Each trainable parameter is in one rank's file, with 12 bytes a weight. The files have about the same size."""
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
