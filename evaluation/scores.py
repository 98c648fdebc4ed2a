"""Score predictions: accuracy, intervals, significance tests.

Plain functions on plain lists. MMAU's rule (reward.mmau_match) decides whether a prediction is right; reward.open_match
does for questions without choices. The verdict is never stored: it is computed again from the predictions file. A
question whose answer is withheld is never scored.

The rule compares sets of words, so it cannot tell "+" from "-", or "A, then B" from "B, then A". If a file has
questions with such choices, a second accuracy uses exact comparison for them. Held-out questions in training are not a
published benchmark: their only accuracy is this second one.
"""

import math
import os
import re
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np

from data import Question, answer_is_a_choice, parse_record, share_answers
from infra.errors import InputError, list_names
from questions.fields import present
from questions.reading import find_records, require
from reward import as_choice, in_nfc, mmau_match, open_match

Score = namedtuple("Score", "correct total")
ALL_APART = "MMAU's rule can tell the choices of all questions apart"
FIELDS = ("task", "difficulty", "category", "sub_category")  # a question's labels
PREDICTED = ("model_prediction", "model_output", "answer_prediction", "response")  # MMAU's keys, MMAR's, MMSU's
_FIRST = ("sound", "music", "speech", "easy", "medium", "hard")  # MMAU's order; other values follow alphabetically

# ---- statistics ----


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% score interval of a share (E. B. Wilson, JASA 22, 1927), both ends between 0 and 1.

    The interval holds every true share p whose distance to the observed share is at most z standard errors
    sqrt(p (1 - p) / total). Unlike the textbook interval, it also holds near 0 and 1. Without questions: (0, 1).
    """
    if total == 0:
        return 0.0, 1.0
    center = correct + z * z / 2
    half = z * math.sqrt(correct * (total - correct) / total + z * z / 4)
    high = 1.0 if correct == total else (center + half) / (total + z * z)  # exactly 1: rounding could give 1 - 1e-16
    return (center - half) / (total + z * z), high


def discordant(a: list[bool], b: list[bool]) -> tuple[int, int]:
    """Count the questions that only a answers right, and the questions that only b answers right."""
    return sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test: are two models right equally often on the same questions?

    only_a, only_b: how many questions only model A, or only model B, has right. The other questions do not matter. If
    the models were equal, each of these questions would be a fair coin toss. So p is twice the binomial tail, computed
    in integers.
    """
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (tosses - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**tosses)


def verdict(only_a: int, only_b: int, name_a: str, name_b: str) -> str:
    """Say in one line which of two models is better, if McNemar's exact test gives p < 0.05."""
    p = mcnemar_exact(only_a, only_b)
    better = name_a if only_a > only_b else name_b
    conclusion = "no difference can be told" if p >= 0.05 else f"{better} is better"
    counts = f"only {name_a} right: {only_a}, only {name_b} right: {only_b}"
    return f"{counts}; McNemar's exact test: p = {p_text(p)}, {conclusion}"


