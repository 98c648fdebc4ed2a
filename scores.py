"""What a set of predictions is worth: accuracy with its uncertainty, and whether one set is better than another.

Plain functions on plain lists. A question counts as right by MMAU's rule (reward.mmau_match); nothing here stores that,
it is computed again from the predictions file. A question whose answer is withheld is never scored.
"""

import math
import os
import re
from collections import Counter, namedtuple
from collections.abc import Iterable, Sequence

from data import Question, parse_record, read_records
from errors import InputError
from reward import guessing, mmau_match

Score = namedtuple("Score", "correct total")
FIELDS = ("task", "difficulty", "sub_category")  # what MMAU tells apart
_FIRST = ("sound", "music", "speech", "easy", "medium", "hard")  # shown in MMAU's order, other values by the alphabet

# ---- statistics ----


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% score interval of a share (E. B. Wilson, JASA 22, 1927), both ends between 0 and 1.

    All shares p that the observed one is at most z standard errors sqrt(p (1 - p) / total) away from. Unlike the
    textbook interval around the observed share, it holds at 0 and 1 too. Of no questions, nothing is known: (0, 1).
    """
    if total == 0:
        return 0.0, 1.0
    center = correct + z * z / 2
    half = z * math.sqrt(correct * (total - correct) / total + z * z / 4)
    high = 1.0 if correct == total else (center + half) / (total + z * z)  # not 1 - 1e-16
    return (center - half) / (total + z * z), high


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's test, exact: are two models right equally often on the same questions?

    only_a, only_b: questions that just one of the two has right; the others say nothing. If the models were equal,
    each such question would be A's or B's like a coin's toss, so p is twice the binomial tail, in whole numbers.
    """
    tosses, fewer = only_a + only_b, min(only_a, only_b)
    ways = tail = 1
    for k in range(fewer):
        ways = ways * (tosses - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**tosses)


def majority_vote(predictions: list[str]) -> str:
    """The most frequent of several predictions; of equally frequent ones, the first."""
    return Counter(predictions).most_common(1)[0][0]


def pass_at_k(correct: int, total: int, k: int) -> float:
    """The chance that of k samples, drawn from `total` of which `correct` are right, at least one is right.

    The unbiased estimator of arXiv 2107.03374, equation 1. k = 1 gives the share of right samples.
    """
    if not 1 <= k <= total:
        raise ValueError(f"pass@{k} needs at least {k} samples and k >= 1; there are {total}")
    draws = math.comb(total, k)
    return (draws - math.comb(total - correct, k)) / draws


# ---- predictions files ----


def is_right(question: Question, prediction: str) -> bool:
    """MMAU's rule, for a question that has an answer."""
    return mmau_match(question.known_answer, prediction, question.choices)


def read_predictions(path: str) -> tuple[list[Question], list[str]]:
    """The questions of a predictions file, and what was predicted for each. Opens no audio. Raises InputError."""
    questions, predictions = [], []
    for place, record in read_records(path):
        predicted = record.get("model_prediction", record.get("model_output"))
        if not isinstance(predicted, str):
            raise InputError(f"{place}: no text model_prediction; a predictions file is what eval_mmau.py writes")
        questions.append(parse_record(record, place, ""))
        predictions.append(predicted)
    return questions, predictions


def require_same_questions(path_a: str, a: list[Question], path_b: str, b: list[Question]) -> None:
    """Raise InputError unless two files hold the same questions in the same order. Their choices may be shuffled."""
    for number, (one, other) in enumerate(zip(a, b), start=1):
        for what, in_a, in_b in zip(("question", "clip", "answer", "choices"), _identity(one), _identity(other)):
            if in_a != in_b:
                raise InputError(
                    f"{path_a} and {path_b} hold different questions: number {number} has the {what} {in_a!r} "
                    f"(id {visible(one.id)}) in the first and {in_b!r} (id {visible(other.id)}) in the second"
                )
    if len(a) != len(b):
        raise InputError(f"{path_a} holds {len(a)} questions and {path_b} {len(b)}; only the same can be compared")


def _identity(question: Question) -> tuple:
    return question.question, os.path.basename(question.audio), question.answer, sorted(question.choices)


