"""The run around an algorithm: a step's questions and learning rate, its update, its record and its save."""

import copy
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import answering
import grpo_aqa
import training
from data import Question, load_questions
from errors import InputError
from files import step_folders
from policy import BadClip, encode_prompts, load_policy
from reward import format_reward, mmau_match, prediction
from runtime import Clock
from training import Run, record_step, replace_bad, save_if_due, score_heldout, start, steps_to_take, update

CPU = torch.device("cpu")


def settings(out, *flags):
    """Five steps of three questions."""
    given = ["--steps=5", "--prompts_per_rank=3", "--accumulation_steps=1", "--lr=0.5", "--max_new_tokens=4"]
    return grpo_aqa.parse_args(["--model=m", "--data=d", f"--out={out}", *given, *flags])


@pytest.fixture
def begun(one_process, tiny, questions, tmp_path):
    """Begins a run in tmp_path / "run". Returns its settings, what it is about, and what this rank holds."""
    handler = signal.getsignal(signal.SIGTERM)
    model, processor = tiny

    def begin(*flags, asked=questions):
        args = settings(tmp_path / "run", *flags)
        run = Run({"world_size": 1, "launchers": []}, asked, [], None)
        return args, run, start(args, run, copy.deepcopy(model).float(), processor, CPU)

    yield begin
    signal.signal(signal.SIGTERM, handler)


# ---- a step's questions and learning rate ----


def test_each_question_comes_once_an_epoch_and_the_rate_falls_to_zero(begun, questions):
    args, run, learner = begun()
    steps = list(steps_to_take(args, run, learner, CPU))
    assert [step for step, *_ in steps] == [1, 2, 3, 4, 5]
    assert [lr for _, lr, *_ in steps] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    asked = [question.id for _, _, batch, *_ in steps for question in batch]
    for epoch in range(0, 12, 4):
        assert sorted(asked[epoch : epoch + 4]) == sorted(question.id for question in questions)
    for _, _, batch, prompt, clock in steps:
        expected = encode_prompts(learner.processor, batch, args.template)
        assert all(torch.equal(prompt[name], expected[name]) for name in expected)
        assert list(clock.phases) == ["data"]


def test_a_resumed_run_takes_the_steps_that_are_left(begun):
    args, run, learner = begun()
    whole = [(step, lr, batch) for step, lr, batch, *_ in steps_to_take(args, run, learner, CPU)]
    learner.progress |= {"step": 3, "position": 9}
    assert [(step, lr, batch) for step, lr, batch, *_ in steps_to_take(args, run, learner, CPU)] == whole[3:]
    learner.progress |= {"step": 5, "position": 15}
    assert list(steps_to_take(args, run, learner, CPU)) == []


