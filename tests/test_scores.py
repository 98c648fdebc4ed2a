"""Scores: statistics against independent ways of computing them, tables against counting by hand."""

import itertools
import json
import math
import random
import re
import statistics
import unicodedata
from fractions import Fraction

import pytest

from data import Question
from evaluation import scores
from infra.errors import InputError
from reward import mmau_match

Z = 1.959964


def make_questions(number, seed=0, tasks=("sound", "music", "speech")):
    rng = random.Random(seed)
    choices = ["dog", "cat", "a cow", "a dog"]
    return [
        Question(str(i), f"{i}.wav", f"What is {i}?", choices[: rng.randint(2, 4)], rng.choice(choices[:2]),
                 rng.choice(tasks), rng.choice(["easy", "medium", "hard"]), rng.choice(["Ä & b", "c", None]))
        for i in range(number)
    ]  # fmt: skip


def cells(line):
    """Split a table's line into its cells, which are at least two spaces apart."""
    return re.split(r" {2,}", line.strip())


# ---- Wilson's interval ----


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (1, 2), (0, 44), (3, 44), (43, 44), (44, 44), (645, 1000),
                                            (1, 1000), (999, 1000), (6000, 9000)])  # fmt: skip
def test_wilson_interval_ends_where_the_score_test_turns(correct, total):
    """The ends solve |share - p| = z sqrt(p (1 - p) / n), solved here by bisection."""
    share = correct / total

    def rejected(p):
        return abs(share - p) > Z * math.sqrt(p * (1 - p) / total)

    def end(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    low, high = scores.wilson_interval(correct, total)
    assert low == pytest.approx(end(share, 0.0) if correct else 0.0, abs=1e-12)
    assert high == pytest.approx(end(share, 1.0) if correct < total else 1.0, abs=1e-12)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize("correct, total, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                       (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])  # fmt: skip
def test_wilson_interval_of_a_published_table(correct, total, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert scores.wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_the_edges():
    assert scores.wilson_interval(0, 0) == (0.0, 1.0)
    for total in (*range(1, 2000), 10**9):
        low, high = scores.wilson_interval(0, total)
        assert low == 0.0 and 0 < high < 1
        assert scores.wilson_interval(total, total) == pytest.approx((1 - high, 1.0), abs=1e-12)
        assert scores.wilson_interval(total, total)[1] == 1.0
    wide, narrow = (scores.wilson_interval(30, 100, z) for z in (Z, 1.0))
    assert wide[0] < narrow[0] < 0.3 < narrow[1] < wide[1]


# ---- an interval over seeds and questions ----


def test_resampled_interval_against_drawing_one_by_one():
    rng = random.Random(0)
    values = [[float(rng.random() < share) for _ in range(40)] for share in (0.5, 0.7, 0.9)]
    means = []
    for _ in range(4000):
        seeds = rng.choices(range(3), k=3)
        questions = rng.choices(range(40), k=40)
        means.append(statistics.mean(values[seed][question] for seed in seeds for question in questions))
    ends = statistics.quantiles(means, n=40)
    assert scores.resampled_interval(values) == pytest.approx((ends[0], ends[-1]), abs=0.02)


def test_resampled_interval_of_questions_or_seeds_alone():
    """One seed: nearly Wilson's interval. Questions that do not differ: only the seeds vary."""
    assert scores.resampled_interval([[1.0] * 480 + [0.0] * 120]) == pytest.approx(
        scores.wilson_interval(480, 600), abs=0.004
    )
    assert scores.resampled_interval([[0.25] * 7, [0.75] * 7]) == (0.25, 0.75)
    assert scores.resampled_interval([[-1.0, 1.0] * 50] * 3) == pytest.approx((-0.196, 0.196), abs=0.02)


# ---- McNemar's test ----


def test_mcnemar_counts_tosses():
    """p is the share of all sequences of fair tosses that are at least as lopsided as the observed one."""
    for tosses in range(11):
        lopsided = [abs(2 * sum(sequence) - tosses) for sequence in itertools.product((0, 1), repeat=tosses)]
        for a in range(tosses + 1):
            share = Fraction(sum(seen >= abs(2 * a - tosses) for seen in lopsided), len(lopsided))
            assert scores.mcnemar_exact(a, tosses - a) == float(share)


@pytest.mark.parametrize("tosses", [25, 60, 301])
def test_mcnemar_equals_binomial_tails(tosses):
    for a in range(tosses + 1):
        tails = sum(Fraction(math.comb(tosses, k), 2**tosses) for k in range(tosses + 1)
                    if abs(2 * k - tosses) >= abs(2 * a - tosses))  # fmt: skip
        assert scores.mcnemar_exact(a, tosses - a) == float(tails)


def test_mcnemar_of_many_questions():
    """Ten thousand changed questions do not overflow."""
    p = scores.mcnemar_exact(5100, 4900)
    assert scores.mcnemar_exact(10_000, 0) == 0.0 and scores.mcnemar_exact(5000, 5000) == 1.0
    logs = [math.lgamma(10_001) - math.lgamma(k + 1) - math.lgamma(10_001 - k) for k in range(4901)]
    assert p == pytest.approx(2 * math.fsum(math.exp(log - 10_000 * math.log(2)) for log in logs), rel=1e-8)
    assert scores.mcnemar_exact(0, 1000) == 2.0**-999
    assert scores.mcnemar_exact(0, 0) == scores.mcnemar_exact(1, 0) == 1.0


def test_verdict():
    told = scores.verdict(1, 9, "first", "second")
    assert told == "only first right: 1, only second right: 9; McNemar's exact test: p = 0.0215, second is better"
    assert scores.verdict(9, 1, "a", "b").endswith("p = 0.0215, a is better")
    assert scores.verdict(2, 8, "a", "b").endswith("p = 0.1094, no difference can be told")
    assert scores.discordant([True, True, False, False], [False, True, True, False]) == (1, 1)


# ---- several samples ----


def test_pass_at_k_counts_subsets():
    """pass@k is the share of all subsets of k samples that hold a right one."""
    for total in range(1, 8):
        for correct, k in itertools.product(range(total + 1), range(1, total + 1)):
            subsets = list(itertools.combinations([True] * correct + [False] * (total - correct), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert scores.pass_at_k(correct, total, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_at_the_edges():
    assert scores.pass_at_k(500, 1000, 1) == 0.5
    assert scores.pass_at_k(1, 2000, 1000) == pytest.approx(0.5)
    assert scores.pass_at_k(0, 2000, 2000) == 0.0 and scores.pass_at_k(1, 2000, 2000) == 1.0
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match="pass@"):
            scores.pass_at_k(2, 4, k)


def test_majority_vote():
    assert scores.majority_vote(["a", "b", "b"]) == "b"
    assert scores.majority_vote(["a", "b", "b", "a", "c"]) == "a"
    assert scores.majority_vote(["b", "a"]) == "b"
    assert scores.majority_vote(["", "", "a"]) == ""


@pytest.mark.parametrize("k_samples, rows", [(1, ["1 samples each", "mean of the samples (pass@1)", "majority vote"]),
                                             (2, ["pass@2"]), (6, ["pass@2", "pass@4", "pass@6"]),
                                             (8, ["pass@2", "pass@4", "pass@8"])])  # fmt: skip
def test_samples_table(k_samples, rows):
    questions = make_questions(40, tasks=("speech", "sound"))
    rng = random.Random(k_samples)
    correct = [[rng.random() < chance for _ in range(k_samples)] for chance in [rng.random() for _ in questions]]
    votes = [rng.random() < 0.5 for _ in questions]
    table = [cells(line) for line in scores.samples_table(questions, correct, votes).splitlines()]
    printed = {line[0]: line[1:] for line in table}
    assert [row for row in rows if row not in printed] == []
    assert [line[0] for line in table if "pass@" in line[0]][1:] == [row for row in rows if row.startswith("pass@")]
    assert len(printed) == len(table)
    assert ("deviation between samplings" in printed) == (k_samples > 1)

    groups = [[i for i, q in enumerate(questions) if task in (None, q.task)] for task in (None, "sound", "speech")]
    names = [f"{name} ({len(group)})" for name, group in zip(("all", "sound", "speech"), groups)]
    assert printed[f"{k_samples} samples each"] == names
    for column, group in enumerate(groups):
        runs = [statistics.fmean(correct[i][k] for i in group) for k in range(k_samples)]
        expected = {
            "mean of the samples (pass@1)": statistics.fmean(runs),
            "majority vote": statistics.fmean(votes[i] for i in group),
        }
        if k_samples > 1:
            expected["deviation between samplings"] = statistics.stdev(runs)
            own = [statistics.stdev(map(float, correct[i])) for i in group]
            expected["deviation within a question"] = statistics.fmean(own)
            expected[f"pass@{k_samples}"] = statistics.fmean(any(correct[i]) for i in group)
            pairs = list(itertools.combinations(range(k_samples), 2))
            expected["pass@2"] = statistics.fmean(correct[i][j] or correct[i][k] for i in group for j, k in pairs)
        for name, value in expected.items():
            assert float(printed[name][column].rstrip("%")) == pytest.approx(100 * value, abs=0.00501), name
        low, high = scores.wilson_interval(sum(votes[i] for i in group), len(group))
        assert printed["its 95% interval"][column] == f"[{100 * low:.2f}, {100 * high:.2f}]"


# ---- accuracy ----


def test_percent_rounds_as_mmau_does():
    """evaluation.py prints (right / total) * 100; 100 * right / total may differ in the last decimal, as at 23/160."""
    assert scores.percent(23, 160) == "14.37%" != f"{100 * 23 / 160:.2f}%"
    assert all(scores.percent(c, n) == f"{(c / n) * 100:.2f}%" for n in range(1, 400) for c in range(n + 1))
    assert scores.percent(0, 0) == "-"


def test_p_text():
    assert [scores.p_text(p) for p in (1.0, 0.0274, 0.0001, 0.00009, 0.0)] == [
        "1.0000", "0.0274", "0.0001", "<0.0001", "<0.0001"
    ]  # fmt: skip


def test_accuracy_table_counts_as_mmau_does():
    """Against a transcription of MMAU's evaluation.py, which counts an empty prediction as wrong."""
    questions = make_questions(300)
    rng = random.Random(1)
    said = [rng.choice([q.answer, q.answer.upper() + "!", "", "cat", "a dog or a cow"]) for q in questions]
    correct = [mmau_match(q.answer, prediction, q.choices) for q, prediction in zip(questions, said)]
    tallies = {"task": {}, "difficulty": {}, "sub_category": {}}
    right = 0
    for question, prediction in zip(questions, said):
        words = {word for word in re.split(r"\W+", prediction.lower()) if word}
        others = {w for choice in question.choices for w in choice.split()} - set(question.answer.split())
        hit = words >= set(question.answer.split()) and words & others == set()
        right += hit
        for field, tally in tallies.items():
            value = getattr(question, field)
            if value is not None:
                pair = tally.setdefault(value, [0, 0])
                pair[0] += hit
                pair[1] += 1
    expected = [["all", f"{right / 300 * 100:.2f}%", f"{right}/300"]]
    orders = (["sound", "music", "speech"], ["easy", "medium", "hard"], ["c", "Ä & b"])
    for (field, tally), order in zip(tallies.items(), orders):
        assert set(order) == set(tally)
        expected += [[field, v, f"{(c / n) * 100:.2f}%", f"{c}/{n}"] for v in order for c, n in [tally[v]]]
    header, *lines = scores.accuracy_table(questions, correct).splitlines()
    assert cells(header) == ["accuracy", "95% interval", "right"]
    assert [[*row[:-2], row[-1]] for row in map(cells, lines)] == expected
    for row in map(cells, lines):
        low, high = scores.wilson_interval(*map(int, row[-1].split("/")))
        assert row[-2] == f"[{100 * low:.2f}, {100 * high:.2f}]"
    assert all(len(line) == len(header) for line in lines)


def test_accuracy_of_questions_with_other_categories_or_none():
    questions = [Question("0", "a.wav", "What?", ["x", "y"], "x")]
    assert [cells(line) for line in scores.accuracy_table(questions, [True]).splitlines()[1:]] == [
        ["all", "100.00%", "[20.65, 100.00]", "1/1"]
    ]
    assert "all" in scores.accuracy_table([], [])
    assert scores.accuracy_by(questions, [True], "task") == {}
    assert scores.in_order({"z", "hard", "a", "sound", "easy"}) == ["sound", "easy", "hard", "a", "z"]
    with pytest.raises(ValueError):
        scores.accuracy_by(questions, [True, False], "task")


# ---- predictions files ----


def write_predictions(path, said, **changes):
    """Write a predictions file. changes: a key's value by question number."""
    records = [
        {"id": f"q{i}", "audio_id": f"./audio/{i}.wav", "question": f"What is {i}?", "choices": ["dog", "cat", "cow"],
         "answer": "dog", "task": "sound", "model_prediction": text, "model_output": text, "completion": text}
        for i, text in enumerate(said)
    ]  # fmt: skip
    for key, values in changes.items():
        for number, value in values.items():
            records[number][key] = value
    path.write_text(json.dumps(records, ensure_ascii=False, indent=2))
    return str(path)


A = ["dog", "dog", "cat", "dog", ""]
B = ["dog", "cat\n" + 50 * "and cat ", "dog", "dog", "cow"]


def test_compare(tmp_path):
    printed = scores.compare(write_predictions(tmp_path / "a.json", A), write_predictions(tmp_path / "b.json", B))
    lines = [cells(line) for line in printed.splitlines()]
    assert lines[1][:2] + lines[1][3:] == ["A", "60.00%", "3/5", str(tmp_path / "a.json")]
    assert lines[2][:2] + lines[2][3:] == ["B", "60.00%", "3/5", str(tmp_path / "b.json")]
    assert lines[3] == ["only A right: 1, only B right: 1; McNemar's exact test: p = 1.0000, no difference can be told"]
    assert lines[5] == ["id", "answer", "A's prediction", "B's prediction"]
    assert lines[6][:4] == ["only A", "q1", "dog", "dog"] and lines[6][4].startswith("cat and cat")
    assert len(lines[6][4]) == 60 and lines[6][4].endswith("…")
    assert lines[7] == ["only B", "q2", "dog", "cat", "dog"]
    assert lines[8] == ["answered differently, but both right or both wrong: 1"]
    assert len(lines) == 9


def test_compare_names_the_better_one(tmp_path):
    good, bad = (write_predictions(tmp_path / name, [text] * 8) for name, text in (("good", "dog"), ("bad", "")))
    assert "p = 0.0078, A is better" in scores.compare(good, bad)
    assert "p = 0.0078, B is better" in scores.compare(bad, good)
    assert "(empty)" in scores.compare(good, bad)
    same = scores.compare(good, good)
    assert "p = 1.0000" in same and "q0" not in same and "differently" not in same


def test_compare_leaves_out_questions_without_an_answer(tmp_path):
    paths = [write_predictions(tmp_path / name, said, answer={0: "", 2: None}) for name, said in (("a", A), ("b", B))]
    printed = scores.compare(*paths)
    assert "only A right: 1, only B right: 0" in printed and "2/3" in printed and "1/3" in printed
    assert "2 questions have no answer and are not compared" in printed
    none = write_predictions(tmp_path / "none", A, answer=dict.fromkeys(range(5)))
    with pytest.raises(InputError, match="none of the 5 questions has an answer"):
        scores.compare(none, none)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"question": {3: "Who?"}}, ["number 4", "the question 'What is 3?'", "'Who?'", "q3"]),
        ({"audio_id": {1: "x.wav"}}, ["number 2", "the clip '1.wav'"]),
        ({"choices": {0: ["dog", "cat"]}}, ["number 1", "the choices"]),
        ({"answer": {4: ""}}, ["number 5", "the answer 'dog'", "None"]),
    ],
)
def test_compare_refuses_other_questions(tmp_path, changes, named):
    a, b = write_predictions(tmp_path / "a", A), write_predictions(tmp_path / "b", B, **changes)
    with pytest.raises(InputError) as error:
        scores.compare(a, b)
    assert [text for text in [a, b, *named] if text not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_compare_refuses_more_questions_and_accepts_shuffled_choices(tmp_path):
    a, shorter = write_predictions(tmp_path / "a", A), write_predictions(tmp_path / "b", B[:4])
    with pytest.raises(InputError, match="holds 5 questions and .* holds 4: they cannot be compared"):
        scores.compare(a, shorter)
    elsewhere = {"choices": {0: ["cow", "dog", "cat"]}, "audio_id": {1: "/elsewhere/1.wav"}}
    assert "only A right: 0" in scores.compare(a, write_predictions(tmp_path / "c", A, **elsewhere))


def test_reading_predictions(tmp_path):
    path = write_predictions(tmp_path / "a", A, choices={2: ["cat", "dog"]}, model_output={1: "other"})
    questions, said = scores.read_predictions(path)
    assert said == A and questions[2].choices == ["cat", "dog"] and questions[0].task == "sound"
    assert [scores.is_right(*pair) for pair in zip(questions, said)] == [True, True, False, True, False]
    assert scores.is_right(questions[0], "A DOG!") and not scores.is_right(questions[0], "dog, cat")
    records = json.loads((tmp_path / "a").read_text())
    for record in records:
        del record["model_prediction"]
    (tmp_path / "b").write_text("\n".join(map(json.dumps, records)))
    assert scores.read_predictions(tmp_path / "b")[1] == [A[0], "other", *A[2:]]
    del records[3]["model_output"]
    (tmp_path / "b").write_text(json.dumps(records))
    with pytest.raises(InputError, match="record 4: no text model_prediction"):
        scores.read_predictions(tmp_path / "b")
    nulls = write_predictions(tmp_path / "c", A, model_prediction={0: None}, model_output={0: "other"})
    assert scores.read_predictions(nulls)[1] == ["other", *A[1:]]
    with pytest.raises(InputError, match="record 1: no text model_prediction"):
        scores.read_predictions(write_predictions(tmp_path / "c", A, model_prediction={0: 3}))


# ---- questions whose choices the rule cannot tell apart ----

APART = [  # choices, answer, whether MMAU's rule tells them apart, share of the choices that it calls right
    (["dog", "cat"], "dog", True, 1 / 2),
    (["a dog", "a dog", "a cat", "a cow", "a hen"], "a dog", True, 2 / 5),
    (["a cat", "a cat", "a dog"], "a dog", True, 1 / 3),
    (["+", "-"], "+", False, 0),
    (["C", "C#"], "C#", False, 1),
    (["rain, then wind", "wind, then rain", "rain"], "wind, then rain", False, 2 / 3),
    (["\u0926\u093f\u0928", "\u0926\u093e\u0928"], "\u0926\u093f\u0928", False, 1),  # Hindi: day, gift
    (["ninety", "ninety-one hundred and ninety"], "ninety", True, 1 / 2),
    (["th\u00e9", "caf\u00e9"], "th\u00e9", True, 1 / 2),
    (["the\u0301", "tea"], "th\u00e9", False, 0),  # the rule does not know that both spell the same word
    (["dogs!", "cat"], "Dogs", True, 1 / 2),
    (["Rain", "Wind"], "(B) Wind", True, 0),  # no choice is the answer: exact comparison could not decide either
]


@pytest.mark.parametrize("choices, answer, apart, share", APART)
def test_exact_comparison_where_the_rule_fails(choices, answer, apart, share):
    question = Question("7", "a.wav", "What?", choices, answer)
    assert scores.choices_told_apart(question) is apart
    assert scores.guessing([question]) == pytest.approx(share)
    assert share == pytest.approx(sum(mmau_match(answer, choice, choices) for choice in choices) / len(choices))
    if not apart:
        verdicts = [scores.is_right_exactly(question, choice) for choice in choices]
        assert verdicts == [unicodedata.normalize("NFC", choice) == answer for choice in choices]
    else:
        assert scores.is_right_exactly(question, f"It is {answer}!") == scores.is_right(question, f"It is {answer}!")


def test_both_figures_stand_side_by_side(tmp_path):
    """MMAU's own figure stays. A second, labelled one follows, with the ids of the questions."""
    signs = [Question(f"s{i}", "a.wav", "What?", ["+", "-"], "+") for i in range(3)]
    questions = [*make_questions(5), *signs]
    right = [q.known_answer for q in questions]
    lines = scores.exact_figures(questions, {"": right})
    assert lines == ["MMAU's rule cannot tell the choices of 3 questions apart: s0, s1, s2",
                     "accuracy if exact comparison decides these: 100.00%"]  # fmt: skip
    wrong = ["dog", *right[1:]] if right[0] != "dog" else ["cat", *right[1:]]
    assert scores.exact_figures(questions, {"x": right, "y": wrong})[1].endswith("these: x 100.00%, y 87.50%")
    assert scores.exact_figures(make_questions(5), {"": right[:5]}) == []
