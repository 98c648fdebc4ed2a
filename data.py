"""Questions about audio: read question files, build prompts, share the questions among the ranks.

The fields of a record tell its format:

    MMAU      {"audio_id", "question", "choices", "answer", "task", "sub-category", "difficulty", ...}
    R1-AQA    AVQA's fields plus {"dataset_name", "audio_path"}; the paper's own training file
    AVQA      {"video_name", "question_text", "multi_choice", "answer": index, ...}; AVQA's train_qa.json
    plain     {"audio", "question", "choices", "answer"}; your own data

A file is one JSON list, or has one JSON object per line.
"""

import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.audio import load_audio as load_audio  # part of this file's interface
from infra.errors import InputError, list_problems
from infra.files import kind_of_file
from reward import in_nfc

AUDIO_TOKEN = "<|AUDIO|>"  # the chat markup puts the clip in its place

# The paper's released checkpoints were trained with exactly these texts. {choices} looks like a Python list.
_OPTIONS = "{question} Please choose the answer from the following options: {choices}."
TEMPLATES = {
    "direct": _OPTIONS,
    "answer": _OPTIONS + " Output the final answer in <answer> </answer>.",
    "think": _OPTIONS + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


@dataclass
class Question:
    id: str
    audio: str  # path of the clip
    question: str
    choices: list[str]
    answer: str | None  # one of the choices; None if the file withholds it
    task: str | None = None
    difficulty: str | None = None
    sub_category: str | None = None
    place: str = field(default="", compare=False)  # file and line of the record, for messages: "FILE, line 3"

    @property
    def known_answer(self) -> str:
        """Return the answer of a question that must have one."""
        assert self.answer is not None, f"{self.place}: the answer is withheld"
        return self.answer


def build_prompt(question: Question, template: str) -> str:
    """Return the user's text for a question, without chat markup. Raises InputError for an unknown template."""
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[template].format(question=question.question, choices=_shown_choices(question.choices))


def _shown_choices(choices: list[str]) -> str:
    """Format choices like the repr of a Python list, but without its escapes.

    The model must write the text of a choice. repr would show another text: it escapes, for example, a backslash, a
    line end and a zero-width joiner.
    """
    quotes = (repr(choice)[0] for choice in choices)
    return f"[{', '.join(quote + choice + quote for quote, choice in zip(quotes, choices))}]"


def target_text(answer: str, template: str) -> str:
    """Return the right completion: the bare answer for template `direct`, <answer>...</answer> for `answer`.

    Strips the answer, as the rewards do. Raises InputError for `think`: question files have no thoughts to learn from.
    """
    if template == "think":
        raise InputError("template 'think' has no target to imitate: question files have answers without thoughts")
    return answer.strip() if template == "direct" else f"<answer>{answer.strip()}</answer>"


# ---- question files ----


def load_questions(path: str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file of any known format. Raises one InputError for all malformed records.

    Relative audio paths start from `audio_dir`, or else from the folder of the question file. Opens no audio.
    """
    return require(find_questions(path, audio_dir))


def require(found: tuple[list, list[str]]) -> list:
    """Return the list that one of the `find` functions found. Raises one InputError for all of its problems."""
    records_or_questions, problems = found
    if problems:
        raise InputError(list_problems(problems))
    return records_or_questions


def find_questions(path: str, audio_dir: str | None = None) -> tuple[list[Question], list[str]]:
    """Read the usable questions of a file, and list a problem for each unusable record.

    Raises InputError if the file has no records.
    """
    records, problems = find_records(path)
    questions, more = find_questions_in(records, audio_dir or os.path.dirname(path))
    return questions, problems + more


def find_records(path: str) -> tuple[list[tuple[str, dict]], list[str]]:
    """Read the JSON objects of a file as (place, object) in file order, and list a problem for each unusable line.

    A place is "FILE, line 3". Raises InputError if no line is right.
    """
    text = _read_text(path)
    values, problems = [], []
    if text.lstrip().startswith("["):
        try:
            values = [(f"{path}, record {i}", value) for i, value in enumerate(_parse_json(text), start=1)]
        except json.JSONDecodeError as error:
            fault = f"line {error.lineno}: not valid JSON ({error.msg})"
            raise InputError(f"{path}, {fault}; give one JSON list, or one JSON object per line") from None
        except ValueError as error:
            raise InputError(f"{path}: not usable as JSON ({error})") from None
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    values.append((place, _parse_json(line)))
                except ValueError as error:
                    fault = getattr(error, "msg", str(error))
                    problems.append(
                        f"{place}: not valid JSON ({fault}); give one JSON object per line, or one JSON list"
                    )
        if problems and not any(isinstance(value, dict) for _, value in values):  # the file has another format
            raise InputError(problems[0])
    for place, value in values:
        if not isinstance(value, dict):
            problems.append(f"{place}: expected a JSON object, found {type(value).__name__}")
    if not values and not problems:
        raise InputError(f"{path}: has no questions")
    return [(place, value) for place, value in values if isinstance(value, dict)], problems


def _read_text(path: str) -> str:
    """Read the text of a file, with or without a byte-order mark. Raises InputError."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such question file")
    if not os.path.isfile(path):  # reading a pipe would wait, and a second reading would find nothing
        raise InputError(f"{path}: is a {kind_of_file(path)}; name a file of questions")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def _parse_json(text: str):
    """Call json.loads. Raises ValueError for every failure."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def find_questions_in(records: list[tuple[str, dict]], folder: str) -> tuple[list[Question], list[str]]:
    """Parse records of find_records, with audio paths relative to `folder`. List a problem for each unusable record."""
    questions, problems, places = [], [], {}  # places: id -> place
    for place, record in records:
        try:
            question = parse_record(record, place, folder)
        except InputError as error:
            problems.append(str(error))
            continue
        first = places.setdefault(question.id, place)
        if first != place:
            problems.append(f"{place}: has the id {_shown(question.id)}, the same as {first}; give it another id")
            continue
        # A published benchmark is scored as it is: MMAU's rule does not need the answer among the choices.
        if not ("audio_id" in present(record) or question.answer is None or answer_is_a_choice(question)):
            answer, choices = _shown(question.answer), _shown(question.choices)
            problems.append(f"{place}: answer {answer} is not among the choices {choices}{_almost(question)}")
            continue
        questions.append(question)
    return questions, problems


def answer_is_a_choice(question: Question) -> bool:
    """Tell whether the answer is one of the choices, compared in NFC. The question must have an answer."""
    return in_nfc(question.known_answer) in map(in_nfc, question.choices)


def _almost(question: Question) -> str:
    """Return a hint if a choice differs from the answer only in case or spaces, else ""."""
    squeezed = "".join(question.known_answer.split()).lower()
    alike = [choice for choice in question.choices if "".join(choice.split()).lower() == squeezed]
    return f"; {alike[0]!r} differs only in case or spaces: correct one of them" if alike else ""


def _shown(value) -> str:
    """Format a value for a message: one line, at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def digest(questions: list[Question]) -> str:
    """Return a hash of the questions, the names of their clips, their choices, answers and order."""
    content = [(q.question, os.path.basename(q.audio), q.choices, q.answer) for q in questions]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def parse_record(record: dict, place: str, folder: str) -> Question:
    """Parse one record of any format. Relative audio paths start from `folder`. Raises InputError."""
    record = present(record)
    if "multi_choice" in record:  # AVQA, R1-AQA
        question = _text(record, "question_text", place).replace("video", "audio")  # as in the paper's code
        choices = _choices(record, "multi_choice", place)
        index = record.get("answer")
        if type(index) is not int or not 0 <= index < len(choices):
            raise InputError(
                f"{place}: answer must be the index of one of the {len(choices)} choices, counted from 0; "
                f"found {_shown(index)}"
            )
        answer = choices[index]
        if "audio_path" in record:
            audio = _clip_path(folder, _text(record, "audio_path", place))
        else:
            audio = _find_avqa_audio(_name(record, "video_name", place), folder)
    elif "audio_id" in record or "audio" in record:  # MMAU, plain
        question = _text(record, "question", place)
        choices = _choices(record, "choices", place)
        answer = record.get("answer", "")
        if not isinstance(answer, str | None):
            raise InputError(f"{place}: answer must be the text of one of the choices; found {_shown(answer)}")
        audio = _name(record, "audio_id", place) if "audio_id" in record else _text(record, "audio", place)
        audio = _clip_path(folder, audio)
    else:
        raise InputError(
            f"{place}: not a question; expected the fields of MMAU (audio_id), R1-AQA (audio_path, multi_choice), "
            f"AVQA (video_name, multi_choice) or audio, question, choices, answer; found {_shown(sorted(record))}"
        )
    parsed = Question(
        id=str(record.get("id", place)),
        audio=os.path.normpath(audio),
        question=question,
        choices=choices,
        answer=answer or None,  # MMAU withholds answers: it leaves them out or empty
        task=_label(record, "task"),
        difficulty=_label(record, "difficulty"),
        sub_category=_label(record, "sub-category"),
        place=place,
    )
    try:  # JSON's escapes can spell a lone surrogate, half of a character, which UTF-8 cannot encode
        "".join(text for value in vars(parsed).values() for text in value or ()).encode()
    except UnicodeEncodeError as error:
        half = _shown(error.object[error.start])
        raise InputError(f"{place}: has half of a character, {half}; write the whole character") from None
    try:
        os.fsencode(parsed.audio)
    except UnicodeEncodeError as error:  # in the locale C, with Python's UTF-8 mode off
        fault = f"the system's encoding of file names, {error.encoding}, lacks characters of {_shown(parsed.audio)}"
        raise InputError(f"{place}: {fault}; set PYTHONUTF8=1") from None
    return parsed


def present(record: dict) -> dict:
    """Return the fields that a record has. Tables write null, or NaN, which differs from itself, for the others."""
    return {name: value for name, value in record.items() if value is not None and value == value}


def _label(record: dict, key: str) -> str | None:
    return str(record[key]) if key in record else None


def _text(record: dict, key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key} must be a text that is not empty; found {_shown(value)}")
    if "\0" in value:
        raise InputError(f"{place}: {key} has a NUL character; found {_shown(value)}")
    return value


def _name(record: dict, key: str, place: str) -> str:
    """Return a clip's name from a published data set. Raises InputError if it leads out of the audio folder."""
    name = _text(record, key, place)
    if Path(os.path.normpath(name.replace("\\", "/"))).parts[0] == "..":
        raise InputError(f"{place}: {key} {_shown(name)} leaves the audio folder; take the .. out, or use --audio_dir")
    return name


def _choices(record: dict, key: str, place: str) -> list[str]:
    choices = record.get(key)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{place}: {key} must be a list of at least 2 texts; found {_shown(choices)}")
    return choices


def _clip_path(folder: str, name: str) -> str:
    """Return the path of a clip. If no file has the name, try \\ as / (Windows) and Unicode's NFC and NFD (macOS)."""
    slashes = name.replace("\\", "/")
    spellings = dict.fromkeys([name, slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))])
    paths = [os.path.join(folder, spelling) for spelling in spellings]
    if len(paths) == 1:  # nearly all names: do not look at the disk, which may be slow
        return paths[0]
    return next(filter(os.path.exists, paths), paths[0])


