"""Ablations: the same questions with silence, with other clips and with shuffled choices."""

import shutil
from collections import Counter

import pytest
import soundfile
from eval_runs import QUESTIONS, answers_in, arguments, evaluate

import policy
from data import Question, load_questions
from evaluation import ablations
from model import checkpoints


@pytest.fixture
def asked(monkeypatch):
    """(question, silence) of each encoded prompt."""
    seen, original = [], policy.encode_prompts

    def encode(processor, questions, template, silence=False):
        seen.extend((question, silence) for question in questions)
        return original(processor, questions, template, silence)

    monkeypatch.setattr(policy, "encode_prompts", encode)
    return seen


def test_ablations_load_the_model_once_and_write_four_files(mmau, clean, tmp_path, monkeypatch, asked, capsys):
    loads, original = [], checkpoints.load_policy
    monkeypatch.setattr(checkpoints, "load_policy", lambda *args: loads.append(1) or original(*args))
    out = tmp_path / "out.json"
    assert evaluate(*arguments(mmau, out, "--ablations", "--seed", 5)) == 0
    assert len(loads) == 1 and out.read_bytes() == clean.read_bytes()
    printed = capsys.readouterr().out
    assert [name for name in ("plain", "silence", "another question's audio", "choices shuffled", "guessing")
            if name not in printed] == []  # fmt: skip
    given = {q.id: q for q in load_questions(str(mmau / "mmau.json"))}
    plain, silent, exchanged, shuffled = (asked[i : i + QUESTIONS] for i in range(0, 4 * QUESTIONS, QUESTIONS))
    assert all(given[q.id] == q and not silence for q, silence in plain)
    assert all(given[q.id] == q and silence for q, silence in silent)
    assert all(given[q.id].audio != q.audio and given[q.id].choices == q.choices for q, _ in exchanged)
    assert {q.audio for q, _ in exchanged} == {q.audio for q in given.values()}
    assert all(given[q.id].audio == q.audio and Counter(given[q.id].choices) == Counter(q.choices) for q, _ in shuffled)
    assert any(given[q.id].choices != q.choices for q, _ in shuffled)
    names = ["out.json", "out_shuffled_audio.json", "out_shuffled_choices.json", "out_silence.json"]
    assert [path.name for path in sorted(tmp_path.glob("*.json")) if "settings" not in path.name] == names
    assert len({(tmp_path / name).read_bytes() for name in names}) == 4

    for flags, name in ((["--silence"], names[3]), (["--shuffle_audio", "--seed", 5], names[1]),
                        (["--shuffle_choices", 5], names[2])):  # fmt: skip
        assert evaluate(*arguments(mmau, tmp_path / "alone.json", *flags)) == 0
        assert answers_in(tmp_path / "alone.json") == answers_in(tmp_path / name)
    del loads[:]
    assert evaluate(*arguments(mmau, out, "--ablations", "--seed", 5)) == 0 and loads == []

    # Clips of the same names and sizes, but one of them has another sound.
    shutil.copytree(mmau / "test-mini-audios", tmp_path / "test-mini-audios")
    flags = arguments(mmau, out, "--ablations", "--seed", 5, "--audio_dir", tmp_path)
    assert evaluate(*flags) == 0 and loads == []
    clip = tmp_path / "test-mini-audios" / "clip-0.wav"
    soundfile.write(clip, -soundfile.read(clip)[0][::-1], 16_000)
    assert evaluate(*flags) == 0 and loads == [1]


@pytest.mark.parametrize("clips", ["abcdefgh", "aabbccdd", "aaabbccd", "aaaabcde", "ab", "aabb", "abbcccdddd"])
def test_no_question_keeps_its_clip(clips):
    questions = [Question(str(i), clip, "", ["x", "y"], "x") for i, clip in enumerate(clips)]
    outcomes = set()
    for seed in range(20):
        exchanged = ablations.exchange_clips(questions, seed)
        assert [q.id for q in exchanged] == [q.id for q in questions]
        assert Counter(q.audio for q in exchanged) == Counter(clips)
        assert all(q.audio != clip for q, clip in zip(exchanged, clips))
        assert exchanged == ablations.exchange_clips(questions, seed)
        outcomes.add("".join(q.audio for q in exchanged))
    assert len(outcomes) > 5 or len(clips) <= 4


def test_a_clip_of_most_questions_is_kept_by_as_few_as_possible():
    """Six questions share clip a and two have others: four of the six must keep a."""
    questions = [Question(str(i), clip, "", ["x", "y"], "x") for i, clip in enumerate("aaaaaabc")]
    exchanged = ablations.exchange_clips(questions, 0)
    assert sum(q.audio == p.audio for q, p in zip(exchanged, questions)) == 4
    assert ablations.exchange_clips([], 0) == []


def test_a_single_clip_cannot_be_exchanged(mmau, tmp_path, capsys):
    assert evaluate(*arguments(mmau, tmp_path / "out.json", "--shuffle_audio", "--limit", 1)) == 1
    assert "more than one clip" in capsys.readouterr().err


def test_names_and_notes_tell_how_questions_were_changed():
    plain = {"silence": False, "shuffle_audio": False, "shuffle_choices": None}
    assert ablations.suffix(plain) == ablations.note(plain) == ""
    assert ablations.suffix(plain | {"silence": True}) == "_silence"
    both = plain | {"shuffle_audio": True, "shuffle_choices": 0}
    assert ablations.suffix(both) == "_shuffled_audio_shuffled_choices"
    assert ablations.note(both) == "; the clips were those of other questions; the choices were in another order"
