"""explain.py: each token's terms against grpo_loss and autograd, the step against plain torch, the command."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

import explain
import grpo_aqa
from data import step_indices
from evaluation.explain_page import to_text
from evaluation.explain_story import Token, tell
from explain import check_sums, take_apart, take_step
from grpo_aqa import grpo_loss
from infra import processes
from model.checkpoints import save_checkpoint
from model.qwen2_audio import freeze_audio_tower
from policy import completion_logprobs
from reward import REWARDS

CPU = torch.device("cpu")
VARIANTS = [
    {},
    {"ratio": "sequence"},
    {"beta": 0.0},
    {"beta": 0.0, "ratio": "sequence", "loss_average": "token"},
    {"loss_average": "token", "clip_high": 0.28},
    {"loss_average": "constant", "normalize_std": "off"},
]


def settings(**changed):
    """Return the settings of a command line: groups of 6 completions of at most 7 tokens."""
    changed = {"group_size": 6, "max_new_tokens": 7, "model": "M", "data": "D", "lr": 1e-3} | changed
    return grpo_aqa.parse_args([word for name, value in changed.items() for word in (f"--{name}", str(value))])


# ---- the tokens' terms ----


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_add_up_to_the_loss_and_have_its_gradient(seed, variant):
    args, g = settings(**variant), torch.Generator().manual_seed(seed)
    logprobs = (-3 * torch.rand(6, 7, generator=g)).requires_grad_()
    old, ref = (logprobs.detach() + 0.4 * torch.randn(6, 7, generator=g) for _ in range(2))
    advantages = torch.randn(6, generator=g)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=g)
    length = {"completion": None, "token": mask.sum().item() / 6, "constant": 7.0}[args.loss_average]
    ref = ref if args.beta else None
    limits = args.clip_low, args.clip_high, args.beta, length, args.ratio
    loss, stats = grpo_loss(logprobs, old, ref, advantages, mask, *limits)
    loss.backward()
    words = [["word"] * n for n in mask.sum(dim=1).tolist()]
    completions = take_apart(args, words, logprobs.detach(), old, ref, advantages, length)
    check_sums(completions, {name: value.item() for name, value in (stats | {"loss": loss}).items()}, length)
    gradients = torch.zeros(6, 7)
    for i, tokens in enumerate(completions):
        gradients[i, : len(tokens)] = torch.tensor([token.gradient for token in tokens])
        total = sum(token.loss for token in tokens) / (length or len(tokens))
        alone = grpo_loss(*(x if x is None else x[i : i + 1] for x in (logprobs, old, ref, advantages, mask)), *limits)
        assert total == pytest.approx(alone[0].item(), abs=1e-5)
    assert_close(gradients, logprobs.grad, rtol=1e-4, atol=1e-6)
    assert any(token.clipped for tokens in completions for token in tokens) and "clip_fraction" in stats


@pytest.mark.parametrize("name", ["loss", "kl", "clip_fraction"])
@pytest.mark.parametrize("wrong", [0.001, math.nan])
def test_a_difference_from_the_training_loop_is_an_error(name, wrong):
    tokens = [
        [Token("a", -1.0, -1.2, -1.1, 1.2, True, 0.3, 0.5, 0.0), Token("b", -1.0, -1, -1, 1.0, False, 0.1, 0.7, 0)]
    ]
    stats = {"loss": 0.6, "kl": 0.2, "clip_fraction": 0.5}
    check_sums(tokens, stats, None)
    with pytest.raises(RuntimeError, match=f"{name}: the tokens add up to"):
        check_sums(tokens, stats | {name: stats[name] + wrong}, None)


# ---- the step ----


@pytest.fixture
def rewarded(monkeypatch):
    """Reward texts of an odd length instead of right answers, which a model with random weights never gives."""
    monkeypatch.setitem(REWARDS, "accuracy", lambda text, question, template: float(len(text) % 2))


@pytest.mark.parametrize(
    "variant",
    [{}, {"updates_per_rollout": 3, "loss_average": "token", "ratio": "sequence", "max_grad_norm": 0.01}],
    ids=str,
)
def test_the_step_equals_plain_torch(tiny, questions, one_rank, exact, rewarded, variant):
    """Loss, gradient norm, and log-probs before and after the step equal those of autograd and torch's own AdamW."""
    args, (model, processor) = settings(**variant), tiny
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    step = take_step(args, mine, processor, questions, CPU)
    inputs = step.group.prompt, step.group.completions, step.group.mask, args.temperature
    rewards = [
        float(len(text) % 2) + float(good) for text, good in zip(step.group.texts, step.group.scores["format"][0])
    ]
    mean = sum(rewards) / 6
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    assert step.advantages == pytest.approx([(r - mean) / (deviation + 1e-4) for r in rewards])
    length = step.group.mask.sum().item() / 6 if args.loss_average == "token" else None
    assert step.length == (None if length is None else pytest.approx(length))

    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=args.lr, weight_decay=0)
    start, _ = completion_logprobs(model, *inputs)
    assert step.before == pytest.approx(start.sum(dim=1).tolist())
    assert len(step.updates) == args.updates_per_rollout
    for update in step.updates:
        logprobs, _ = completion_logprobs(theirs, *inputs)
        limits = args.clip_low, args.clip_high, args.beta, length, args.ratio
        advantages = torch.tensor(step.advantages, dtype=torch.float64)
        loss, _ = grpo_loss(logprobs, start.detach(), start.detach(), advantages, step.group.mask, *limits)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), args.max_grad_norm)
        optimizer.step()
        assert update.stats["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        found = [token.policy for tokens in update.tokens for token in tokens]
        assert found == pytest.approx(logprobs[step.group.mask].tolist(), rel=1e-6)
    end, _ = completion_logprobs(theirs, *inputs)
    assert step.after == pytest.approx(end.sum(dim=1).tolist(), rel=1e-6)
    assert step.after != pytest.approx(step.before, rel=1e-4)


def test_questions_with_equal_rewards_are_skipped(tiny, questions, one_rank, monkeypatch):
    """First, the first two questions in the order of training have equal rewards; then all questions have."""
    args, (model, processor) = settings(steps=5), tiny
    order = [questions[i].id for i in step_indices(4, 0, 4, 0, args.seed)]
    calls = []

    def reward(text, question, template):
        calls.append(text)
        return float(len(calls) == 2 * 6 + 3)  # one completion of the third question

    monkeypatch.setitem(REWARDS, "accuracy", reward)
    step = take_step(args, copy.deepcopy(model), processor, questions, CPU)
    assert step.looked_at == 3 and step.group.question.id == order[2] and len(calls) == 3 * 6
    assert step.advantages[2] == pytest.approx((1 - 1 / 6) / (1 / 6**0.5 + 1e-4)) == max(step.advantages)
    assert "The 2 questions before it have equal rewards" in " ".join(to_text(tell(step, args)).split())

    monkeypatch.setitem(REWARDS, "accuracy", lambda text, question, template: 1.0)
    step = take_step(args, copy.deepcopy(model), processor, questions, CPU)
    assert step.group.question.id == order[0] and not any(step.advantages)
    text = " ".join(to_text(tell(step, args)).split())
    assert "In each of the first 4 groups all rewards are equal" in text
    assert "0 of 0 completions with a positive advantage became likelier. 0 of 0" in text


def test_the_next_question_replaces_one_with_a_bad_clip(tiny, questions, one_rank, rewarded, tmp_path, capsys):
    """With --skip_bad_audio. The message names the bad clip."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)
    bad = [dataclasses.replace(q, audio=str(tmp_path / "silent.wav"), place=f"line {q.id}") for q in questions]
    args, (model, processor) = settings(), tiny
    args.skip_bad_audio = True
    first = step_indices(4, 0, 1, 0, args.seed)[0]
    some = [bad[i] if i == first else question for i, question in enumerate(questions)]
    step = take_step(args, copy.deepcopy(model), processor, some, CPU)
    assert step.group.question.id != bad[first].id
    assert f"line {first}: " in (printed := capsys.readouterr().out) and "another question takes its place" in printed


def test_a_frozen_tower_is_shared_with_the_reference(tiny, questions, one_rank, rewarded):
    model = copy.deepcopy(tiny[0])
    freeze_audio_tower(model)
    runs = []
    model.model.audio_tower.conv1.register_forward_hook(lambda *_: runs.append(1))
    args = settings()
    args.freeze_audio_tower = True
    assert take_step(args, model, tiny[1], questions, CPU).looked_at == len(runs)  # once for each question's prompt


# ---- the command ----


@pytest.fixture(scope="module")
def saved(tiny, questions, tmp_path_factory):
    """Write a tiny model and a question file. Returns their flags."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "model", copy.deepcopy(tiny[0]).float(), tiny[1])
    lines = [
        f'{{"audio": "{q.audio}", "question": "{q.question}", "choices": ["rain", "wind"], "answer": "rain"}}\n'
        for q in questions
    ]
    (folder / "questions.jsonl").write_text("".join(lines))
    return ["--model", str(folder / "model"), "--data", str(folder / "questions.jsonl"), "--max_new_tokens", "5"]


@pytest.mark.parametrize("variant", [[], ["--lora_rank", "2"], ["--freeze_audio_tower"]], ids=str)
def test_command_writes_the_page_and_no_run_folder(saved, tmp_path, monkeypatch, capsys, variant):
    monkeypatch.setattr(processes, "_patient_group", None)
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("an earlier run's\n")
    flags = [*saved, *variant, "--out", "out"]
    assert explain.explain(explain.parse_args([*flags, "--html", "pages/page.html"])) == 0
    printed = capsys.readouterr().out
    assert "1. The prompt" in printed and "page: pages/page.html" in printed
    assert "<h2>5. What the step did</h2>" in Path("pages/page.html").read_text(encoding="utf-8")
    assert explain.explain(explain.parse_args(flags)) == 0
    assert capsys.readouterr().out in printed  # the same samples, the same numbers
    files = sorted(str(path) for path in Path().rglob("*"))
    assert files == ["out", "out/audio_headers.json", "out/metrics.jsonl", "pages", "pages/page.html"]
    assert Path("out/metrics.jsonl").read_text() == "an earlier run's\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resume"], "--resume is for training"),
        (["--html", "."], "--html .: cannot be written"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line(saved, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(processes, "_patient_group", None)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("left at once"))
    monkeypatch.chdir(tmp_path)
    assert explain.explain(explain.parse_args([*saved, *flags])) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith(f"explain.py: error: {message}")


def show(monkeypatch, *flags):
    monkeypatch.setattr(processes, "_patient_group", None)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("left at once"))
    return explain.explain(explain.parse_args(["--run", *flags]))


