"""The toy's world is complete or missing. The targets of the warm start earn the format reward."""

import time

import pytest
from forked import another_owner

from data import TEMPLATES
from infra.errors import InputError
from reward import extract_answer, format_reward, prediction
from training import toy_model
from training.toy_world import write_world


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_make_world_is_complete_or_missing(tmp_path, monkeypatch):
    def killed(folder, **_):
        (folder / "audio").mkdir()
        (folder / "train.jsonl").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_model, "write_world", killed)
        toy_model.make_world(tmp_path / "world")
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(toy_model, "write_world", lambda folder, **change: write_world(folder, 4, 4, **change))
    toy_model.make_world(tmp_path / "world", heldout_noise=2.0, label_noise=0.5)
    made = contents(tmp_path / "world")
    write_world(tmp_path / "direct", 4, 4, heldout_noise=2.0, label_noise=0.5)
    assert made == contents(tmp_path / "direct") and len(made) == 8 + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "world"]
    toy_model.make_world(tmp_path / "world")  # found, not changed
    assert contents(tmp_path / "world") == made


@pytest.mark.parametrize("ended", ["complete", "killed"])
@pytest.mark.parametrize("name", ["world", "base"])
def test_two_jobs_make_the_toy_once(tmp_path, monkeypatch, name, ended):
    """The second job waits for the first one. If the first one was killed, the second one makes the folder."""
    made = []
    monkeypatch.setattr(toy_model, "write_world", lambda folder, **change: made.append("world"))
    monkeypatch.setattr(toy_model, "load_questions", lambda path: [])
    monkeypatch.setattr(toy_model, "make_base", lambda questions, out: made.append("base"))
    if name == "base":
        (tmp_path / "world").mkdir()

    def end_the_first(seconds):
        if ended == "complete":
            (tmp_path / name).mkdir()
        else:
            job.kill()
        job.communicate()

    monkeypatch.setattr(time, "sleep", end_the_first)
    with another_owner(tmp_path / f"{name}.owner.json") as job:
        (tmp_path / f"{name}.unfinished").mkdir()
        toy_model.make_toy(tmp_path)
    assert (name in made) == (ended == "killed")
    assert not list(tmp_path.glob("*.owner.json"))


def test_a_world_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(folder, **change):
        raise RuntimeError("Error opening '0.wav': System error.")  # soundfile's errors

    monkeypatch.setattr(toy_model, "write_world", full)
    with pytest.raises(InputError, match="world: could not be written .Error opening '0.wav': System error.*; check"):
        toy_model.make_world(tmp_path / "world")


@pytest.mark.parametrize("template", TEMPLATES)
def test_warm_start_text_earns_the_format_reward(template):
    text = toy_model.warm_start_text("stays the same", template)
    assert format_reward(text, template) == 1.0 and prediction(text) == "stays the same"
    assert text.count("stays the same") == (2 if template == "think" else 1)
    assert (extract_answer(text) is None) == (template == "direct")