def _find_avqa_audio(video_name: str, folder: str) -> str:
    """Return the path of an AVQA video's audio, under VGGSound's name (ID_000030) or the paper authors' (ID_30)."""
    stem, _, second = video_name.rpartition("_")
    names = [video_name] + ([f"{stem}_{int(second)}"] if stem and re.fullmatch(r"[0-9]{1,9}", second) else [])
    paths = [_clip_path(folder, name + suffix) for name in names for suffix in (".wav", ".flac", ".ogg", ".mp3")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


# ---- which questions a rank trains on ----


def step_indices(num_questions: int, position: int, prompts_per_rank: int, rank: int, seed: int) -> list[int]:
    """Return the indices of the questions that `rank` trains on in the next step, [prompts_per_rank].

    All ranks read one endless stream of epochs. Each epoch is a new shuffle of all questions, given by seed and epoch,
    so every question is used once per epoch, for any number of ranks. A step takes the next questions of the stream:
    the first prompts_per_rank for rank 0, the following ones for rank 1, and so on. `position` is the number of
    questions that all ranks have taken so far, the only state that a run has to save.
    """
    start, indices = position + rank * prompts_per_rank, []
    for i in range(start, start + prompts_per_rank):
        epoch, offset = divmod(i, num_questions)
        order = np.random.default_rng([seed, epoch]).permutation(num_questions)
        indices.append(int(order[offset]))
    return indices
