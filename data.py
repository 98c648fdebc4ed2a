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
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz; what Qwen2-Audio's mel spectrogram is made for
AUDIO_TOKEN = "<|AUDIO|>"  # where the chat markup puts the clip
MIN_SAMPLES = 400  # one 25 ms window of that spectrogram; less holds no audio token

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
    """The JSON objects of a question file, each with the place it stands at ("FILE, line 3"), in file order."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such question file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None

    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}, record {i}", record) for i, record in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((f"{path}, line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
    if not records:
        raise InputError(f"{path}: holds no questions")
    for place, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{place}: expected a JSON object, found {type(record).__name__}")
    return records


def load_questions(path: str, audio_dir: str | None = None) -> list[Question]:
    """Read a question file of any known format. Raises InputError.

    Relative audio paths are relative to `audio_dir`, or else to the question file's folder.
    """
    return parse_records(read_records(path), audio_dir or os.path.dirname(path))


def parse_records(placed: list[tuple[str, dict]], folder: str, require_audio: bool = True) -> list[Question]:
    """The questions of read_records' records, with audio paths that are relative to `folder`.

    Raises InputError for the first malformed record and, with `require_audio`, for missing audio files with their
    count once all records have been looked at.
    """
    questions, missing, odd = [], [], []
    for place, record in placed:
        question = parse_record(record, place, folder)
        if require_audio and not os.path.isfile(question.audio):
            missing.append(f"{place}: no audio file {question.audio}")
        if question.answer is not None and question.answer not in question.choices:
            if "audio_id" not in record:
                raise InputError(f"{place}: answer {question.answer!r} is not among the choices {question.choices}")
            odd.append(place)  # MMAU's own rule does not need it there, and a published benchmark is scored as it is
        questions.append(question)
    if missing:
        raise InputError(
            f"{missing[0]} ({len(missing)} of {len(questions)} audio files missing); "
            "give their folder with --audio_dir or take these questions out"
        )
    if odd:
        note = f"{odd[0]}: the answer is not literally among the choices ({len(odd)} such MMAU questions; kept)"
        print(note, file=sys.stderr)
    return questions


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
                f"found {index!r}"
            )
        answer = choices[index]
        if "audio_path" in record:
            audio = os.path.join(folder, _text(record, "audio_path", place))
        else:
            audio = _find_avqa_audio(_text(record, "video_name", place), folder)
    elif "audio_id" in record or "audio" in record:  # MMAU, plain
        question = _text(record, "question", place)
        choices = _choices(record, "choices", place)
        answer = record.get("answer", "")
        if not isinstance(answer, str | None):
            raise InputError(f"{place}: answer must be the text of one of the choices; found {answer!r}")
        audio = os.path.join(folder, _text(record, "audio_id" if "audio_id" in record else "audio", place))
    else:
        raise InputError(
            f"{place}: not a question; expected the fields of MMAU (audio_id), R1-AQA (audio_path, multi_choice), "
            f"AVQA (video_name, multi_choice) or audio, question, choices, answer; found {sorted(record)}"
        )
    if AUDIO_TOKEN in question or any(AUDIO_TOKEN in choice for choice in choices):
        raise InputError(f"{place}: holds {AUDIO_TOKEN}, which would stand for a second clip; take it out")
    return Question(
        id=str(record.get("id", place)),
        audio=os.path.normpath(audio),
        question=question,
        choices=choices,
        answer=answer or None,  # MMAU leaves out, or empty, the answers that it withholds
        task=_label(record, "task"),
        difficulty=_label(record, "difficulty"),
        sub_category=_label(record, "sub-category"),
    )


def _label(record: dict, key: str) -> str | None:
    return None if record.get(key) is None else str(record[key])


def _text(record: dict, key: str, place: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: {key} must be a text that is not empty; found {value!r}")
    return value


def _choices(record: dict, key: str, place: str) -> list[str]:
    choices = record.get(key)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{place}: {key} must be a list of at least 2 texts; found {choices!r}")
    return choices


def _find_avqa_audio(video_name: str, folder: str) -> str:
    """The audio of an AVQA video: VGGSound's own name (ID_000030) or that of the paper's authors (ID_30)."""
    stem, _, second = video_name.rpartition("_")
    names = [video_name] + ([f"{stem}_{int(second)}"] if stem and re.fullmatch(r"[0-9]+", second) else [])
    paths = [os.path.join(folder, name + suffix) for name in names for suffix in (".wav", ".flac", ".ogg", ".mp3")]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


# ---- audio ----


def load_audio(path: str) -> np.ndarray:
    """A clip's first channel as float32 samples at 16 kHz, [samples], full scale 1.0. Raises InputError."""
    with _one_line_errors(path):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    audio = soxr.resample(samples[:, 0], rate, SAMPLE_RATE)
    if len(audio) < MIN_SAMPLES:
        raise InputError(f"{path}: {len(audio) / SAMPLE_RATE * 1000:.0f} ms of audio; at least 25 ms are needed")
    if not np.isfinite(audio).all():
        raise InputError(f"{path}: holds NaN or infinite samples; replace or remove this clip")
    return audio


def check_clips(paths: list[str], bar: bool = False) -> dict[str, tuple[str | None, str | None]]:
    """For each clip a digest of its file, None if it is missing, and why load_audio refuses it, None if it does not.

    Decodes all of them, in threads.
    """

    def check(path):
        if not os.path.isfile(path):
            return None, f"no audio file {path}"
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        try:
            load_audio(path)
        except InputError as error:
            return digest, str(error)
        return digest, None

    with ThreadPoolExecutor() as pool:
        found = pool.map(check, paths)
        found = list(tqdm(found, desc="checking audio", unit="clip", total=len(paths), disable=not bar))
    return dict(zip(paths, found))


def audio_seconds(path: str) -> float:
    """A clip's length by its header. Raises InputError."""
    with _one_line_errors(path):
        return soundfile.info(path).duration


@contextmanager
def _one_line_errors(path: str):
    try:
        yield
    # TypeError: headerless .raw files; MemoryError: a damaged header that claims hours of audio
    except (OSError, TypeError, MemoryError, soundfile.LibsndfileError) as error:
        raise InputError(f"{path}: cannot be read as audio ({error}); replace or remove this clip") from None


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