# ---- tables ----


def accuracy_by(questions: list[Question], correct: list[bool], field: str) -> dict[str, Score]:
    """How many questions are right for each value of a field of FIELDS; those without a value are left out."""
    counts = {}
    for question, right in zip(questions, correct, strict=True):
        value = getattr(question, field)
        if value is not None:
            had = counts.get(value, Score(0, 0))
            counts[value] = Score(had.correct + right, had.total + 1)
    return {value: counts[value] for value in in_order(counts)}


def in_order(values) -> list[str]:
    """Values of a field as MMAU lists them: sound, music, speech; easy, medium, hard; others by the alphabet."""
    return sorted(values, key=lambda value: (_FIRST.index(value) if value in _FIRST else len(_FIRST), value))


def accuracy_rows(questions: list[Question], correct: list[bool]) -> list[tuple[str, str, Score]]:
    """(field, value, score) in total ("all", "") and for each task, difficulty and sub-category."""
    rows = [("all", "", Score(sum(correct), len(correct)))]
    return rows + [(f, value, score) for f in FIELDS for value, score in accuracy_by(questions, correct, f).items()]


def accuracy_table(questions: list[Question], correct: list[bool]) -> str:
    """Accuracy with its 95% interval and counts, in total and by task, difficulty and sub-category."""
    rows = [(field, value, *score_cells(score)) for field, value, score in accuracy_rows(questions, correct)]
    return align([("", "", "accuracy", "95% interval", "right"), *rows], right=(2, 3, 4))


def samples_table(questions: list[Question], correct: list[list[bool]], votes: list[bool]) -> str:
    """What K samples for each question are worth, in total and by task.

    correct: for each question, whether each of its K samples is right. votes: whether its majority vote is.
    deviation of the mean: of the accuracies of the K samplings, that is how much a single run's score scatters.
    deviation within a question: the mean over questions of the deviation of 0 and 1 among its K samples; 0% for a
    model that always answers a question the same way, 50% and a little more for one that tosses a coin.
    Deviations divide by K - 1; of a single sample there are none.
    """
    k_samples = len(correct[0])
    ks = [2**n for n in range(1, k_samples.bit_length()) if 2**n < k_samples] + [k_samples] * (k_samples > 1)
    names = ["mean of the samples (pass@1)"]
    names += ["deviation of the mean", "deviation within a question"] * (k_samples > 1)
    names += [*(f"pass@{k}" for k in ks), "majority vote", "its 95% interval"]
    columns = [(f"{k_samples} samples each", *names)]
    for group, indices in _groups(questions).items():
        own = [correct[i] for i in indices]
        cells = [percent(sum(map(sum, own)), k_samples * len(own))]
        if k_samples > 1:
            runs = [sum(sampling) / len(own) for sampling in zip(*own)]
            cells += [percent(_deviation(runs), 1), percent(sum(map(_deviation, own)), len(own))]
        cells += [percent(sum(pass_at_k(sum(row), k_samples, k) for row in own), len(own)) for k in ks]
        vote = Score(sum(votes[i] for i in indices), len(own))
        columns.append((f"{group} ({len(own)})", *cells, percent(*vote), interval_text(vote)))
    return align(list(zip(*columns)), right=range(1, len(columns)))


def ablation_table(questions: list[Question], correct_by_name: dict[str, list[bool]]) -> str:
    """Accuracy under several conditions, in total and by task, each compared with the first one.

    correct_by_name: for each condition, whether each question is right. The difference is in percentage points, its p
    that of McNemar's exact test on the same questions.
    """
    first = next(iter(correct_by_name.values()))
    rows: list[tuple[str, ...]] = [("", "accuracy", "95% interval", "right", "difference", "p")]
    for group, indices in _groups(questions).items():
        rows.append((group,))
        for name, correct in correct_by_name.items():
            score = Score(sum(correct[i] for i in indices), len(indices))
            cells = ["", ""]
            if correct is not first:
                only_first, only_this = discordant([first[i] for i in indices], [correct[i] for i in indices])
                difference = (only_this - only_first) / len(indices) * 100
                cells = [f"{difference:+.2f}", p_text(mcnemar_exact(only_first, only_this))]
            rows.append((f"  {name}", *score_cells(score), *cells))
        chance = guessing([questions[i].choices for i in indices])
        rows.append(("  guessing", percent(chance, 1)))
    return align(rows, right=(1, 2, 3, 4, 5))


