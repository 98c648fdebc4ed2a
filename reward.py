"""Rewards for audio question answering: what a completion is worth, and how MMAU scores it.

Plain string functions, no torch. The two rewards are those of the paper (arXiv 2503.11197, section 2.2);
`mmau_match` is the scoring rule of the MMAU benchmark (arXiv 2410.19168).
"""

import re


def extract_answer(completion: str) -> str | None:
    """The stripped text of the first <answer>...</answer>, or None if there is none.

    As in the paper's code, opening and closing tag have to stand on one line: there `.` does not match a newline.
    Looking line by line says the same as that regular expression and stays linear in the length of the text.
    """
    for line in completion.split("\n"):
        _, opened, rest = line.partition("<answer>")
        content, closed, _ = rest.partition("</answer>")
        if opened and closed:
            return content.strip()
    return None


def accuracy_reward(completion: str, answer: str) -> float:
    """1.0 if the prediction is exactly `answer`, else 0.0.

    The paper's code also tries a symbolic comparison of formulas first (math_verify); audio questions have none.
    """
    return float(prediction(completion) == answer.strip())


def prediction(completion: str) -> str:
    """What a completion answers: its extracted answer, or the whole stripped text where nothing is tagged."""
    extracted = extract_answer(completion)
    return completion.strip() if extracted is None else extracted


def format_reward(completion: str, template: str) -> float:
    """1.0 if the whole completion has the form that the prompt template asks for, else 0.0.

    answer: <answer>...</answer>; think: <think>...</think>, optional white space, <answer>...</answer>;
    direct: asks for no form, so every completion has it and the reward is a constant that no advantage sees.
    Anything may stand inside the tags, newlines and further tags too, as with the paper's `.*?` and DOTALL.
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
    """What stands between `opening` at the very start and </answer> at the very end of the text, or None."""
    if not (text.startswith(opening) and text.endswith("</answer>")):
        return None
    return text[len(opening) : -len("</answer>")]


def mmau_match(answer: str, prediction: str, choices: list[str]) -> bool:
    """MMAU's rule: whether `prediction` names `answer` and none of the other choices.

    Texts are compared as sets of lower-cased words (\\w+). The prediction must hold every word of the answer and no
    word that only wrong choices have. A choice with the same words as the answer is not a wrong one. A prediction
    without a single word is wrong.
    """
    said, right = _words(prediction), _words(answer)
    wrong_only = set().union(*map(_words, choices)) - right
    return bool(said) and right <= said and not said & wrong_only


def guessing(all_choices: list[list[str]]) -> float:
    """The accuracy that random guessing is expected to reach, from the choices of each question."""
    return sum(1 / len(choices) for choices in all_choices) / len(all_choices)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