@pytest.fixture
def bad(tmp_path):
    """A question whose clip only turns out bad when it is decoded."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)
    return Question("bad", str(tmp_path / "silent.wav"), "What?", ["x", "y"], "x", place="d, line 9")


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_clip_may_be_bad(begun, questions, bad, skip):
    """It is decoded before the first step, on which every rank begins alike."""
    if not skip:
        with pytest.raises(InputError, match=r"d, line 9: .*silent\.wav"):
            begun(asked=[bad, *questions])
        return
    args, run, learner = begun("--skip_bad_audio", asked=[bad, *questions])
    asked = [question.id for _, _, batch, *_ in steps_to_take(args, run, learner, CPU) for question in batch]
    assert len(asked) == 15 and "bad" not in asked and list(learner.bad_clips) == ["d, line 9"]


@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_clip_met_in_a_step(begun, questions, bad, skip):
    """Ends the run with the step, the clip and what helps; with --skip_bad_audio, another question takes its place."""
    args, run, learner = begun(*["--skip_bad_audio"] * skip, asked=[*questions, bad])
    if not skip:
        with pytest.raises(InputError, match=r"^step [12]: d, line 9: .*silent\.wav: .*--resume --skip_bad_audio; "):
            list(steps_to_take(args, run, learner, CPU))
        return
    counted, asked = 0, []
    for _, _, batch, *_ in steps_to_take(args, run, learner, CPU):
        counted += learner.replaced.count("d, line 9")
        asked += [question.id for question in batch]
    assert counted == 3 and len(asked) == 15 and "bad" not in asked  # three epochs of five
    assert list(learner.bad_clips) == ["d, line 9"]


def test_the_next_good_question_takes_the_place_of_one_with_a_bad_clip():
    """After the last comes the first; which one it is does not depend on what else is known to be bad."""
    questions = [Question(str(i), f"{i}.wav", "What?", ["x", "y"], "x", place=f"line {i}") for i in range(5)]
    q, known = questions, {}
    assert replace_bad(q, known, [q[0], q[3]], BadClip(q[3], "is silent")) == [q[0], q[4]]
    assert replace_bad(q, known, [q[0], q[4]], BadClip(q[4], "is silent")) == [q[0], q[0]]
    assert replace_bad(q, known, [q[1], q[3]], BadClip(q[3], "is silent")) == [q[1], q[0]]
    assert known == {"line 3": "is silent", "line 4": "is silent"}
    for i in (0, 1):
        replace_bad(q, known, [q[i]], BadClip(q[i], "is silent"))
    with pytest.raises(InputError, match="no question has a usable clip"):
        replace_bad(q, known, [q[2]], BadClip(q[2], "is silent"))


# ---- held-out questions ----


def test_heldout_scores_are_those_of_the_completions(mmau, clean, monkeypatch):
    monkeypatch.setattr(answering, "prediction", lambda text: prediction(text) if "a" in text else "rain")
    model, processor = load_policy(str(mmau / "model"), torch.float32, CPU)
    questions = load_questions(str(mmau / "mmau.json"))
    texts = [record["completion"] for record in json.loads(clean.read_text())]
    right = [mmau_match(q.answer, answering.prediction(t), q.choices) for q, t in zip(questions, texts)]
    expected = np.mean(right), np.mean([format_reward(text, "answer") for text in texts])
    args = settings("out", "--max_new_tokens=10")
    assert score_heldout(args, Run({}, [], questions, None), model, processor) == expected and sum(right) > 0
    assert score_heldout(args, Run({}, [], [], None), model, processor) is None


# ---- a step's end ----


def test_update_is_the_optimizers_step(begun):
    """Its norm is that before clipping."""
    args, _, learner = begun("--max_grad_norm=0.1")
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for p in trained:
        p.grad.fill_(0.01)
    norm = 0.01 * sum(p.numel() for p in trained) ** 0.5
    assert update(args, learner, 1, 1e-3, loss=0.0) == pytest.approx(norm, rel=1e-4)
    for p, old in zip(trained, before):  # AdamW's first step is the rate, whatever the gradient's size
        torch.testing.assert_close(p.detach(), old - 1e-3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss, gradient", [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_what_is_not_finite_changes_no_weight(begun, loss, gradient):
    args, run, learner = begun()
    learner.batch = run.questions[:2]
    before = copy.deepcopy(learner.policy.state_dict())
    next(p for p in learner.policy.parameters() if p.requires_grad).grad.view(-1)[7] = gradient
    said = "^step 4: the (loss|norm of the gradient) is (not finite|nan|inf), with the questions 0, 1; .* no checkpoint"
    with pytest.raises(InputError, match=said):
        update(args, learner, 4, 1e-3, loss)
    assert all(torch.equal(weight, before[name]) for name, weight in learner.policy.state_dict().items())


def test_a_record_has_what_was_measured_and_none_where_nothing_was(begun):
    args, _, learner = begun()
    clock = Clock(CPU)
    with clock("sample"):
        pass
    record, stopping = record_step(args, learner, 3, 0.25, {"reward": 1.5, "kl": None}, clock)
    assert json.loads(Path(args.out, "metrics.jsonl").read_text()) == record and not stopping
    assert {key: record[key] for key in ("step", "lr", "reward", "kl")} == {
        "step": 3,
        "lr": 0.25,
        "reward": 1.5,
        "kl": None,
    }
    assert 0 <= record["seconds_sample"] <= record["seconds"] < 60 and 0.05 < record["peak_memory_gb"] < 100
    os.kill(os.getpid(), signal.SIGTERM)
    record, stopping = record_step(args, learner, 4, 0.25, {}, clock)
    assert stopping and "preempted" not in record


def test_saves_come_when_due_and_when_stopping(begun, tmp_path):
    args, _, learner = begun("--save_every=2")
    out = tmp_path / "run"

    def saved():
        return [[int(path.name[5:]) for path in step_folders(folder)] for folder in (out, out / "resume")]

    seen = []
    for step in range(1, 6):
        training.append_jsonl(out / "metrics.jsonl", {"step": step})
        save_if_due(args, learner, step, stopping=step == 3)
        seen.append(saved())
    assert seen == [[[], []], [[2], [2]], [[2], [3]], [[2, 4], [4]], [[2, 4, 5], [5]]]  # the last step is due
    assert learner.progress == {"step": 5, "position": 15, "before": None}
