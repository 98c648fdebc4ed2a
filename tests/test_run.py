"""The object Run: the questions of a step, held-out scores, the checks before an update, metrics and saves."""

import copy
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import soundfile
import test_tensorboard
import torch
import torch.distributed as dist

import grpo_aqa
from data import Question, load_questions, step_indices
from infra.errors import InputError
from model.checkpoints import load_policy
from policy import BadClip, data_parallel, encode_prompts
from reward import format_reward, mmau_match, prediction
from training import heldout
from training import run as run_module
from training.groups import Groups
from training.metrics import append_jsonl
from training.optimizer import ShardedAdamW, trainable
from training.run import Run, replace_bad
from training.run_folder import find_state, step_folders
from training.tensorboard import completions_tables, heading

CPU = torch.device("cpu")


def settings(out, *flags):
    """Return the settings of a run of five steps with three questions each."""
    given = ["--steps=5", "--prompts_per_rank=3", "--accumulation_steps=1", "--lr=0.5", "--max_new_tokens=8"]
    return grpo_aqa.parse_args(["--model=m", "--data=d", f"--out={out}", *given, *flags])


@pytest.fixture
def begin(one_rank, tiny, questions, tmp_path, monkeypatch):
    """A function that starts a run in tmp_path / "run" on a copy of the tiny model, as grpo_aqa.train does."""
    handler = signal.getsignal(signal.SIGTERM)
    model, processor = tiny

    def begin(*flags, asked=questions):
        args = settings(tmp_path / "run", *flags)
        checked = vars(args) | {"world_size": 1, "launchers": []}, asked, [], None, 2.0
        monkeypatch.setattr(run_module, "check_inputs", lambda *_: checked)
        monkeypatch.setattr(run_module, "load_on_all_ranks", lambda *_: (copy.deepcopy(model).float(), processor))
        run = Run(args, "GRPO", CPU)
        policy, _ = run.load_policy()
        data_parallel(policy, run.first_prompt(), run.args.gradient_checkpointing)
        optimizer = ShardedAdamW(trainable(policy))
        run.start(optimizer, partial(step_indices, len(asked), prompts_per_rank=3, rank=0, seed=args.seed))
        return run

    yield begin
    signal.signal(signal.SIGTERM, handler)


def batches(run):
    """Return the questions of each remaining step."""
    found = []
    for _ in run.steps():
        found.append(run.next_batch()[0])
    return found


def test_the_longest_prompt_fits_the_decoders_memory(begin, questions, tiny):
    """The bound exceeds the longest prompt by the bound of the markup, and by text and clip of different questions."""
    bound = begin().longest_prompt()
    for order in permutations(range(3)):  # of the choices
        asked = [replace(q, choices=[q.choices[i] for i in order if i < len(q.choices)]) for q in questions]
        prompt = encode_prompts(tiny[1], asked, "answer")
        assert 0 <= bound - prompt["input_ids"].shape[1] < 60


# ---- the questions of a step ----


