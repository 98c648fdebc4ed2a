"""Questions about audio: reading question files, building prompts, sharing questions over ranks.

Four formats are told apart by the content of each record:

    MMAU      {"audio_id", "question", "choices", "answer", "task", "sub-category", "difficulty", ...}
    R1-AQA    AVQA's fields plus {"dataset_name", "audio_path"}; the paper's own training file
    AVQA      {"video_name", "question_text", "multi_choice", "answer": index, ...}; AVQA's train_qa.json
    plain     {"audio", "question", "choices", "answer"}; your own data

A file is either one JSON list or one JSON object a line.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from audio import load_audio as load_audio  # not used here, but a name by which others import it
from errors import InputError, list_problems
from files import kind_of_file

AUDIO_TOKEN = "<|AUDIO|>"  # where the chat markup puts the clip

# The exact texts that the paper's released checkpoints were trained with. {choices} is a Python list's own repr.
_OPTIONS = "{question} Please choose the answer from the following options: {choices}."
TEMPLATES = {
    "direct": _OPTIONS,
    "answer": _OPTIONS + " Output the final answer in <answer> </answer>.",
    "think": _OPTIONS + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


@dataclass
class Question:
    id: str
    audio: str  # path of its clip
    question: str
    choices: list[str]
    answer: str | None  # one of the choices; None where it is withheld
    task: str | None = None
    difficulty: str | None = None
    sub_category: str | None = None
    place: str = field(default="", compare=False)  # where it stands: "FILE, line 3"

    @property
    def known_answer(self) -> str:
        """The answer of a question that is known to have one."""
        assert self.answer is not None, f"{self.place}: the answer is withheld"
        return self.answer


def build_prompt(question: Question, template: str) -> str:
    """The user's text for a question, without chat markup. Raises InputError for an unknown template."""
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[template].format(question=question.question, choices=question.choices)


def target_text(answer: str, template: str) -> str:
    """What a completion that answers rightly says: <answer>...</answer>, or the bare answer with template `direct`.

    Raises InputError for `think`: question files hold no thoughts to learn from.
    """
    if template == "think":
        raise InputError("template 'think' has no target to imitate: question files hold answers without thoughts")
    return answer if template == "direct" else f"<answer>{answer}</answer>"


# ---- question files ----


def read_records(path: str) -> list[tuple[str, dict]]:
    """The JSON objects of a question file, each with the place it stands at ("FILE, line 3"), in file order.

    Raises InputError, for all lines that are not JSON objects together.
    """
    placed, problems = _find_records(path)
    if problems:
        raise InputError(list_problems(problems))
    return placed


def _find_records(path: str) -> tuple[list[tuple[str, dict]], list[str]]:
    """What read_records returns, and what is wrong with the other lines. Raises InputError if no line is right."""
    text = _read_text(path)
    placed, problems = [], []
    if text.lstrip().startswith("["):
        try:
            placed = [(f"{path}, record {i}", record) for i, record in enumerate(_parse_json(text), start=1)]
        except json.JSONDecodeError as error:
            fault = f"line {error.lineno}: not valid JSON ({error.msg})"
            raise InputError(f"{path}, {fault}; give one JSON list, or one JSON object a line") from None
        except ValueError as error:
            raise InputError(f"{path}: not usable as JSON ({error})") from None
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    placed.append((place, _parse_json(line)))
                except ValueError as error:
                    fault = getattr(error, "msg", str(error))
                    problems.append(f"{place}: not valid JSON ({fault}); give one JSON object a line, or one JSON list")
        if problems and not any(isinstance(record, dict) for _, record in placed):  # another format altogether
            raise InputError(problems[0])
    for place, record in placed:
        if not isinstance(record, dict):
            problems.append(f"{place}: expected a JSON object, found {type(record).__name__}")
    if not placed and not problems:
        raise InputError(f"{path}: holds no questions")
    return [(place, record) for place, record in placed if isinstance(record, dict)], problems


