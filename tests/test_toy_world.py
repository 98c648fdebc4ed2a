"""The toy's clips and questions: noise, wrong labels and wordings change what they name and nothing else."""

import json

import numpy as np
import pytest
import soundfile

from training.toy_world import KINDS, with_label_noise, write_world


def read(folder):
    """Read a world. Returns (training records, held-out records, samples of each clip)."""
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    clips = {path.name: soundfile.read(path, always_2d=True)[0] for path in sorted((folder / "audio").iterdir())}
    return train, json.loads((folder / "heldout.json").read_text()), clips


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The same small world: plain, with ten times the held-out noise, with half of the labels wrong, in other words."""
    folder = tmp_path_factory.mktemp("worlds")
    changes = {"plain": {}, "noisy": {"heldout_noise": 10.0}, "mislabelled": {"label_noise": 0.5}}
    changes["reworded"] = {"wordings": (2, 1)}
    for name, change in changes.items():
        write_world(folder / name, num_train=20, num_heldout=20, **change)
    return {name: read(folder / name) for name in changes}


def test_heldout_noise_is_added_to_heldout_clips_alone(worlds):
    """The sound is the same and the noise ten times as strong, except in samples clipped to full scale."""
    (train, heldout, plain), (noisy_train, noisy_heldout, noisy) = worlds["plain"], worlds["noisy"]
    assert train == noisy_train and heldout == noisy_heldout and plain.keys() == noisy.keys()
    strength = {"easy": 0.003, "medium": 0.01, "hard": 0.03}
    for record in train:
        name = record["audio_path"].split("/")[-1]
        assert np.array_equal(plain[name], noisy[name])
    for record in heldout:
        name = record["audio_id"].split("/")[-1]
        inside = (abs(plain[name]) < 0.99) & (abs(noisy[name]) < 0.99)
        added = (noisy[name] - plain[name])[inside]  # 9 times the noise of the plain clip
        assert added.std() == pytest.approx(9 * strength[record["difficulty"]], rel=0.15)


def test_label_noise_changes_training_answers_alone(worlds):
    (train, heldout, clips), (noisy_train, noisy_heldout, noisy_clips) = worlds["plain"], worlds["mislabelled"]
    assert heldout == noisy_heldout and all(np.array_equal(clips[name], noisy_clips[name]) for name in clips)
    assert sum(a["answer"] != b["answer"] for a, b in zip(train, noisy_train)) == 10
    assert [a | {"answer": 0} for a in train] == [b | {"answer": 0} for b in noisy_train]


def test_wordings_change_the_texts_alone(worlds):
    """Each answer comes once in every 20 questions; then the next wording is used."""
    (train, heldout, clips), (other_train, other_heldout, other_clips) = worlds["plain"], worlds["reworded"]
    assert clips.keys() == other_clips.keys() and all(np.array_equal(clips[name], other_clips[name]) for name in clips)
    worded = {kind[2][0].replace("video", "audio"): kind[2] for kind in KINDS}
    for before, after, number in [*zip(train, other_train, [2] * 20), *zip(heldout, other_heldout, [1] * 20)]:
        key = "question" if "question" in before else "question_text"
        texts = worded[before[key].replace("video", "audio")]
        assert after[key].replace("video", "audio") == texts[number].replace("video", "audio")
        assert after | {key: before[key], "question_type": 0} == before | {"question_type": 0}


def test_with_label_noise():
    records = [{"id": i, "multi_choice": list("abcd"), "answer": i % 4} for i in range(3000)]
    before = json.dumps(records)
    noisy = with_label_noise(records, 0.3, seed=1)
    assert json.dumps(records) == before and noisy == with_label_noise(records, 0.3, seed=1)
    moved = [(b["answer"] - a["answer"]) % 4 for a, b in zip(records, noisy)]
    assert moved.count(0) == 2100
    assert all(abs(moved.count(k) - 300) < 60 for k in (1, 2, 3))  # all wrong choices equally: deviation 14
    where = [i for i, k in enumerate(moved) if k]
    assert np.mean(where) == pytest.approx(1500, abs=100)  # all over the file: deviation 29
    other = with_label_noise(records, 0.3, seed=2)
    assert other != noisy and sum(a != b for a, b in zip(records, other)) == 900
    assert with_label_noise(records, 0.0, seed=1) == records
    assert not any(a["answer"] == b["answer"] for a, b in zip(records, with_label_noise(records, 1.0, seed=1)))
