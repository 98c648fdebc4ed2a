"""The toy: the world's levers change what they name and nothing else; what the warm start has the model say."""

import json

import numpy as np
import pytest
import soundfile

import toy
from data import TEMPLATES
from reward import extract_answer, format_reward, prediction
from toy_world import with_label_noise, write_world


def read(folder):
    """(training records, held-out records, samples of each clip) of a world."""
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    clips = {path.name: soundfile.read(path, always_2d=True)[0] for path in sorted((folder / "audio").iterdir())}
    return train, json.loads((folder / "heldout.json").read_text()), clips


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The same small world as it is, with ten times the noise held out, and with half of the labels wrong."""
    folder = tmp_path_factory.mktemp("worlds")
    changes = {"plain": {}, "noisy": {"heldout_noise": 10.0}, "mislabelled": {"label_noise": 0.5}}
    for name, change in changes.items():
        write_world(folder / name, num_train=20, num_heldout=20, **change)
    return {name: read(folder / name) for name in changes}


def test_heldout_noise_is_added_to_heldout_clips_alone(worlds):
    """The clip is the same and its noise ten times as strong, as far as samples are not clipped to full scale."""
    (train, heldout, plain), (noisy_train, noisy_heldout, noisy) = worlds["plain"], worlds["noisy"]
    assert train == noisy_train and heldout == noisy_heldout and plain.keys() == noisy.keys()
    strength = {"easy": 0.003, "medium": 0.01, "hard": 0.03}
    for record in train:
        name = record["audio_path"].split("/")[-1]
        assert np.array_equal(plain[name], noisy[name])
    for record in heldout:
        name = record["audio_id"].split("/")[-1]
        inside = (abs(plain[name]) < 0.99) & (abs(noisy[name]) < 0.99)
        added = (noisy[name] - plain[name])[inside]  # 9 times the noise that was there
        assert added.std() == pytest.approx(9 * strength[record["difficulty"]], rel=0.15)


def test_label_noise_changes_training_answers_alone(worlds):
    (train, heldout, clips), (noisy_train, noisy_heldout, noisy_clips) = worlds["plain"], worlds["mislabelled"]
    assert heldout == noisy_heldout and all(np.array_equal(clips[name], noisy_clips[name]) for name in clips)
    assert sum(a["answer"] != b["answer"] for a, b in zip(train, noisy_train)) == 10
    assert [a | {"answer": 0} for a in train] == [b | {"answer": 0} for b in noisy_train]


def test_with_label_noise():
    records = [{"id": i, "multi_choice": list("abcd"), "answer": i % 4} for i in range(3000)]
    before = json.dumps(records)
    noisy = with_label_noise(records, 0.3, seed=1)
    assert json.dumps(records) == before and noisy == with_label_noise(records, 0.3, seed=1)
    moved = [(b["answer"] - a["answer"]) % 4 for a, b in zip(records, noisy)]
    assert moved.count(0) == 2100
    assert all(abs(moved.count(k) - 300) < 60 for k in (1, 2, 3))  # each wrong choice alike: deviation 14
    where = [i for i, k in enumerate(moved) if k]
    assert np.mean(where) == pytest.approx(1500, abs=100)  # all over the file: deviation 29
    other = with_label_noise(records, 0.3, seed=2)
    assert other != noisy and sum(a != b for a, b in zip(records, other)) == 900
    assert with_label_noise(records, 0.0, seed=1) == records
    assert not any(a["answer"] == b["answer"] for a, b in zip(records, with_label_noise(records, 1.0, seed=1)))


def test_make_world_is_complete_or_not_there(tmp_path, monkeypatch):
    def killed(folder, **_):
        (folder / "audio").mkdir()
        (folder / "train.jsonl").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy, "write_world", killed)
        toy.make_world(tmp_path / "world")
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(toy, "write_world", lambda folder, **change: write_world(folder, 4, 4, **change))
    toy.make_world(tmp_path / "world", heldout_noise=2.0, label_noise=0.5)
    made = read(tmp_path / "world")
    write_world(tmp_path / "direct", 4, 4, heldout_noise=2.0, label_noise=0.5)
    assert str(made) == str(read(tmp_path / "direct"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "world"]
    toy.make_world(tmp_path / "world")  # found, and left as it is
    assert str(read(tmp_path / "world")) == str(made)


@pytest.mark.parametrize("template", TEMPLATES)
def test_warm_start_text_has_the_rewarded_form(template):
    text = toy.warm_start_text("stays the same", template)
    assert format_reward(text, template) == 1.0 and prediction(text) == "stays the same"
    assert text.count("stays the same") == (2 if template == "think" else 1)
    assert (extract_answer(text) is None) == (template == "direct")