def _read_text(path: str) -> str:
    """A question file's text, with or without a byte-order mark. Raises InputError."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such question file")
    if not os.path.isfile(path):  # of a pipe, reading would wait, and a second time find nothing
        raise InputError(f"{path}: is a {kind_of_file(path)}; name a file of questions")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def _parse_json(text: str):
    """json.loads, whose failures are all ValueErrors."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_questions(path: str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file of any known format. Raises InputError, for all malformed records together.

    Relative audio paths are relative to `audio_dir`, or else to the question file's folder. No audio is looked at.
    """
    questions, problems = find_questions(path, audio_dir)
    if problems:
        raise InputError(list_problems(problems))
    return questions


def find_questions(path: str, audio_dir: str | None = None) -> tuple[list[Question], list[str]]:
    """The questions of a file, and what is wrong with its other records. Raises InputError if it has no records."""
    placed, problems = _find_records(path)
    questions, more = _parse(placed, audio_dir or os.path.dirname(path))
    return questions, problems + more


def parse_records(placed: list[tuple[str, dict]], folder: str) -> list[Question]:
    """The questions of read_records' records, with audio paths that are relative to `folder`. Raises InputError, for
    all malformed records together."""
    questions, problems = _parse(placed, folder)
    if problems:
        raise InputError(list_problems(problems))
    return questions


def _parse(placed: list[tuple[str, dict]], folder: str) -> tuple[list[Question], list[str]]:
    questions, problems, odd, places = [], [], [], {}
    for place, record in placed:
        try:
            question = parse_record(record, place, folder)
        except InputError as error:
            problems.append(str(error))
            continue
        first = places.setdefault(question.id, place)
        if first != place:
            problems.append(f"{place}: has the id {_shown(question.id)}, as {first} has; ids must differ")
            continue
        if question.answer is not None and question.answer not in question.choices:
            if "audio_id" in record:
                odd.append(place)  # MMAU's own rule does not need it there; a published benchmark is scored as it is
            else:
                answer, choices = _shown(question.answer), _shown(question.choices)
                problems.append(f"{place}: answer {answer} is not among the choices {choices}{_almost(question)}")
                continue
        questions.append(question)
    if odd:
        note = f"{odd[0]}: the answer is not literally among the choices ({len(odd)} such MMAU questions; kept)"
        print(note, file=sys.stderr)
    return questions, problems


def _almost(question: Question) -> str:
    """A hint where a choice differs from the answer in case or space alone."""
    squeezed = "".join(question.known_answer.split()).lower()
    alike = [choice for choice in question.choices if "".join(choice.split()).lower() == squeezed]
    return f"; {alike[0]!r} differs in case or space alone: correct the one or the other" if alike else ""


def _shown(value) -> str:
    """A value for a message: on one line, and short."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def digest(questions: list[Question]) -> str:
    """A short text that differs where the questions, their clips' names, choices, answers or order differ."""
    content = [(q.question, os.path.basename(q.audio), q.choices, q.answer) for q in questions]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def parse_record(record: dict, place: str, folder: str) -> Question:
    """One record of any format as a Question. `place` and `folder` are as in load_questions."""
    if "multi_choice" in record:  # AVQA's fields
        question = _text(record, "question_text", place).replace("video", "audio")  # as the paper's code does
        choices = _choices(record, "multi_choice", place)
        index = record.get("answer")
        if type(index) is not int or not 0 <= index < len(choices):
            raise InputError(
                f"{place}: answer must be the index of one of the {len(choices)} choices, counted from 0; "
                f"found {_shown(index)}"
            )
        answer = choices[index]
        if "audio_path" in record:
            audio = os.path.join(folder, _text(record, "audio_path", place))
        else:
            audio = _find_avqa_audio(_name(record, "video_name", place), folder)
    elif "audio_id" in record or "audio" in record:  # MMAU, plain
        question = _text(record, "question", place)
        choices = _choices(record, "choices", place)
        answer = record.get("answer", "")
        if not isinstance(answer, str | None):
            raise InputError(f"{place}: answer must be the text of one of the choices; found {_shown(answer)}")
        audio = _name(record, "audio_id", place) if "audio_id" in record else _text(record, "audio", place)
        audio = os.path.join(folder, audio)
    else:
        raise InputError(
            f"{place}: not a question; expected the fields of MMAU (audio_id), R1-AQA (audio_path, multi_choice), "
            f"AVQA (video_name, multi_choice) or audio, question, choices, answer; found {_shown(sorted(record))}"
        )
    if AUDIO_TOKEN in question or any(AUDIO_TOKEN in choice for choice in choices):
        raise InputError(f"{place}: holds {AUDIO_TOKEN}, which would stand for a second clip; take it out")
    parsed = Question(
        id=str(record.get("id", place)),
        audio=os.path.normpath(audio),
        question=question,
        choices=choices,
        answer=answer or None,  # MMAU leaves out, or empty, the answers that it withholds
        task=_label(record, "task"),
        difficulty=_label(record, "difficulty"),
        sub_category=_label(record, "sub-category"),
        place=place,
    )
    try:  # JSON can hold halves of characters, which no tokenizer and no file takes
        "".join(text for value in vars(parsed).values() for text in value or ()).encode()
    except UnicodeEncodeError as error:
        half = _shown(error.object[error.start])
        raise InputError(f"{place}: holds half of a character, {half}; write the file anew as UTF-8") from None
    return parsed