def test_each_question_comes_once_an_epoch(begin, questions):
    run = begin()
    seen = []
    for step in run.steps():
        batch, prompt = run.next_batch()
        seen.append((step, batch, prompt))
        assert list(run.clock.phases) == ["data"]
    assert [step for step, *_ in seen] == [1, 2, 3, 4, 5]
    asked = [question.id for _, batch, _ in seen for question in batch]
    for epoch in range(0, 12, 4):
        assert sorted(asked[epoch : epoch + 4]) == sorted(question.id for question in questions)
    for _, batch, prompt in seen:
        expected = encode_prompts(run.processor, batch, run.args.template)
        assert all(torch.equal(prompt[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flags", [[], ["--vary_choice_order"]])
@pytest.mark.parametrize("done", [3, 5])
def test_a_resumed_run_takes_the_remaining_steps(begin, monkeypatch, done, flags):
    whole = batches(begin(*flags))
    run = begin(*flags)
    monkeypatch.setattr(run_module, "open_run", lambda *_: None)
    monkeypatch.setattr(run_module, "load_state", lambda *_: {"step": done, "position": 3 * done, "before": None})
    run.state = "a state"
    run.start(run.optimizer, run.order)
    assert batches(run) == whole[done:]


def test_the_order_of_choices_varies_if_asked_for(begin, monkeypatch):
    """The seed and a question's position decide it, for any number of ranks."""
    run, choices = begin(), ["a", "b", "c", "d"]
    run.questions = [Question(str(i), f"{i}.wav", "What?", choices, "a") for i in range(2)]

    def stream(ranks=1, **changes):
        """The questions of 20 epochs, in the order of the stream. changes: of the settings."""
        vars(run.args).update(changes, prompts_per_rank=4 // ranks)
        found = []
        for position in range(0, 40, 4):
            for rank in range(ranks):
                run.order = partial(step_indices, 2, prompts_per_rank=4 // ranks, rank=rank, seed=run.args.seed)
                with monkeypatch.context() as patch:
                    patch.setattr(dist, "get_rank", lambda rank=rank: rank)
                    found += run._share(position)
        return found

    given = stream()
    assert len(given) == 40 and all(question is run.questions[int(question.id)] for question in given)
    varied = stream(vary_choice_order=True)
    assert [(q.id, Counter(q.choices), q.answer) for q in varied] == [(q.id, Counter(choices), "a") for q in given]
    assert len({tuple(question.choices) for question in varied if question.id == "0"}) > 10  # of the 24 orders
    assert stream(ranks=2) == varied
    assert [question.choices for question in stream(seed=1)] != [question.choices for question in varied]


def test_sigterm_ends_the_steps(begin):
    run = begin()
    taken = []
    for step in run.steps():
        taken.append(step)
        run.stopping = step == 2
    assert taken == [1, 2]


@pytest.fixture
def bad(tmp_path):
    """A question whose clip only turns out bad when it is decoded."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(8_000), 16_000)
    return Question("bad", str(tmp_path / "silent.wav"), "What?", ["x", "y"], "x", place="d, line 9")


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_clip_may_be_bad(begin, questions, bad, skip):
    """Every rank decodes it before the first step."""
    if not skip:
        with pytest.raises(InputError, match=r"d, line 9: .*silent\.wav"):
            begin(asked=[bad, *questions])
        return
    run = begin("--skip_bad_audio", asked=[bad, *questions])
    asked = [question.id for batch in batches(run) for question in batch]
    assert len(asked) == 15 and "bad" not in asked and list(run.bad_clips) == ["d, line 9"]


@pytest.mark.parametrize("flags", [[], ["--skip_bad_audio"], ["--skip_bad_audio", "--vary_choice_order"]])
def test_a_bad_clip_in_a_step(begin, questions, bad, flags):
    """It ends the run with one line. With --skip_bad_audio, another question replaces its question."""
    placed = [replace(question, place=f"d, line {i}") for i, question in enumerate(questions)]
    run = begin(*flags, asked=[*placed, bad])
    if not flags:
        with pytest.raises(InputError, match=r"^step [12]: d, line 9: .*silent\.wav: .*--resume --skip_bad_audio; "):
            batches(run)
        return
    counted, asked = 0, []
    for _ in run.steps():
        asked += [question.id for question in run.next_batch()[0]]
        assert set(run.replaced) <= {"d, line 9"}
        counted += run.replaced.count("d, line 9")
    assert counted == 3 and len(asked) == 15 and "bad" not in asked  # three epochs of five
    assert list(run.bad_clips) == ["d, line 9"]


def test_the_next_good_question_replaces_one_with_a_bad_clip():
    """After the last question comes the first. The replacement is the same, whichever other bad clips are known."""
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


def test_heldout_scores_equal_those_of_the_completions(begin, mmau, clean, monkeypatch):
    monkeypatch.setattr(
        heldout, "prediction", lambda text, choices: prediction(text, choices) if "a" in text else "rain"
    )
    model, processor = load_policy(str(mmau / "model"), torch.float32, CPU)
    questions = load_questions(str(mmau / "mmau.json"))
    texts = [record["completion"] for record in json.loads(clean.read_text())]
    right = [mmau_match(q.answer, heldout.prediction(t, q.choices), q.choices) for q, t in zip(questions, texts)]
    expected = np.mean(right), np.mean([format_reward(text, "answer") for text in texts])
    run = begin("--max_new_tokens=10")
    assert run.progress["before"] is None  # without held-out questions
    run.policy, run.processor, run.heldout = model, processor, questions
    assert run._score_heldout(step=3) == expected and sum(right) > 0
    assert run.progress["heldout"] == {"3": right}


def test_heldout_questions_are_scored_every_few_steps_and_after_the_last(begin, questions, monkeypatch, capsys):
    """Their time is not part of `seconds`. The state remembers which questions are right, for the best step's test."""
    answers = {2: [True, False, False], 4: [True, True, False], 5: [True, False, False]}
    monkeypatch.setattr(run_module, "score_heldout", lambda *_: time.sleep(0.2) or (answers[run.step], 1.0))
    monkeypatch.setattr(run_module, "heldout_table", lambda *_: "the table")
    run = begin("--heldout=q", "--heldout_every=2")
    run.heldout, run.progress["heldout"] = questions[:3], {"0": [True, True, True]}  # the start is no step to name
    for _ in run.steps():
        run.record(0.1, {}, shown=[])
        run.save_if_due()
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("heldout_accuracy") for line in lines] == [None, 1 / 3, None, 2 / 3, 1 / 3]
    assert [line.get("heldout_questions") for line in lines] == [None, 3, None, 3, 3]
    assert all(line["seconds"] < 0.2 <= line["seconds_heldout"] for line in lines if "seconds_heldout" in line)
    assert run.progress["heldout"] == {"0": [True] * 3} | {str(step): right for step, right in answers.items()}
    monkeypatch.setattr(run_module, "score_heldout", None)  # the last step's scores are there
    run.finish()
    said = capsys.readouterr().out
    assert "the table\nbest: step_000004 with 66.67%\nwarning: its lead, if any, may be luck; 2 of the 2" in said


# ---- the end of a step ----


@pytest.mark.parametrize("loss, grad_norm", [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_loss_or_norm_that_is_not_finite_stops_the_run(begin, loss, grad_norm):
    run = begin()
    run.step = 4
    line = "^step 4: the (loss|norm of the gradient) is (not finite|nan|inf), with the questions 0, 1; .* no checkpoint"
    with pytest.raises(InputError, match=line):
        run.require_finite(loss, grad_norm, run.questions[:2])
    run.require_finite(1.0, 1e30, [])


def test_a_record_has_the_measured_values_and_none_for_the_others(begin):
    run = begin()
    steps = run.steps()
    next(steps)
    with run.clock("sample"):
        pass
    run.record(0.25, {"reward": 1.5, "kl": None}, shown=["reward", "kl", "seconds"])
    [record] = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    expected = {"step": 1, "lr": 0.25, "reward": 1.5, "kl": None}
    assert {key: record[key] for key in expected} == expected and not run.stopping and "preempted" not in record
    assert 0 <= record["seconds_sample"] <= record["seconds"] < 60 and 0.05 < record["peak_memory_gb"] < 100
    os.kill(os.getpid(), signal.SIGTERM)
    run.record(0.25, {}, shown=[])
    assert run.stopping and list(steps) == []


def test_tensorboard_shows_the_runs_files(begin, questions):
    """A run of five steps ends, and continues from its state of step 3. Then each step is in the log once."""

    def train(run):
        for step in run.steps():
            batch, prompt = run.next_batch()
            run.record(0.1, {"loss": random.random(), "kl": None}, shown=[])
            tokens, rewards = torch.zeros(6, 1), torch.rand(3, 2)
            groups = Groups(batch, prompt, tokens, tokens, tokens, [f"{step}"] * 6, {"accuracy": rewards}, rewards)
            run.log_completions(groups, rewards)
            run.save_if_due()
            if step == 3:
                shutil.copytree(run.out / "resume", run.out / "kept")

    run = begin("--tensorboard", "--log_completions_every=2", "--save_state_every=3")
    train(run)
    shutil.rmtree(run.out / "resume")
    run.state = (run.out / "kept").rename(run.out / "resume") / "step_000003"
    run.start(run.optimizer, run.order)
    train(run)
    log = test_tensorboard.read(run.out)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for name in lines[0].keys() - {"step", "kl"}:
        shown = log[f"{heading(name)}/{name}"]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    records = [json.loads(line) for line in (run.out / "completions.jsonl").read_text().splitlines()]
    tables = [(step, completions_tables([r for r in records if r["step"] == step]).encode()) for step in (2, 4)]
    assert log["completions/text_summary"] == tables and len(records) == 6
    switched = run.config | {"tensorboard": False, "log_kl": True}  # a resume may switch both on and off
    assert find_state(run.out, switched, resume=True).name == "step_000005"


def test_a_missing_package_ends_a_run_before_its_model_is_looked_at(one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "require_tensorboard", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_module.check_inputs(settings(tmp_path, "--tensorboard"), "GRPO", [])


def test_saves_happen_when_due_and_when_stopping(begin, tmp_path):
    """A checkpoint and a state may come alone. Both come after the last step."""
    run = begin("--save_every=2", "--save_state_every=3")
    out = tmp_path / "run"

    def saved():
        return [[int(path.name[5:]) for path in step_folders(folder)] for folder in (out, out / "resume")]

    seen = []
    for run.step in range(1, 6):
        run.progress["position"] += 3
        append_jsonl(out / "metrics.jsonl", {"step": run.step})
        run.stopping = run.step == 1
        run.save_if_due()
        seen.append(saved())
    assert seen == [[[], [1]], [[2], [1]], [[2], [3]], [[2, 4], [3]], [[2, 4, 5], [5]]]
    assert run.progress == {"step": 5, "position": 15, "before": None}