def resampled_interval(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95% interval of the mean of values [S, Q]: S seeds on the same Q questions.

    Each draw takes S seeds and Q questions with replacement (the pigeonhole bootstrap, A. B. Owen, Annals of Applied
    Statistics 1, 2007). With one seed, only the questions vary. With few seeds, the interval is too short.
    """
    matrix = np.array(values, dtype=float)
    seeds, questions = map(_draws, matrix.shape, (0, 1))
    means = ((seeds @ matrix) * questions).sum(axis=1) / matrix.size  # [draws]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@cache
def _draws(number: int, seed: int) -> np.ndarray:
    """Draw `number` things with replacement, 4,000 times: how often each is drawn, [4000, number]."""
    return np.random.default_rng(seed).multinomial(number, [1 / number] * number, size=4000).astype(float)


def majority_vote(predictions: list[str]) -> str:
    """Return the most frequent prediction; if several are equally frequent, the first of them."""
    return Counter(predictions).most_common(1)[0][0]


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, if `correct` of `total` samples are right.

    The unbiased estimator of arXiv 2107.03374, equation 1. k = 1 gives the share of right samples.
    """
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs at least {k} samples and k >= 1; there are {total}")
    draws = math.comb(total, k)
    return (draws - math.comb(total - correct, k)) / draws


def deviation(values: Sequence[float]) -> float:
    """Return the unbiased standard deviation of two or more values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


# ---- predictions files ----


def as_written(question: Question, prediction: str) -> str:
    """Return a prediction for the benchmark's own script: the choice that it names, as the file spells this choice.

    If the prediction equals no choice, MMAU's rule decides which one it names. A prediction that names no choice stays
    as it is. MMSU's script does not count such texts: here they become the letter of a wrong choice.
    """
    if not question.spelled:
        return prediction
    for texts in (question.choices, question.spelled):
        if (text := as_choice(prediction, texts)) in texts:
            return question.spelled[texts.index(text)]
    named = [i for i, c in enumerate(question.choices) if mmau_match(c, prediction, question.choices)]
    if len(named) == 1:
        return question.spelled[named[0]]
    if question.answer is not None and all(len(text) == 1 for text in question.spelled):
        wrong = (s for s, c in zip(question.spelled, question.choices) if in_nfc(c) != in_nfc(question.answer))
        return next(wrong, "")
    return prediction


def is_right(question: Question, prediction: str) -> bool:
    """Apply MMAU's rule to a prediction, or open_match if there are no choices. The question must have an answer.

    If the file's choices have letters, the rule compares them with their letters, as the benchmark's own script does.
    """
    if not question.choices:
        return open_match([question.known_answer, *question.also], prediction)
    answer, said = as_written(question, question.known_answer), as_written(question, prediction)
    return mmau_match(answer, said, question.spelled or question.choices)


def choices_told_apart(question: Question) -> bool:
    """Tell whether MMAU's rule and exact comparison agree about each choice. True if the answer is not a choice."""
    if not answer_is_a_choice(question):
        return True
    return all(is_right(question, choice) == _is_answer(question, choice) for choice in question.choices)


def is_right_exactly(question: Question, prediction: str) -> bool:
    """Apply MMAU's rule, or exact comparison if the rule cannot tell the question's choices apart."""
    if choices_told_apart(question):
        return is_right(question, prediction)
    return _is_answer(question, prediction)


def _is_answer(question: Question, text: str) -> bool:
    return in_nfc(as_written(question, text)) == in_nfc(as_written(question, question.known_answer))


def guessing(questions: list[Question], right: Callable[[Question, str], bool] = is_right) -> float:
    """Return the expected accuracy of guessing: the share of right choices of a question, averaged over questions.

    Nobody guesses the answer of an open question: its share is 0.
    """
    shares = [sum(right(q, choice) for choice in q.choices) / max(1, len(q.choices)) for q in questions]
    return sum(shares) / len(shares)


def not_apart(questions: list[Question]) -> str | None:
    """Count and list the questions whose choices MMAU's rule cannot tell apart; None if there are none."""
    ids = [visible(question.id) for question in questions if not choices_told_apart(question)]
    return f"MMAU's rule cannot tell the choices of {len(ids)} questions apart: {list_names(ids)}" if ids else None


def exact_figures(questions: list[Question], predicted: dict[str, list[str]]) -> list[str]:
    """Return lines about the questions whose choices MMAU's rule cannot tell apart; no lines if there are none.

    The first line counts and lists these questions. The second line has the accuracy with exact comparison for them.
    predicted: name of the evaluation -> its predictions. The names are shown if there are several.
    """
    line = not_apart(questions)
    if line is None:
        return []
    figures = []
    for name, texts in predicted.items():
        correct = sum(map(is_right_exactly, questions, texts))
        figures.append(f"{name} " * (len(predicted) > 1) + percent(correct, len(questions)))
    return [line, f"accuracy if exact comparison decides these: {', '.join(figures)}"]


def read_predictions(path: str) -> tuple[list[Question], list[str]]:
    """Read a predictions file: its questions and the prediction for each. Opens no audio. Raises InputError."""
    questions, predictions = [], []
    for place, record in require(find_records(path)):
        key = next((key for key in PREDICTED if key in present(record)), "")
        if not isinstance(record.get(key), str):
            raise InputError(f"{place}: no text model_prediction; give a predictions file that eval_mmau.py wrote")
        question, predicted = parse_record(record, place, ""), record[key]
        if key == "response":  # MMSU's script reads the letter of a choice as the first character, or the last but one
            letters = [letter for letter in (predicted[:1], predicted[-2:-1]) if letter.isupper()]
            predicted = next((text for letter in letters if (text := record.get(f"choice_{letter.lower()}"))), "")
        questions.append(question)
        predictions.append(predicted)
    return share_answers(questions), predictions


def require_same_questions(path_a: str, a: list[Question], path_b: str, b: list[Question]) -> None:
    """Raise InputError unless two files hold the same questions in the same order. Their choices may be shuffled."""
    for number, (one, other) in enumerate(zip(a, b), start=1):
        for field, in_a, in_b in zip(("question", "clip", "answer", "choices"), _identity(one), _identity(other)):
            if in_a != in_b:
                raise InputError(
                    f"{path_a} and {path_b} hold different questions: number {number} has the {field} {in_a!r} "
                    f"(id {visible(one.id)}) in the first and {in_b!r} (id {visible(other.id)}) in the second"
                )
    if len(a) != len(b):
        raise InputError(f"{path_a} holds {len(a)} questions and {path_b} holds {len(b)}: they cannot be compared")


def _identity(question: Question) -> tuple:
    return question.question, os.path.basename(question.audio), question.answer, sorted(question.choices)


# ---- tables ----


def accuracy_by(questions: list[Question], correct: list[bool], field: str) -> dict[str, Score]:
    """Count the right questions for each value of one of FIELDS. Questions without a value are left out."""
    counts = {}
    for question, right in zip(questions, correct, strict=True):
        value = getattr(question, field)
        if value is not None:
            before = counts.get(value, Score(0, 0))
            counts[value] = Score(before.correct + right, before.total + 1)
    return {value: counts[value] for value in in_order(counts)}


def in_order(values) -> list[str]:
    """Sort a field's values in MMAU's order: sound, music, speech; easy, medium, hard; others alphabetically."""
    return sorted(values, key=lambda value: (_FIRST.index(value) if value in _FIRST else len(_FIRST), value))


def accuracy_rows(questions: list[Question], correct: list[bool]) -> list[tuple[str, str, Score]]:
    """Return (field, value, score) in total ("all", "") and for each value of each of FIELDS."""
    rows = [("all", "", Score(sum(correct), len(correct)))]
    return rows + [(f, value, score) for f in FIELDS for value, score in accuracy_by(questions, correct, f).items()]


def accuracy_table(questions: list[Question], correct: list[bool]) -> str:
    """Format accuracy, 95% interval and counts, in total and by each of FIELDS."""
    rows = [(field, value, *score_cells(score)) for field, value, score in accuracy_rows(questions, correct)]
    return align([("", "", "accuracy", "95% interval", "right"), *rows], right=(2, 3, 4))


def samples_table(questions: list[Question], correct: list[list[bool]], votes: list[bool]) -> str:
    """Format the scores of K samples for each question, in total and by task.

    correct: for each question, whether each of its K samples is right. votes: whether its majority vote is right.
    deviation between samplings: deviation of the K samplings' accuracies, the scatter of a single sampling's score.
    deviation within a question: deviation of 0 and 1 among a question's K samples, averaged over the questions; 0% if
    the model always answers a question alike, a little over 50% if it tosses a coin.
    Deviations divide by K - 1. With one sample, these rows are left out.
    """
    k_samples = len(correct[0])
    ks = [2**n for n in range(1, k_samples.bit_length()) if 2**n < k_samples] + [k_samples] * (k_samples > 1)
    names = ["mean of the samples (pass@1)"]
    names += ["deviation between samplings", "deviation within a question"] * (k_samples > 1)
    names += [*(f"pass@{k}" for k in ks), "majority vote", "its 95% interval"]
    columns = [(f"{k_samples} samples each", *names)]
    for group, indices in task_groups(questions).items():
        own = [correct[i] for i in indices]
        cells = [percent(sum(map(sum, own)), k_samples * len(own))]
        if k_samples > 1:
            runs = [sum(sampling) / len(own) for sampling in zip(*own)]
            cells += [percent(deviation(runs), 1), percent(sum(map(deviation, own)), len(own))]
        cells += [percent(sum(pass_at_k(sum(row), k_samples, k) for row in own), len(own)) for k in ks]
        vote = Score(sum(votes[i] for i in indices), len(own))
        columns.append((f"{group} ({len(own)})", *cells, percent(*vote), interval_text(vote)))
    return align(list(zip(*columns)), right=range(1, len(columns)))


def compare(path_a: str, path_b: str) -> str:
    """Compare two predictions files: both accuracies, McNemar's exact test, and the questions that only one has right.

    Questions without an answer are left out. Raises InputError if the files hold different questions.
    """
    questions, predicted_a = read_predictions(path_a)
    questions_b, predicted_b = read_predictions(path_b)
    require_same_questions(path_a, questions, path_b, questions_b)
    scored = [i for i, question in enumerate(questions) if question.answer is not None]
    if not scored:
        raise InputError(f"{path_a}: none of the {len(questions)} questions has an answer; nothing to compare")
    right = [[is_right(questions[i], predicted[i]) for i in scored] for predicted in (predicted_a, predicted_b)]
    only_a, only_b = discordant(*right)
    rows = [
        (name, *score_cells(Score(sum(correct), len(scored))), path)
        for name, correct, path in zip("AB", right, (path_a, path_b))
    ]
    lines = [align([("", "accuracy", "95% interval", "right", ""), *rows], right=(1, 2, 3))]
    if len(scored) < len(questions):
        lines.append(f"{len(questions) - len(scored)} questions have no answer and are not compared")
    lines.append(verdict(only_a, only_b, "A", "B"))
    compared = {"A": [predicted_a[i] for i in scored], "B": [predicted_b[i] for i in scored]}
    lines += exact_figures([questions[i] for i in scored], compared)

    changed: list[tuple[str, ...]] = [("", "id", "answer", "A's prediction", "B's prediction")]
    for name, (winner, loser) in (("only A", right), ("only B", right[::-1])):
        for i, won, lost in zip(scored, winner, loser):
            if won and not lost:
                cells = questions[i].id, questions[i].known_answer, predicted_a[i], predicted_b[i]
                changed.append((name, *map(_one_line, cells)))
    if len(changed) > 1:
        lines += ["", align(changed)]
    same_verdict = sum(predicted_a[i] != predicted_b[i] for i, a, b in zip(scored, *right) if a == b)
    if same_verdict:
        lines.append(f"answered differently, but both right or both wrong: {same_verdict}")
    return "\n".join(lines)


def best_step(correct: dict[int, list[bool]]) -> list[str]:
    """Return a line that names the best step, and a warning if other steps may be as good.

    correct: for each step, whether each question is right.
    """
    best = max(correct, key=lambda step: (sum(correct[step]), -step))  # the earliest if several are equally good
    rights = correct[best]
    lines = [f"best: {step_name(best)} with {percent(sum(rights), len(rights))}"]
    ps = {}
    for step in correct:
        if step != best:
            ps[step] = mcnemar_exact(*discordant(rights, correct[step]))
    close = [f"{step_name(step)} (p = {p_text(p)})" for step, p in ps.items() if p >= 0.05]
    if close:
        lines.append(
            f"warning: its lead, if any, may be luck; {len(close)} of the {len(ps)} others do not differ "
            f"significantly from it on these {len(rights)} questions (McNemar's exact test, p >= 0.05): "
            f"{', '.join(close)}"
        )
    return lines


# ---- text ----


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def percent(part: float, whole: float) -> str:
    """Format a share in percent with two decimals. MMAU's evaluation.py rounds this, not 100 * part / whole."""
    return f"{part / whole * 100:.2f}%" if whole else "-"


def interval_text(score: Score) -> str:
    low, high = wilson_interval(*score)
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def score_cells(score: Score) -> tuple[str, str, str]:
    """Format a score as three cells: accuracy, 95% interval, counts."""
    return percent(*score), interval_text(score), f"{score.correct}/{score.total}"


def p_text(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def align(rows: Iterable[tuple[str, ...]], right=()) -> str:
    """Format rows of texts as a table, one line a row. The columns in `right` are right-aligned.

    Texts may come from anybody's question file, so control characters are made visible.
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[c]) for row in shown if c < len(row)) for c in range(max(map(len, shown)))]
    return "\n".join(
        "  ".join(cell.rjust(widths[c]) if c in right else cell.ljust(widths[c]) for c, cell in enumerate(row)).rstrip()
        for row in shown
    )


def visible(text: str) -> str:
    """Spell out control characters, line ends and lone surrogates, so that a terminal does not obey them."""
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def _one_line(text: str) -> str:
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= 60 else text[:59] + "…"


def task_groups(questions: list[Question]) -> dict[str, list[int]]:
    """Return the indices of all questions ("all") and of each task's questions."""
    tasks = in_order({question.task for question in questions if question.task is not None})
    groups = {task: [i for i, question in enumerate(questions) if question.task == task] for task in tasks}
    return {"all": list(range(len(questions))), **groups}