def _label(record: dict, key: str) -> str | None:
    return None if record.get(key) is None else str(record[key])


def _text(record: dict, key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key} must be a text that is not empty; found {_shown(value)}")
    if "\0" in value:
        raise InputError(f"{place}: {key} holds a NUL character; found {_shown(value)}")
    return value


def _name(record: dict, key: str, place: str) -> str:
    """A clip's name in a data set that others made: it has no business outside of the audio folder."""
    name = _text(record, key, place)
    if Path(os.path.normpath(name)).parts[0] == "..":
        raise InputError(f"{place}: {key} {_shown(name)} leaves the audio folder; take the .. out, or use --audio_dir")
    return name


def _choices(record: dict, key: str, place: str) -> list[str]:
    choices = record.get(key)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{place}: {key} must be a list of at least 2 texts; found {_shown(choices)}")
    return choices


def _find_avqa_audio(video_name: str, folder: str) -> str:
    """The audio of an AVQA video: VGGSound's own name (ID_000030) or that of the paper's authors (ID_30)."""
    stem, _, second = video_name.rpartition("_")
    names = [video_name] + ([f"{stem}_{int(second)}"] if stem and re.fullmatch(r"[0-9]{1,9}", second) else [])
    paths = [os.path.join(folder, name + suffix) for name in names for suffix in (".wav", ".flac", ".ogg", ".mp3")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


# ---- which questions a rank trains on ----


def step_indices(num_questions: int, position: int, prompts_per_rank: int, rank: int, seed: int) -> list[int]:
    """Indices of the questions that `rank` trains on in the next step, [prompts_per_rank].

    All ranks read one endless stream, epoch after epoch, each epoch a fresh shuffle of all questions by seed and
    epoch, so that every question is used once per epoch whatever the number of ranks. A step takes the stream's next
    questions, prompts_per_rank for rank 0, as many for rank 1, ... `position` is the number of questions that all
    ranks took before. A pure function: it has no state to save but that number.
    """
    start = position + rank * prompts_per_rank
    indices = []
    for place in range(start, start + prompts_per_rank):
        epoch, offset = divmod(place, num_questions)
        indices.append(int(_epoch_order(num_questions, epoch, seed)[offset]))
    return indices


def _epoch_order(num_questions: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_questions)
