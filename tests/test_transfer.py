"""The worlds of reproduce.py --transfer, and what it measures of a checkpoint against the plain way."""

import hashlib
import json

import numpy as np
import pytest
import soundfile
import torch
from plain_way import full_prompt, plain_logits

from data import load_questions
from model.checkpoints import save_checkpoint
from paper import transfer
from policy import encode_targets, sample_group, stop_token_ids
from training import toy_model
from training.toy_world import KINDS, write_world

KNOWN = {text.replace("video", "audio"): number for kind in KINDS for number, text in enumerate(kind[2])}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The four worlds, with 40 questions each."""
    folder = tmp_path_factory.mktemp("worlds")

    def small(world, num_train, num_heldout, **settings):
        write_world(world, min(num_train, 60), min(num_heldout, 40), **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_model, "write_world", small)
        transfer.make_worlds(folder)
    return folder


def test_training_asks_about_noisy_sounds_and_the_test_about_all_in_other_words(worlds):
    known = load_questions(str(worlds / "known" / "train.jsonl"))
    asked = {name: load_questions(str(worlds / name / "heldout.json")) for name in ("trained", "test", "clean")}
    assert {KNOWN[q.question] for q in known} == {0, 1, 2} and len({q.question for q in known}) == 3 * len(KINDS)
    assert {(q.task, KNOWN[q.question]) for q in asked["trained"]} == {("sound", 0)}
    tested = {(task, wording) for task in ("sound", "music", "speech") for wording in (1, 2)}
    assert {(q.task, KNOWN[q.question]) for q in asked["test"]} == tested
    for noisy, clean in zip(asked["test"], asked["clean"], strict=True):  # the same clips with more noise
        assert (noisy.question, noisy.choices, noisy.answer) == (clean.question, clean.choices, clean.answer)
    for q, noise in zip(asked["clean"], (soundfile.read(q.audio)[0] - soundfile.read(c.audio)[0] for q, c in
                                         zip(asked["test"], asked["clean"]))):  # fmt: skip
        strength = {"easy": 0.003, "medium": 0.01, "hard": 0.03}[q.difficulty]
        assert np.median(abs(noise)) == pytest.approx(0.6745 * 4 * strength, rel=0.2)  # of a normal distribution
    clips = [hashlib.sha256(path.read_bytes()).digest() for path in worlds.glob("*/audio/*")]
    assert len(set(clips)) == len(clips) == 60 + 3 * 40  # no clip of the base's or of training is in the test
    ids = [json.loads(path.read_text()) for path in worlds.glob("*/heldout.json")]
    assert sorted(map(len, ids)) == [0, 40, 40, 40]


@pytest.fixture(scope="module")
def checkpoints(worlds, tmp_path_factory):
    """Return (policy, base, questions): folders of two random models, and questions with three and four choices."""
    questions = load_questions(str(worlds / "test" / "heldout.json"))[:15]
    folder = tmp_path_factory.mktemp("checkpoints")
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    save_checkpoint(folder / "base", model, processor)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_checkpoint(folder / "policy", model, processor)
    return str(folder / "policy"), str(folder / "base"), questions


def test_measure_is_the_plain_way(checkpoints, monkeypatch):
    """Choices one by one, and sums of log-probs of the completions that the same generator draws."""
    policy, base, questions = checkpoints
    monkeypatch.setattr(transfer, "BATCH", 1)  # the generator then draws for one question after the other
    found = transfer.measure(policy, base, questions, "answer", seed=3)
    (model, processor), (base_model, _) = (transfer.load_policy(x, torch.float32, torch.device("cpu")) for x in
                                           (policy, base))  # fmt: skip

    @torch.no_grad()
    def log_prob(model, prompt, completions, mask):
        logits = plain_logits(model, prompt, completions, mask)
        chosen = logits.double().log_softmax(-1).gather(-1, completions[..., None])[..., 0]
        return (chosen * mask).sum(dim=1)

    generator, stop_ids = torch.Generator().manual_seed(3), stop_token_ids(model, processor)
    for i in sorted(range(len(questions)), key=lambda i: len(questions[i].choices)):
        question, prompt = questions[i], full_prompt(processor, [questions[i]])
        texts = [f"<answer>{choice}</answer>" for choice in question.choices]
        alone = [log_prob(model, prompt, *encode_targets(processor, [text])).item() for text in texts]
        assert found["among_choices"][i] == question.choices[np.argmax(alone)]
        completions, mask, _ = sample_group(model, prompt, transfer.SAMPLES, 32, 1.0, stop_ids, generator)
        ratio = log_prob(model, prompt, completions, mask) - log_prob(base_model, prompt, completions, mask)
        assert found["kl"][i] == pytest.approx(ratio.mean().item(), abs=2e-3)
    assert len(set(found["among_choices"])) > 1 and np.mean(found["kl"]) > 0.1


def test_a_model_has_no_divergence_from_itself(checkpoints):
    """In batches of mixed numbers of choices, the answers among the choices are the same as one by one."""
    policy, _, questions = checkpoints
    found = transfer.measure(policy, policy, questions, "answer", seed=0)
    assert found["kl"] == pytest.approx([0.0] * len(questions), abs=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "BATCH", 1)
        assert transfer.measure(policy, policy, questions, "answer", 0)["among_choices"] == found["among_choices"]
    assert all(choice in question.choices for choice, question in zip(found["among_choices"], questions))
