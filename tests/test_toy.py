"""toy.py --listen and the flags that it refuses."""

import json
import sys

import pytest
from forked import another_owner

import toy
from infra.errors import InputError
from training import toy_model
from training.toy_world import write_world


def listen(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, flags)])
    toy.main()


def test_command_makes_the_world_and_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy_model, "write_world", lambda folder, **change: write_world(folder, 20, 4, **change))
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


def test_two_commands_with_one_out(questions, tmp_path, monkeypatch):
    records = [{"audio": q.audio, "question": "?", "choices": ["a", "b"], "answer": "a"} for q in questions]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    with another_owner(tmp_path / "base.owner.json"), pytest.raises(InputError, match="another job .process"):
        listen(monkeypatch, "--questions", tmp_path / "mine.json", "--out", tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json"]


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
