"""The contact sheet: which clips are drawn, the text above them, and their spectrograms."""

from collections import Counter

import matplotlib.image
import numpy as np
import pytest
import soundfile

from data import Question, load_questions
from evaluation.contact_sheet import bin_of, draw_contact_sheet, lines_of, log_mel, pick
from infra.errors import InputError
from training.toy_world import KINDS, write_world


def asked(text, answer="a", choices=("a", "b"), audio="x.wav"):
    return Question("1", audio, text, list(choices), answer)


def test_pick_takes_different_questions_then_answers_then_clips():
    some = [asked(text, answer, audio=f"{i}.wav") for text in "pqr" for answer in "ab" for i in range(20)]
    for seed in range(5):
        picked = pick(some, 8, seed)
        assert sorted(Counter(q.question for q in picked).values()) == [2, 3, 3]
        assert set(Counter(q.answer for q in picked).values()) == {4}
        assert len({q.audio for q in picked}) == 8
        assert picked == pick(some, 8, seed)
    assert pick(some, 8, 0) != pick(some, 8, 1)
    uneven = [asked("p", str(i)) for i in range(20)] + [asked("q", "always this")] * 20
    assert Counter(q.question for q in pick(uneven, 8, 0)) == {"p": 4, "q": 4}
    assert len(pick(some[:3], 8, 0)) == 3


def test_pick_shows_every_kind_of_the_toys_questions(tmp_path):
    write_world(tmp_path, num_train=100, num_heldout=1)
    picked = pick(load_questions(str(tmp_path / "train.jsonl")), 8, 0)
    assert len({q.question for q in picked}) == len(KINDS) and len({q.answer for q in picked}) == 8


@pytest.mark.parametrize("mel_bins", [40, 128])
@pytest.mark.parametrize("hertz", [500.0, 1000.0, 2000.0, 4000.0])
def test_a_tone_is_bright_where_the_axis_says(hertz, mel_bins):
    time = np.arange(int(1.3 * 16_000)) / 16_000
    mel = log_mel((0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32), mel_bins)
    assert mel.shape == (mel_bins, 130)
    brightest = mel[:, 20:110].mean(axis=1).argmax()
    assert abs(brightest - bin_of(hertz, mel_bins)) < 0.75


def test_log_mel_is_whispers_own_scale():
    """The scale is (log10 of the power + 4) / 4, so ten times the amplitude adds 2 / 4."""
    noise = np.random.default_rng(0).normal(0, 0.01, 16_000).astype(np.float32)
    quiet, loud = log_mel(noise, 40), log_mel(10 * noise, 40)
    assert np.abs(loud - quiet - 0.5).max() < 1e-3


def test_lines_mark_the_right_answer_and_keep_it_among_many():
    texts = [line for line, *_ in lines_of(asked("What?", "b"))]
    assert texts == ["What?", "– a", "✓ b"]
    texts = [line for line, *_ in lines_of(asked("What?", "z", "abcdefghz"))]
    assert texts == ["What?", "– a", "– b", "– c", "– d", "– e", "✓ z", "   and 3 more"]
    texts = [line for line, *_ in lines_of(asked("What?", "b", "abcdefgh"))]
    assert texts == ["What?", "– a", "✓ b", "– c", "– d", "– e", "– f", "   and 2 more"]
    texts = [line for line, *_ in lines_of(asked("What?", "none of them"))]
    assert texts == ["What?", "– a", "– b", "✓ none of them"]
    texts = [line for line, *_ in lines_of(asked("What?", None))]
    assert texts == ["What?", "– a", "– b", "   answer withheld"]
    texts = [line for line, *_ in lines_of(asked("long words " * 50, "a", ["a", "x" * 99, "many words " * 20]))]
    assert len(texts) == 6 and max(map(len, texts)) <= 40


def test_the_answer_is_found_in_another_spelling_of_unicode():
    question = Question("0", "a.wav", "What?", ["the\u0301", "tea"], "th\u00e9")
    assert [(text, weight) for text, _, weight in lines_of(question)[1:]] == [
        ("✓ the\u0301", "bold"),
        ("– tea", "normal"),
    ]


def test_chinese_lines_end_after_any_character_and_have_half_as_many():
    texts = [line for line, *_ in lines_of(asked("雨a" + "声" * 80, "铃" * 40, ["铃" * 40, "雨 b"]))]
    assert texts == ["雨a" + "声" * 18, "声" * 19, "声" * 18 + " …", "✓ " + "铃" * 16 + " …", "– 雨 b"]


def test_picture(questions, tmp_path):
    """Texts and names that look like formulas are drawn as they are. A choice may be empty."""
    soundfile.write(tmp_path / "quiet$_$.wav", np.full(16_000, 1e-3), 16_000)
    odd = asked("costs $5 and $\\frac", "$", ["$", ""], str(tmp_path / "quiet$_$.wav"))
    path = tmp_path / "new" / "sheet.png"
    draw_contact_sheet(path, [odd, *questions], 40, 30)
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 1760 and picture[:, :, :3].std() > 0.1
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(InputError, match="the picture cannot be written"):
        draw_contact_sheet(path.parent, [odd], 40, 30)
    assert [file.name for file in path.parent.parent.iterdir() if "unfinished" in file.name] == []
