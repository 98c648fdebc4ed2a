"""Checks before a model is loaded: all bad clips in one message, good clips remembered, long clips counted."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
from data import Question
from infra.errors import InputError
from training import preflight, toy_model
from training.preflight import (
    check_headers,
    heard_seconds,
    load_checked,
    long_clips_note,
    special_tokens_in,
    unrewardable,
)


@pytest.fixture
def folder(tmp_path):
    """30 questions with a clip each. 25 clips are missing, one is a text file, one is silent."""
    records = [{"audio": f"{i}.wav", "question": "What?", "choices": ["x", "y"], "answer": "x"} for i in range(30)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    for i in range(5):
        soundfile.write(tmp_path / f"{i}.wav", np.full(1600, 0.1 * (i != 3)), 16_000)
    (tmp_path / "2.wav").write_text("no sound")
    return tmp_path


def clips(folder):
    return [str(folder / f"{i}.wav") for i in range(30)]


def bad(checked):
    return [path for path, (fault, _) in checked.items() if fault is not None]


def test_all_problems_are_reported_together(folder):
    """The message has the counts, the first 20 problems with their lines, and the remedy."""
    with pytest.raises(InputError) as error:
        load_checked(str(folder / "q.jsonl"), None, skip_bad_audio=False)
    first, *lines = str(error.value).split("\n")
    assert first.startswith("26 of 30 questions have no usable clip; ") and "--skip_bad_audio" in first
    assert len(lines) == 21 and lines[-1] == "  ... and 6 more"
    assert "q.jsonl, line 3: " in lines[0] and "2.wav: cannot be read as audio" in lines[0]
    assert "q.jsonl, line 6: " in lines[1] and "5.wav: no audio file" in lines[1]


@pytest.mark.parametrize("decode, left", [(False, [0, 1, 3, 4]), (True, [0, 1, 4])])
def test_skipping_keeps_the_good_questions_and_prints_how_many_are_bad(folder, capsys, decode, left):
    """The header of a silent clip is good. Only its samples show that it is silent."""
    checked = load_checked(str(folder / "q.jsonl"), None, skip_bad_audio=True, decode=decode)
    assert [int(Path(question.audio).stem) for question in checked.questions] == left
    assert len(checked.skipped) == 30 - len(left)
    reported = capsys.readouterr().out
    assert reported.startswith(f"{30 - len(left)} of 30 questions have no usable clip; going on without them\n")


def test_no_usable_clip_is_an_error_even_with_skipping(folder):
    for i in range(5):
        (folder / f"{i}.wav").unlink()
    with pytest.raises(InputError, match="30 of 30"):
        load_checked(str(folder / "q.jsonl"), None, skip_bad_audio=True)


@pytest.mark.parametrize("skip", [False, True])
def test_bad_records_and_bad_clips_are_reported_together(folder, skip):
    """--skip_bad_audio skips bad clips only: a bad record is still an error."""
    good = {"audio": "0.wav", "question": "What?", "choices": ["x", "y"], "answer": "x"}
    records = [good, good | {"answer": None}, good | {"answer": "z"}, good | {"audio": "9.wav"}, [], good]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{")
    with pytest.raises(InputError) as error:
        load_checked(str(folder / "q.jsonl"), None, skip_bad_audio=skip)
    first, *lines = str(error.value).split("\n")
    assert first == f"{5 - skip} problems"
    reported = {line.split("line ")[1][0]: line.split(": ", 1)[1] for line in lines}
    expected = {"7": "not valid JSON", "5": "expected a JSON object", "3": "answer 'z'", "2": "has no answer"}
    expected |= {} if skip else {"4": str(folder / "9.wav")}
    assert reported.keys() == expected.keys() and all(reported[i].startswith(text) for i, text in expected.items())


def test_good_clips_are_opened_once(folder, monkeypatch):
    """A good clip with the same size and time is not opened again. A bad clip is: a disk that failed may work again."""
    cache, opened = folder / "run" / "cache.json", []
    original = preflight.audio_seconds
    monkeypatch.setattr(preflight, "audio_seconds", lambda path: opened.append(Path(path).stem) or original(path))
    checked = check_headers(clips(folder), cache)
    assert len(bad(checked)) == 26 and sorted(opened, key=int) == [str(i) for i in range(30)]
    opened.clear()
    assert check_headers(clips(folder), cache) == checked
    assert sorted(opened, key=int) == [str(i) for i in range(30) if i not in (0, 1, 3, 4)]
    opened.clear()
    soundfile.write(folder / "0.wav", np.ones(3200), 16_000)  # another size
    os.utime(folder / "1.wav", ns=(0, 0))  # another time
    soundfile.write(folder / "2.wav", np.ones(3200), 16_000)  # repaired
    (folder / "4.wav").unlink()
    checked = check_headers(clips(folder), cache)
    assert len(bad(checked)) == 26 and checked[str(folder / "0.wav")] == (None, 0.2)  # 3,200 samples
    assert {"0", "1", "2", "4"} <= set(opened) and "3" not in opened


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"x": 1}', '{"0.wav": [1, 2]}', "\ud800"])
def test_a_damaged_cache_is_ignored(folder, content):
    cache = folder / "cache.json"
    cache.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert len(bad(check_headers(clips(folder), cache))) == 26
    assert str(folder / "0.wav") in json.loads(cache.read_text())


# ---- texts ----


def ask(answer, *others, question="What?", place="q.jsonl, line 1"):
    return Question("0", "a.wav", question, [answer, *others], answer, place=place)


def test_every_special_token_is_found_by_name(tiny):
    tokens = toy_model.SPECIAL_TOKENS
    added = [token.content for token in tiny[1].tokenizer.added_tokens_decoder.values() if token.special]
    assert sorted(added) == sorted(tokens)
    for token in tokens:
        for question in (ask("x", "y", question=f"Why {token}?"), ask(f"x{token}", "y"), ask("x", token)):
            [line] = special_tokens_in([ask("x", "|im_end|"), question], added)
            assert line.startswith(f"q.jsonl, line 1: has the special token {token};")


@pytest.mark.parametrize("template", ["direct", "answer", "think"])
def test_right_answers_in_any_script_can_be_rewarded(tiny, template):
    """Decomposed text, marks, joiners, several lines, quotes, backslashes, emoji: the rewards see what was asked."""
    answers = ["cafe\u0301", "caf\u00e9", "दिन", "क्\u200dष", "犬の\u3000声", "10\u00a0km", "C:\\new", "+", "C#", "🎵"]
    answers += ['it\'s "it"', " a dog ", "dog\n", "مرحبا", "\u1100\u1161", "½", "\u2460", "a<b", "</s>", "one\ntwo"]
    assert unrewardable(tiny[1], [ask(answer, "other") for answer in answers], template, 100) == []


def test_right_answers_that_cannot_be_rewarded_are_listed_with_the_reason(tiny):
    long = tiny[1].tokenizer("<answer>a dog and a dog</answer>")["input_ids"]
    questions = [
        ask("a dog and a dog", "cat", place="p1"),
        ask("</answer>", "x", place="p2"),
        ask("dog", "cat", place="p3"),
    ]
    questions += [dataclasses.replace(ask("dog", "cat", place="p4"), answer="Dog")]
    questions += [dataclasses.replace(ask("dog", "cat", place="p5"), answer=None)]
    lines = unrewardable(tiny[1], questions, "answer", len(long) - 1)
    assert [line.split(":")[0] for line in lines] == ["p1", "p2", "p4"]
    assert f"it takes {len(long)} tokens; raise --max_new_tokens to {len(long)} or more" in lines[0]
    assert "the right answer '</answer>' cannot be rewarded: the rewards do not find it" in lines[1]
    assert "is not one of the choices" in lines[2]
    assert len(unrewardable(tiny[1], questions, "answer", len(long))) == 2
    opened = [dataclasses.replace(ask(answer, "cat"), choices=[]) for answer in ("dog", "Dog", "one\ntwo")]
    [line] = unrewardable(tiny[1], opened, "answer", 100)  # the paper's expression reads one line
    assert "the right answer 'one\\ntwo' cannot be rewarded" in line


def test_an_answer_that_the_prompt_does_not_show_is_listed(tiny, monkeypatch):
    monkeypatch.setitem(data.TEMPLATES, "answer", "{question} Answer.")
    [line] = unrewardable(tiny[1], [ask("dog", "cat")], "answer", 100)
    assert "the prompt does not contain it" in line


# ---- lengths of clips ----


def test_clips_longer_than_the_model_hears_are_counted():
    assert long_clips_note([2.0, 30.0, 29.9], heard=30.0) is None
    expected = "2 of 4 clips are longer than 30 s: the model hears their first 30 s"
    assert long_clips_note([2.0, 30.5, 900.0, 30.0], heard=30.0) == expected


def test_lengths_equal_those_of_the_clips(folder, mmau):
    for decode in (False, True):
        checked = load_checked(str(folder / "q.jsonl"), None, skip_bad_audio=True, decode=decode)
        assert checked.seconds == {question.audio: 0.1 for question in checked.questions}
    assert heard_seconds(str(mmau / "model")) == 2.0  # the seconds that the tiny model hears
