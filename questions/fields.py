"""Read the fields of a record: their names in each data set, and how their values become a question.

NAMES lists the names. The fields of a record tell how to read it:

    MMAU, MMAR      choices are a list, the answer is a text
    R1-AQA, AVQA    multi_choice; the answer is an index counted from 0; "video" in a question becomes "audio"
    MMSU            choice_a to choice_d
    from the Hub    choices "(A) a dog", answers "(A) a dog", "A." or "A"; AVQA's choices are in the question's text
    Clotho-AQA      no choices: an open question, which may have several right answers
"""

import ast
import json
import re
from typing import Any

from infra.errors import InputError
from questions.clips import avqa_clip_path, clip_path, leaves_folder
from reward import as_choice, in_nfc

# For each field, the first name that a record has counts.
NAMES = {
    "clip": ("audio_path", "audio_id", "audio", "file_name", "video_name"),
    "question": ("question_only", "question_text", "question", "instruction", "QuestionText"),
    "choices": ("choices", "multi_choice", "options"),
    "answer": ("answer", "answer_gt", "answer_index"),
    "task": ("domain", "modality", "task", "category"),
    "category": ("category",),
    "sub_category": ("sub-category", "sub_category", "task"),
    "difficulty": ("difficulty",),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A choice may have a field of its own: choice_a (MMSU), option_B, C. Predictions for MMSU are letters.
LETTERED = r"(?:(?:choice|option)[_ ]?)?([A-Z])|(?:choice|option)[_ ]([a-z])"
MMSU = "choice_a"
# What may follow the letter of a note or key. The answer "A" may mean "A minor", "Am7" or "A#", not "A dog".
NOTE = r"\s*(?:$|[^\w\s]|(?:sharp|flat|major|minor|maj|min|m)\d*\b)"


class LeftOut(InputError):
    """The reason why this project cannot ask a well-formed question."""


def present(record: dict) -> dict:
    """Return a record without its empty fields: null, and NaN, which differs from itself. Tables write these."""
    return {name: value for name, value in record.items() if value is not None and value == value}


def read_fields(record: dict, place: str, folder: str) -> dict[str, Any]:
    """Read a record as the fields of data.Question. Relative audio paths start from `folder`.

    Raises LeftOut for questions about several clips and for MMAU-Pro's open questions, InputError for unusable records.
    """
    record = present(record)
    used = {field: next((name for name in names if name in record), "") for field, names in NAMES.items()}
    if not used["clip"] or not used["question"]:
        known = ", ".join(NAMES["clip"]), ", ".join(NAMES["question"])
        raise InputError(
            f"{place}: not a question; expected a clip ({known[0]}) and a question ({known[1]}); "
            f"found {shown(sorted(record))}"
        )
    question = _text(record, used["question"], place)
    lettered = _lettered(record) if not used["choices"] else {}
    choices, spelled = _choices(record, used["choices"], lettered, place)
    avqa = used["choices"] == "multi_choice"
    if not choices:
        question, choices = _choices_in(question)
        avqa = bool(choices)
    if avqa:  # asks about videos; as in the paper's code
        question = question.replace("video", "audio")
    audio = _clip(record, used["clip"], place, folder)
    if isinstance(record[used["clip"]], list) and not choices:
        raise LeftOut("an open question of MMAU-Pro, whose answers a model judges")
    answers = _answers(record, used["answer"], choices, spelled, list(lettered or LETTERS), place)
    alike = [i for i, choice in enumerate(choices) if in_nfc(choice) == in_nfc(answers[0] or "")]
    if spelled and len(alike) > 1:  # choices that equal the answer are right together: spell them as the file's answer
        own = record[used["answer"]]
        right = own if own in spelled and not lettered else spelled[alike[0]]
        spelled = [right if i in alike else text for i, text in enumerate(spelled)]
    return dict(
        audio=audio,
        question=question,
        choices=choices,
        spelled=spelled,
        answer=answers[0],
        also=answers[1:],
        **_labels(record, used),
    )


def shown(value) -> str:
    """Format a value for a message: one line, at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _is_mmaus(record: dict) -> bool:
    """Tell whether a record is of MMAU's own file. It is read as published: a few of its answers are no choices."""
    return "audio_id" in record and "audio_path" not in record


def _labels(record: dict, used: dict[str, str]) -> dict[str, str]:
    """Return a record's task, difficulty, category and sub-category, as far as it has them."""
    labels = {"task": used["task"], "difficulty": used["difficulty"]}
    for field in ("category", "sub_category"):  # one column gives one label
        labels[field] = used[field] if used[field] not in labels.values() else ""
    values = {}
    for field, name in labels.items():
        if name:
            value = record[name]  # the Hub's copy of MMAU has a few lists of one, such as ["Reasoning"]
            values[field] = str(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if labels["task"] == "category" and labels["sub_category"]:  # MMSU counts sub-categories within a category
        values["sub_category"] = f"{values['task']}: {values['sub_category']}"
    return values


# ---- clip and question ----


def _clip(record: dict, name: str, place: str, folder: str) -> str:
    value = record[name]
    if isinstance(value, list) and value:
        if len(value) > 1:
            raise LeftOut("several clips")
        record = {name: value[0]}
    text = _text(record, name, place)
    if name != "audio" and leaves_folder(text):  # names of published data sets; "audio" is a user's own path
        raise InputError(f"{place}: {name} {shown(text)} leaves the audio folder; take the .. out, or use --audio_dir")
    return avqa_clip_path(folder, text) if name == "video_name" else clip_path(folder, text)


def _text(record: dict, name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {name} must be a text that is not empty; found {shown(value)}")
    if "\0" in value:
        raise InputError(f"{place}: {name} has a NUL character; found {shown(value)}")
    return value


# ---- choices ----


def _choices(record: dict, name: str, lettered: dict[str, Any], place: str) -> tuple[list[str], list[str]]:
    """Return a record's choices without their letters, and their spelling in predictions files; [] if equal.

    lettered: choices that have fields of their own, by letter.
    """
    if not name and not lettered:
        return [], []
    value: Any = record[name] if name else list(lettered.values())
    if isinstance(value, str):
        value = _list_in(value) or _split(value) or value
    if value == [] and name != "multi_choice" and not _is_mmaus(record):
        return [], []  # a table's empty list: an open question
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value):
        raise InputError(f"{place}: {name or MMSU} must be a list of at least 2 texts; found {shown(value)}")
    if lettered:
        return value, list(lettered) if record.get(MMSU) else []
    bare = [_without_letter(choice, letter) for choice, letter in zip(value, LETTERS)]
    if len(bare) == len(value) and all(bare) and not _is_mmaus(record):
        return [str(choice) for choice in bare], value
    return value, []


def _choices_in(question: str) -> tuple[str, list[str]]:
    """Split a question whose text ends with its choices: "...\\nChoices:\\nA. a dog\\nB. a bell"."""
    start = re.search(r"(?:\s(?i:choices|options)\s*:\s*|\n\s*)(?=\(?A[.):])", question)
    choices = _split(question[start.end() :]) if start else []
    if start and len(choices) > 1 and all(choices):
        return question[: start.start()].strip(), choices
    return question, []


def _lettered(record: dict) -> dict[str, Any]:
    """Return the choices that have fields of their own, by letter. MMSU leaves the last ones empty."""
    found = {}
    for name, value in record.items():
        if value != "" and (letter := re.fullmatch(LETTERED, name)):
            found[(letter[1] or letter[2]).upper()] = value
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _list_in(text: str) -> list | None:
    """Return the list that a text spells in JSON or in Python, else None."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list):
            return value
    return None


def _split(text: str) -> list[str]:
    """Split "A. a dog\\nB. a bell" or "(A) a dog (B) a bell" at its letters. Returns [] for other texts."""
    ends, start = [], 0
    for letter in LETTERS:
        found = re.compile(rf"(?:(?:^|\n)\s*\(?{letter}[.):]|(?:^|\s)\({letter}\))[ \t]*").search(text, start)
        if not found:
            break
        ends.append(found.span())
        start = found.end()
    if not ends or text[: ends[0][0]].strip():
        return []
    bounds = zip(ends, [*ends[1:], (len(text), 0)])
    return [text[begin:end].strip() for (_, begin), (end, _) in bounds]


def _without_letter(choice: str, letter: str) -> str | None:
    """Return the choice "(A) a dog", "A. a dog", "A) a dog" or "A: a dog" without its letter; None for others."""
    found = re.fullmatch(rf"\s*\(?{letter}[.):]\s*(?<=\s|\))(\S.*)", choice, re.DOTALL)
    return found and found[1].strip()


# ---- answers ----


def _answers(
    record: dict, name: str, choices: list[str], spelled: list[str], letters: list[str], place: str
) -> list[Any]:
    """Return the right answers: one of the choices, or all answers of an open question; [None] if withheld."""
    value = record.get(name, "")
    values = value if isinstance(value, list) and value else [value]
    if values == [""]:
        return [None]
    if not choices:
        if not all(isinstance(answer, str) and answer.strip() for answer in values):
            raise InputError(f"{place}: {name} of an open question must be a text, or a list; found {shown(value)}")
        if any(re.fullmatch(r"\(?[A-Z][.):]+(?:\s.*)?", answer.strip()) for answer in values):
            raise InputError(
                f"{place}: {name} {shown(value)} is the letter of a choice, but there are no choices; add them"
            )
        return list(dict.fromkeys(values))
    if len(values) > 1:
        raise InputError(f"{place}: {name} has several answers {shown(value)}; a question with choices needs one")
    answer = _answer(
        values[0], choices, spelled, letters, published=_is_mmaus(record), counted="multi_choice" in record
    )
    if answer is None:
        raise InputError(
            f"{place}: {name} {shown(value)} names none of the choices {shown(choices)}, or several; give the text of "
            "a choice, its letter, or its index counted from 0"
        )
    return [answer or None]


def _answer(
    value, choices: list[str], spelled: list[str], letters: list[str], published: bool, counted: bool
) -> str | None:
    """Return the choice that a value names as text, letter or index; None if it names none or may name several.

    letters: of the choices. published: accept only texts, and return a text that is no choice as it is. counted: an
    integer is an index, even if the choices are numbers.
    """
    if isinstance(value, str):
        text = in_nfc(value)
        if as_choice(value, choices) in choices:
            return value
        if (own := as_choice(value, spelled)) in spelled:
            return choices[spelled.index(own)]
        if published:
            return value
        if re.fullmatch("[0-9]{1,3}", text):  # a cell of CSV
            value = int(text)
    if isinstance(value, float) and value.is_integer():  # a table's column of integers with a gap
        value = int(value)
    if type(value) is int and not published:
        named = choices[value] if 0 <= value < len(choices) else None
        if counted or str(value) not in choices:
            return named
        return str(value) if named in (None, str(value)) else None
    if not isinstance(value, str):
        return None
    found = re.fullmatch(r"\(?([A-Z])(?:[.):]+\s*(.*))?", text, re.DOTALL)
    if not found or found[1] not in letters[: len(choices)]:
        return value  # find_questions_in shows a choice that differs only in case or spaces
    choice, rest = choices[letters.index(found[1])], found[2]
    if rest:
        return choice if in_nfc(rest) == in_nfc(choice) else None
    others = [option for option in choices if option is not choice]
    return None if any(re.match(re.escape(found[1]) + NOTE, in_nfc(option)) for option in others) else choice
