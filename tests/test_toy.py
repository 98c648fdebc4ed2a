"""The toy: its world is made whole, what the warm start has the model say, and the command."""

import json
import sys

import pytest

import toy
from data import TEMPLATES
from reward import extract_answer, format_reward, prediction
from toy_world import write_world


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    made = contents(tmp_path / "world")
    write_world(tmp_path / "direct", 4, 4, heldout_noise=2.0, label_noise=0.5)
    assert made == contents(tmp_path / "direct") and len(made) == 8 + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "world"]
    toy.make_world(tmp_path / "world")  # found, and left as it is
    assert contents(tmp_path / "world") == made


@pytest.mark.parametrize("template", TEMPLATES)
def test_warm_start_text_has_the_rewarded_form(template):
    text = toy.warm_start_text("stays the same", template)
    assert format_reward(text, template) == 1.0 and prediction(text) == "stays the same"
    assert text.count("stays the same") == (2 if template == "think" else 1)
    assert (extract_answer(text) is None) == (template == "direct")


# ---- the command ----


def listen(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, flags)])
    toy.main()


def test_command_makes_the_world_and_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "write_world", lambda folder, **change: write_world(folder, 20, 4, **change))
    listen(monkeypatch, "--listen")
    assert "picture: runs/toy/listen.png" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "runs" / "toy").iterdir()) == ["listen.png", "world"]
    first = (tmp_path / "runs" / "toy" / "listen.png").read_bytes()
    listen(monkeypatch, "--listen", "--out", "other.png", "--seed", 0)
    assert (tmp_path / "other.png").read_bytes() == first


def test_command_with_the_users_questions(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = [{"audio": q.audio, "question": "$?", "choices": ["a", "b"], "answer": "a"} for q in questions]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    listen(monkeypatch, "--listen", "--questions", "mine.json", "--out", "mine.png")
    assert "picture: mine.png" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.png"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "the following arguments are required: --questions, --out"),
        (["--questions", "x"], "the following arguments are required: --out"),
        (["--listen", "--questions", "x"], "the following arguments are required: --out"),
        (["--listen", "--audio_dir", "x"], "--audio_dir needs --questions"),
        (["--listen", "--steps", "3"], "--steps does not go with --listen"),
        (["--listen", "--skip_bad_audio"], "--skip_bad_audio does not go with --listen"),
        (["--listen", "--out", "questions.json"], "let --out end in .png"),
    ],
    ids=str,
)
def test_command_asks_for_what_it_needs(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        listen(monkeypatch, *flags)
    assert message in capsys.readouterr().err
