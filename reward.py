"""Rewards for audio question answering, and MMAU's scoring rule.

Plain functions of strings, no torch. REWARDS is the table of rewards: a function and an entry add another one. The two
rewards are those of the paper (arXiv 2503.11197, section 2.2). `mmau_match` is the scoring rule of the MMAU benchmark
(arXiv 2410.19168). Training rewards an exact answer; evaluations score by MMAU's rule, which forgives other words.
`open_match` compares answers to questions without choices, in training and in evaluations.
"""

import re
from collections.abc import Sequence
from unicodedata import normalize


def extract_answer(completion: str, across_lines: bool = False) -> str | None:
    """Return the stripped text of the first <answer>...</answer>, or None if there is none.

    As in the paper's code, both tags have to stand on one line: the `.` of its expression for answers does not match a
    newline. Searching line by line gives the same result, in time linear in the length of the text. With
    `across_lines`, the tags may stand on different lines.
    """
    for line in [completion] if across_lines else completion.split("\n"):
        _, opened, rest = line.partition("<answer>")
        content, closed, _ = rest.partition("</answer>")
        if opened and closed:
            return content.strip()
    return None


def prediction(completion: str, choices: Sequence[str] = ()) -> str:
    """Return what a completion answers: the extracted answer, or the whole stripped text if there is none.

    If this text is one of `choices`, return the choice as it is spelled there: Unicode has several spellings of "é".
    The paper's expression reads one line. A choice of several lines is compared with the answer across lines.
    """
    one_line, across_lines = extract_answer(completion), extract_answer(completion, across_lines=True)
    said = completion.strip() if one_line is None else one_line
    for choice in choices:
        text = across_lines if "\n" in choice.strip() and across_lines is not None else said
        if in_nfc(text) == in_nfc(choice):
            return choice
    return said


def as_choice(text: str, choices: Sequence[str]) -> str:
    """Return the first choice that equals the text in NFC, or the text itself if no choice does."""
    return next((choice for choice in choices if in_nfc(choice) == in_nfc(text)), text)


def in_nfc(text: str) -> str:
    """Return the stripped text in Unicode's NFC. Qwen's tokenizer brings all text into this form."""
    return normalize("NFC", text.strip())


def accuracy_reward(completion: str, answer: str) -> float:
    """Return 1.0 if the prediction equals `answer`, both stripped and in NFC, else 0.0.

    The paper's code also calls math_verify, which compares formulas. It is left out here: on the questions of MMAU and
    MMAR it rewards 15 wrong choices ("1:3" for "1:1") and no right choice that the exact comparison misses.
    """
    return float(prediction(completion, [answer]) == answer)


def open_reward(completion: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction has the words of one of an open question's answers, in the same order, else 0.0."""
    return float(open_match(answers, prediction(completion)))


def format_reward(completion: str, template: str) -> float:
    """Return 1.0 if the whole completion has the form that the prompt template asks for, else 0.0.

    answer: <answer>...</answer>
    think:  <think>...</think>, optional white space, <answer>...</answer>
    direct: no form is asked for; the reward is always 1.0, so it does not change any advantage

    Anything may stand inside the tags, newlines and further tags too, as in the paper's expressions for formats.
    """
    if template == "direct":
        return 1.0
    if template == "answer":
        return float(_enclosed(completion, "<answer>") is not None)
    if template == "think":
        inside = _enclosed(completion, "<think>")
        return float(inside is not None and re.search(r"</think>\s*<answer>", inside) is not None)
    raise ValueError(f"unknown template {template!r}")


def _enclosed(text: str, opening: str) -> str | None:
    """Return the text between `opening` at the very start and </answer> at the very end, or None."""
    if not (text.startswith(opening) and text.endswith("</answer>")):
        return None
    return text[len(opening) : -len("</answer>")]


# Each reward is a function of (completion, data.Question, template) that returns a number. --reward_weights chooses and
# weighs them by name. Metrics, curves, completions.jsonl, explain.py and the progress bar take the names from here.
REWARDS = {
    "accuracy": lambda completion, question, template: (
        accuracy_reward(completion, question.answer)
        if question.choices
        else open_reward(completion, [question.answer, *question.also])
    ),
    "format": lambda completion, question, template: format_reward(completion, template),
}


# ---- scoring ----


def mmau_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """Return whether `prediction` is right by MMAU's rule: it names `answer` and none of the other choices.

    The rule compares sets of lower-cased words. The prediction must contain every word of the answer, and no word that
    only wrong choices have. A choice with the same words as the answer does not count as wrong. A prediction without
    words is wrong.
    """
    said, right = _words(prediction), _words(answer)
    wrong_only = set().union(*map(_words, choices)) - right
    return bool(said) and right <= said and not said & wrong_only


def open_match(answers: Sequence[str], prediction: str) -> bool:
    """Return whether a prediction is one of an open question's answers: the same words in the same order.

    Compares as SQuAD's exact match (arXiv 1606.05250) does: without case, articles and the punctuation around words.
    Other signs stay: "-3 dB" is not "3 dB", and "C#" is not "C".
    """
    return _open_words(prediction) in map(_open_words, answers)


def _open_words(text: str) -> list[str]:
    """Return the normalized words of an open answer, without its articles unless it has no other words."""
    around = "\"'“”‘’«»()[]¿¡"
    words = [word.lstrip(around).rstrip(around + ".,;:!?…。，！？") for word in in_nfc(text).casefold().split()]
    return [word for word in words if word and word not in ("a", "an", "the")] or words


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
