"""Ablations: the same questions with silence, with other clips and with other orders of the choices."""

import json
import random
import re
import shutil
import statistics
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import soundfile
from eval_runs import QUESTIONS, answers_in, arguments, evaluate

import policy
from data import Question, load_questions
from evaluation import ablations
from evaluation.report import checkpoint_report
from evaluation.scores import mcnemar_exact
from infra.errors import InputError
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
    out, needing = tmp_path / "out.json", tmp_path / "needs audio.jsonl"
    assert evaluate(*arguments(mmau, out, "--ablations", "--seed", 5, "--write_needs_audio", needing)) == 0
    assert len(loads) == 1 and out.read_bytes() == clean.read_bytes()
    printed = capsys.readouterr().out
    assert [name for name in ("plain", "silence", "another question's audio", "choices shuffled", "guessing", "S (list")
            if name not in printed] == []  # fmt: skip
    [folder] = re.findall(rf"^train with --data '{needing}' --audio_dir (.*)$", printed, re.MULTILINE)
    trained_on = load_questions(str(needing), folder)
    assert all(question in load_questions(str(mmau / "mmau.json")) for question in trained_on)
    assert f"{needing}: {len(trained_on)} of 20 questions are wrong with" in printed and trained_on
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


# ---- tables ----


def make_questions(number):
    tasks = ("sound", "music")
    return [
        Question(str(i), f"{i}.wav", "What?", ["dog", "cat", "a cow"][: 2 + i % 2], "dog", tasks[i % 5 // 3])
        for i in range(number)
    ]


def cells(table):
    """Split a table into lines of cells, which are at least two spaces apart."""
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


def test_listening_resamples_the_questions():
    rng = np.random.default_rng(1)
    plain, silent, other = (rng.random(80) < share for share in (0.8, 0.5, 0.3))
    share, low, high = ablations.listening(list(plain), list(silent), list(other))
    assert share == pytest.approx(plain.mean() - (silent.mean() + other.mean()) / 2)
    resampled = []
    for _ in range(20_000):
        drawn = rng.integers(80, size=80)
        resampled.append(plain[drawn].mean() - (silent[drawn].mean() + other[drawn].mean()) / 2)
    assert [low, high] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.013)
    assert ablations.listening([True] * 4, [False] * 4, [False] * 4) == (1.0, 1.0, 1.0)
    assert ablations.listening([True, False], [True, False], [True, False]) == (0.0, 0.0, 0.0)


def test_ablation_table():
    questions, rng = make_questions(60), random.Random(2)
    chances = {"plain": 0.8, "silence": 0.4, "another question's audio": 0.3}
    conditions = {name: [rng.random() < p for _ in questions] for name, p in chances.items()}
    conditions["choices shuffled"] = list(conditions["plain"])
    lines = cells(ablations.ablation_table(questions, conditions))
    assert lines[0] == ["accuracy", "95% interval", "right", "difference", "p"]
    assert [line[0] for line in lines[1:]] == [
        name for group in ("all", "sound", "music") for name in (group, *conditions, "guessing", "S (listening)")
    ]
    for start, task in ((1, None), (8, "sound"), (15, "music")):
        own = [i for i, question in enumerate(questions) if task in (None, question.task)]
        rights = [sum(correct[i] for i in own) for correct in conditions.values()]
        table = lines[start + 1 : start + 7]
        assert [line[3] for line in table[:4]] == [f"{right}/{len(own)}" for right in rights]
        assert [line[1] for line in table[:4]] == [f"{r / len(own) * 100:.2f}%" for r in rights]
        assert len(table[0]) == 4  # the first is compared with nothing
        pairs = [(conditions["plain"][i], conditions["silence"][i]) for i in own]
        p = mcnemar_exact(pairs.count((True, False)), pairs.count((False, True)))
        difference = (rights[1] - rights[0]) / len(own) * 100
        assert table[1][4:] == [f"{difference:+.2f}", "<0.0001" if p < 0.0001 else f"{p:.4f}"]
        assert table[3][4:] == ["+0.00", "1.0000"]
        chance = statistics.fmean(1 / len(questions[i].choices) for i in own)
        assert table[4] == ["guessing", f"{100 * chance:.2f}%"]
        gained = (rights[0] - (rights[1] + rights[2]) / 2) / len(own)
        assert table[5][1] == f"{100 * gained:+.2f}"
        low, high = map(float, table[5][2].strip("[]").split(", "))
        assert low < 100 * gained < high < low + 70


def test_orders_table():
    """The answer of a question without a usable clip, always empty, is not the same in all orders."""
    questions, rng = make_questions(30), random.Random(0)
    said = [[rng.choice(["dog", "dog", "dog", "a cow"]) for _ in questions] for _ in range(4)]
    names = ["plain", "order 2", "order 3", "order 4"]
    predicted = {name: [{"model_prediction": text} for text in own] for name, own in zip(names, said)}
    for records in predicted.values():
        records[0] |= {"model_prediction": "", "error": "missing"}
    lines = checkpoint_report(questions, predicted, None, "; the clips were silence")
    table = {line[0]: line[1:] for line in cells(lines[0])}
    assert table.pop("4 orders of the choices") == ["all (30)", "sound (18)", "music (12)"]
    for column, task in enumerate((None, "sound", "music")):
        own = [i for i, question in enumerate(questions) if task in (None, question.task)]
        shares = [100 * sum(i > 0 and order[i] == "dog" for i in own) / len(own) for order in said]
        kept = 100 * sum(i > 0 and len({order[i] for order in said}) == 1 for i in own) / len(own)
        expected = [statistics.fmean(shares), statistics.stdev(shares), kept]
        assert [float(row[column].rstrip("%")) for row in table.values()] == pytest.approx(expected, abs=0.00501)
    assert list(table) == ["mean accuracy", "deviation", "same answer in all orders"]
    assert lines[1] == "guessing would score 41.67%; the clips were silence"


# ---- orders of the choices ----


def test_orders_of_the_choices(mmau, clean, tmp_path, monkeypatch, asked, capsys):
    """Order 1 is the file's own. Finished orders are not computed again. Another seed gives other orders."""
    loads, original = [], checkpoints.load_policy
    monkeypatch.setattr(checkpoints, "load_policy", lambda *args: loads.append(1) or original(*args))
    out = tmp_path / "out.json"
    assert evaluate(*arguments(mmau, out, "--orders", 2)) == 0
    assert out.read_bytes() == clean.read_bytes() and len(loads) == 1 and len(asked) == 2 * QUESTIONS
    assert evaluate(*arguments(mmau, out, "--orders", 3)) == 0
    assert len(loads) == 2 and len(asked) == 3 * QUESTIONS  # only the third order is new
    assert "3 orders of the choices" in capsys.readouterr().out
    names = ["out.json", "out_order_2.json", "out_order_3.json"]
    assert [path.name for path in sorted(tmp_path.glob("*.json")) if "settings" not in path.name] == names

    given = {q.id: q for q in load_questions(str(mmau / "mmau.json"))}
    first, second, third = ([q for q, _ in asked[i : i + QUESTIONS]] for i in range(0, 3 * QUESTIONS, QUESTIONS))
    assert all(given[q.id] == q for q in first)
    orders = [{q.id: q.choices for q in own} for own in (first, second, third)]
    for order in orders:
        assert all(Counter(choices) == Counter(given[name].choices) for name, choices in order.items())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_seeds_of_orders_are_all_different():
    """One order of --orders is that of --shuffle_choices with the same seed."""
    questions = [Question(str(i), "a.wav", "What?", list("abcdef"), "a") for i in range(3)]
    questions.append(Question("open", "a.wav", "What?", [], "a"))
    seen = set()
    for seed in range(3):
        args = Namespace(ablations=False, orders=4, seed=seed, silence=False, shuffle_audio=False, shuffle_choices=None)
        plain, *others = ablations.variants(args).values()
        assert ablations.change(questions, plain, seed) == questions
        for changes in others:
            changed = ablations.change(questions, changes, seed)
            assert changed[3] == questions[3] and len({tuple(q.choices) for q in changed[:3]}) > 1
            seen.add(str([q.choices for q in changed]))
    assert len(seen) == 9


# ---- questions that need their sound ----


def test_questions_that_need_their_sound(tmp_path):
    """If MMAU's rule cannot tell the choices apart, exact comparison decides."""
    signs, animals = ["+", "-"], ["dog", "cat"]
    cases = [  # choices, answer, predictions (plain, silence, another clip), the written field or None if left out
        (animals, "dog", "dog", "cat", "cat", True),
        (animals, "dog", "cat", "cat", "cat", False),
        (animals, "dog", "dog", "dog", "cat", None),
        (animals, "dog", "dog", "cat", "A dog!", None),
        (animals, None, "dog", "cat", "cat", None),
        (signs, "+", "+", "-", "-", True),
        (signs, "+", "+", "+", "-", None),
        (animals, "dog", "", "", "", None),  # no usable clip
    ]
    records, questions = [], []
    predicted = {"plain": [], "silence": [], "another question's audio": []}
    for i, (choices, answer, *said, _) in enumerate(cases):
        records.append(
            {"audio": f"{i}.wav", "question": "Wo läuft es?", "choices": choices, "answer": answer, "mine": 7}
        )
        questions.append(Question(str(i), f"{i}.wav", "Wo läuft es?", choices, answer, place=f"q, line {i}"))
        for own, text in zip(predicted.values(), said):
            own.append({"model_prediction": text} | ({"error": "missing"} if i == 7 else {}))
    records[1]["right_with_audio"] = True  # of an earlier evaluation
    ablations.check_needs_audio(records, questions)
    line = ablations.write_needs_audio(str(tmp_path / "q.jsonl"), records, questions, predicted, "")
    assert line.splitlines() == [
        f"{tmp_path}/q.jsonl: 3 of 6 questions are wrong with silence and with another clip; "
        "2 of these are right with their own",
        f"train with --data {tmp_path}/q.jsonl --audio_dir .",
    ]
    written = [json.loads(text) for text in (tmp_path / "q.jsonl").read_text().splitlines()]
    wanted = [(record, case[-1]) for record, case in zip(records, cases) if case[-1] is not None]
    assert written == [record | {"right_with_audio": right} for record, right in wanted]
    assert [q.question for q in load_questions(str(tmp_path / "q.jsonl"))] == ["Wo läuft es?"] * 3
    records[2]["right_with_audio"] = "the left one"
    with pytest.raises(InputError, match="^q, line 2: has the field 'right_with_audio', .*; rename the field$"):
        ablations.check_needs_audio(records, questions)


def test_all_right_answers_of_an_open_question_are_written(tmp_path):
    """The rows with the other answers may be left out. Without questions, no file is written."""
    question = Question("0", "a.wav", "What?", [], "dog", also=["hound"])
    said = {name: [{"model_prediction": text}] for name, text in
            (("plain", "hound"), (ablations.SILENCE, "cat"), (ablations.OTHER_CLIP, "cat"))}  # fmt: skip
    record, path = {"audio": "a.wav", "question": "What?", "answer": "dog"}, tmp_path / "q.jsonl"
    ablations.write_needs_audio(str(path), [record], [question], said, "")
    assert json.loads(path.read_text()) == record | {"answer": ["dog", "hound"], "right_with_audio": True}
    path.unlink()
    line = ablations.write_needs_audio(str(path), [record], [question], said | {ablations.SILENCE: said["plain"]}, "")
    assert line.startswith("0 of 1 questions") and not path.exists()
