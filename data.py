"""Questions about audio: reading question files, building prompts, loading clips, sharing questions over ranks.

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
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz; what Qwen2-Audio's mel spectrogram is made for
AUDIO_TOKEN = "<|AUDIO|>"  # where the chat markup puts the clip
SHOWN = 20  # of many problems, how many are listed
MIN_SAMPLES = 400  # one 25 ms window of that spectrogram; less holds no audio token
# Beyond these, a clip or its header is more likely broken than meant: no recording of speech, music or a scene needs
# them, 5.1 sound has 6 channels, and the model hears 16 kHz and 30 s.
MAX_RATE, MAX_CHANNELS, MAX_SECONDS, MAX_PEAK = 96_000, 6, 1800, 1e5

# The exact texts that the paper's released checkpoints were trained with. {choices} is a Python list's own repr.
_OPTIONS = "{question} Please choose the answer from the following options: {choices}."
TEMPLATES = {
    "direct": _OPTIONS,
    "answer": _OPTIONS + " Output the final answer in <answer> </answer>.",
    "think": _OPTIONS + " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
}


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that names the place, the fault and the remedy."""


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


def report(problems: list[str], heading: str = "", remedy: str = "") -> str:
    """One problem in a line; several under a line that says how many, the first SHOWN of them in full."""
    if len(problems) == 1 and not heading:
        return problems[0] + remedy
    listed = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        listed.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join([(heading or f"{len(problems)} problems") + remedy, *listed])


def read_records(path: str) -> list[tuple[str, dict]]:
    """The JSON objects of a question file, each with the place it stands at ("FILE, line 3"), in file order.

    Raises InputError, for all lines that are not JSON objects together.
    """
    placed, problems = _find_records(path)
    if problems:
        raise InputError(report(problems))
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
                    fault = getattr(error, "msg", error)
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


def kind_of_file(path: str) -> str:
    """What a path is that is not a regular file: "folder", "named pipe", "broken link" or "device"."""
    if os.path.isdir(path):
        return "folder"
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    return "named pipe" if stat.S_ISFIFO(os.stat(path).st_mode) else "device"


def load_questions(path: str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file of any known format. Raises InputError, for all malformed records together.

    Relative audio paths are relative to `audio_dir`, or else to the question file's folder. No audio is looked at.
    """
    questions, problems = find_questions(path, audio_dir)
    if problems:
        raise InputError(report(problems))
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
        raise InputError(report(problems))
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
    squeezed = "".join(question.answer.split()).lower()
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


def check_answers(questions: list[Question], path: str) -> None:
    """Raise InputError if the answer of a question from the file `path` is withheld."""
    withheld = [question.id for question in questions if question.answer is None]
    if withheld:
        raise InputError(f"{path}: question {withheld[0]} has no answer ({len(withheld)} such); give or remove them")


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


# ---- audio ----


def load_audio(path: str) -> np.ndarray:
    """A clip's first channel as float32 samples at 16 kHz, [samples], full scale 1.0. Raises InputError."""
    with open_clip(path) as file, _one_line_errors(path):
        samples = file.read(dtype="float32", always_2d=True)[:, 0]
        rate, announced = file.samplerate, file.frames
    if len(samples) < announced:
        fault = f"was cut off, {len(samples) / rate:.1f} of {announced / rate:.1f} s are there"
    elif not np.isfinite(samples).all():
        fault = "holds NaN or infinite samples"
    elif (peak := np.abs(samples).max()) > MAX_PEAK:
        fault = f"holds samples of up to {peak:.0e}, where full scale is 1"
    elif peak == 0:
        fault = "holds nothing but zeros, absolute silence"
    else:
        return soxr.resample(samples, rate, SAMPLE_RATE)
    raise InputError(f"{path}: {fault}; replace or remove this clip")


@contextmanager
def open_clip(path: str) -> Iterator[soundfile.SoundFile]:
    """A clip, opened to be read, if its header and its last sample are as a clip's should be. Raises InputError."""
    fault = file_fault(path)
    if fault is None:
        with _one_line_errors(path), soundfile.SoundFile(path) as file:
            fault = _header_fault(file)
            if fault is None and file.format != "MP3":  # there, seeking decodes all that is before
                try:
                    file.seek(file.frames - 1)
                    file.seek(0)
                except soundfile.LibsndfileError:
                    fault = "was cut off or is damaged: its last sample cannot be reached"
            if fault is None:
                yield file
                return
    raise InputError(f"{path}: {fault}; replace or remove this clip")


def file_fault(path: str) -> str | None:
    """Why a path cannot be a clip, before it is opened."""
    if not os.path.lexists(path):
        return "no audio file of this name"
    if not os.path.isfile(path):  # reading a pipe would wait for someone to write
        return f"is a {kind_of_file(path)}, not an audio file"
    size = os.path.getsize(path)
    if size == 0:
        return "is an empty file"
    with _one_line_errors(path), open(path, "rb") as file:
        announced = _mp3_bytes(file.read(4096))
    return f"was cut off, {size} of {announced} bytes are there" if size < 0.99 * announced else None


def _mp3_bytes(start: bytes) -> int:
    """The size that an MP3 file says it has, in a frame named Xing or Info; 0 if it does not say."""
    place = max(start.find(b"Xing"), start.find(b"Info"))
    if place < 0 or not start.startswith((b"ID3", b"\xff")):
        return 0
    flags = int.from_bytes(start[place + 4 : place + 8], "big")  # bit 0: the number of frames is next; bit 1: of bytes
    field = place + 8 + 4 * (flags & 1)
    return int.from_bytes(start[field : field + 4], "big") if flags & 2 else 0


def _header_fault(file: soundfile.SoundFile) -> str | None:
    """What is wrong with a clip by its header."""
    seconds = file.frames / file.samplerate if file.samplerate > 0 else 0
    if not 0 < file.samplerate <= MAX_RATE:
        return f"has {file.samplerate} Hz, where at most {MAX_RATE} are expected (ffmpeg -ar 16000 changes that)"
    if file.channels > MAX_CHANNELS:
        return f"has {file.channels} channels, where at most {MAX_CHANNELS} are expected (ffmpeg -ac 1 mixes them)"
    if seconds < MIN_SAMPLES / SAMPLE_RATE:
        return f"holds {seconds * 1000:.0f} ms of audio, and at least 25 ms are needed"
    if seconds > MAX_SECONDS:
        return f"lasts {seconds:.0f} s, of which the model would hear the first 30 (ffmpeg -t 30 cuts it)"
    said = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)  # libsndfile's, of WAV
    if said and int(said[2]) < int(said[1]) < 2**31 - 2**16:  # a size near 2^31 or 2^32 stands for one not known
        return f"was cut off, {said[2]} of {said[1]} bytes of samples are there"
    if re.search("lacks an end-of-stream bit|Junk after the last page", file.extra_info):  # of Ogg
        return f"was cut off after {seconds:.1f} s: its end is missing"
    return None


def audio_seconds(path: str) -> float:
    """A clip's length by its header. Raises InputError."""
    with open_clip(path) as file:
        return file.frames / file.samplerate


@contextmanager
def _one_line_errors(path: str):
    try:
        yield
    # TypeError: headerless .raw files; MemoryError: a damaged header that claims hours of audio
    except (OSError, TypeError, ValueError, MemoryError, soundfile.LibsndfileError) as error:
        reason = " ".join(str(error).replace(f"Error opening {path!r}: ", "").split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as audio ({reason}); replace or remove this clip") from None


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