def test_the_completions_of_a_run(tmp_path, monkeypatch, capsys):
    """The page is beside completions.jsonl, or where --html says. Damaged lines are counted."""
    monkeypatch.chdir(tmp_path)
    group = {"step": 1, "id": "7", "audio": "7.wav", "prompt": "What?", "answer": "rain", "completions": ["rain", "no"],
             "rewards": [1.0, 0.0], "accuracy": [1.0, 0.0], "advantages": [0.7, -0.7]}  # fmt: skip
    (tmp_path / "a").mkdir()
    lines = [json.dumps(group), '{"step": 2', json.dumps(group | {"rewards": "x"}), json.dumps(group | {"step": 2})]
    Path("a/completions.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "id')  # the last line is being written
    assert show(monkeypatch, "a") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 questions with their completions" and printed[1] == "2 damaged lines are left out"
    assert printed[2].startswith("1 of 1 clips are not found") and printed[3:] == ["page: a/completions.html"]
    page = Path("a/completions.html").read_text(encoding="utf-8")
    assert "<h2>step 2</h2>" in page and 'src="../7.wav"' in page and printed[1] in page
    assert show(monkeypatch, "a", "--html", "b/page.html") == 0 and Path("b/page.html").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "a/completions.jsonl: is missing; --run takes the folder of a run"),
        ("", "a/completions.jsonl: is empty; it fills every --log_completions_every steps"),
        ("{}\nx\n", "a/completions.jsonl: all 2 lines are damaged"),
    ],
    ids=str,
)
def test_a_run_without_completions_ends_in_one_line(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a").mkdir()
        Path("a/completions.jsonl").write_text(content)
    assert show(monkeypatch, "a") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"explain.py: error: {message}")


@pytest.mark.parametrize("flags, named", [(["--steps", "1000"], "steps"), (["--resume"], "resume")], ids=str)
def test_a_run_takes_no_settings(capsys, flags, named):
    """Not even those whose value is the default."""
    with pytest.raises(SystemExit):
        explain.parse_args(["--run", "a", *flags])
    assert f"--run takes no setting but --html; leave out --{named}" in capsys.readouterr().err


def test_several_ranks_are_refused(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_patient_group", None)
    monkeypatch.setattr(explain.dist, "get_world_size", lambda: 2)
    assert explain.explain(explain.parse_args(saved)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("explain.py: error: explain.py runs on one rank")
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_torchrun_with_two_ranks_is_refused(saved, tmp_path):
    script = str(Path(__file__).parents[1] / "explain.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script, *saved]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0 and done.stderr.count("explain.py: error: explain.py runs on one rank") == 1
    assert "1. The prompt" not in done.stdout and list(tmp_path.iterdir()) == []