def compare(path_a: str, path_b: str) -> str:
    """Two predictions files of the same questions: both accuracies, McNemar's exact test, and what changed.

    Questions without an answer are left out. Raises InputError for files that do not hold the same questions.
    """
    questions, said_a = read_predictions(path_a)
    others, said_b = read_predictions(path_b)
    require_same_questions(path_a, questions, path_b, others)
    scored = [i for i, question in enumerate(questions) if question.answer is not None]
    if not scored:
        raise InputError(f"{path_a}: none of the {len(questions)} questions has an answer; nothing to compare")
    right = [[is_right(questions[i], said[i]) for i in scored] for said in (said_a, said_b)]
    only_a, only_b = discordant(*right)
    p = mcnemar_exact(only_a, only_b)
    rows = [
        (name, *score_cells(Score(sum(correct), len(scored))), path)
        for name, correct, path in zip("AB", right, (path_a, path_b))
    ]
    lines = [align([("", "accuracy", "95% interval", "right", ""), *rows], right=(1, 2, 3))]
    if len(scored) < len(questions):
        lines.append(f"{len(questions) - len(scored)} questions have no answer and are not compared")
    verdict = "no difference can be told" if p >= 0.05 else f"{'A' if only_a > only_b else 'B'} is better"
    lines.append(f"only A right: {only_a}, only B right: {only_b}; McNemar's exact test: p = {p_text(p)}, {verdict}")

    changed: list[tuple[str, ...]] = [("", "id", "answer", "A's prediction", "B's prediction")]
    for name, (winner, loser) in (("only A", right), ("only B", right[::-1])):
        for i, won, lost in zip(scored, winner, loser):
            if won and not lost:
                cells = questions[i].id, questions[i].known_answer, said_a[i], said_b[i]
                changed.append((name, *map(_one_line, cells)))
    if len(changed) > 1:
        lines += ["", align(changed)]
    others = sum(said_a[i] != said_b[i] for i, a, b in zip(scored, *right) if a == b)
    if others:
        lines.append(f"answered differently, but both right or both wrong: {others}")
    return "\n".join(lines)


# ---- text ----


def percent(part: float, whole: float) -> str:
    """A share in percent with two decimals, rounded as MMAU's evaluation.py does (100 * part / whole may differ)."""
    return f"{part / whole * 100:.2f}%" if whole else "-"


def interval_text(score: Score) -> str:
    low, high = wilson_interval(*score)
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def score_cells(score: Score) -> tuple[str, str, str]:
    """A score as three columns: accuracy, 95% interval, counts."""
    return percent(*score), interval_text(score), f"{score.correct}/{score.total}"


def p_text(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def align(rows: Iterable[tuple[str, ...]], right=()) -> str:
    """Rows of texts as lines with columns of even width; the columns in `right` are right-aligned.

    A row is one line whatever its texts hold: they may come from anybody's question file.
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[c]) for row in shown if c < len(row)) for c in range(max(map(len, shown)))]
    return "\n".join(
        "  ".join(cell.rjust(widths[c]) if c in right else cell.ljust(widths[c]) for c, cell in enumerate(row)).rstrip()
        for row in shown
    )


def visible(text: str) -> str:
    """Text with control characters, line ends and halves of surrogate pairs spelled out: a terminal can't obey them."""
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def _one_line(text: str) -> str:
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= 60 else text[:59] + "…"


def _groups(questions: list[Question]) -> dict[str, list[int]]:
    """Indices of all questions, and of those of each task."""
    tasks = in_order({question.task for question in questions if question.task is not None})
    groups = {task: [i for i, question in enumerate(questions) if question.task == task] for task in tasks}
    return {"all": list(range(len(questions))), **groups}


def discordant(a: list[bool], b: list[bool]) -> tuple[int, int]:
    """How many questions only a has right, and only b."""
    return sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))


def _deviation(values: Sequence[float]) -> float:
    """The unbiased standard deviation of two values or more."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
