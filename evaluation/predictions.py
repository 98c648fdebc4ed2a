"""Write predictions files, detect finished ones, and keep a journal that an interrupted evaluation continues from.

Beside a predictions file NAME, NAME.settings.json holds everything that its answers depend on and the file's own
SHA-256. A file with other settings, or changed by hand, does not count as finished.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from data import Question
from evaluation.scores import as_written, majority_vote
from infra.errors import InputError
from infra.files import check_folder, set_aside, write_text, writing
from infra.ownership import require_ownership
from model.lora import adapter_base, is_adapter
from questions.fields import MMSU, present
from reward import prediction

# The files of a checkpoint that answers depend on. Predictions may lie beside them, so not every *.json is listed.
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "vocab.json", "merges.txt", "*chat_template*")
# The keys that with_answers writes: MMAU's scripts read the first two, MMAR's the third.
ADDED = ("model_prediction", "model_output", "answer_prediction", "completion", "samples", "error")
ADDED_TO_MMSU = (*ADDED, "response")

# ---- predictions files ----


def predictions_path(checkpoint: str, out: str | None = None, suffix: str = "") -> str:
    """Return where a checkpoint's predictions are written: `out`, else in its folder, else under runs/.

    A Hugging Face name is not a folder: Qwen/Qwen2-Audio-7B-Instruct is written to
    runs/Qwen2-Audio-7B-Instruct/untouched/. `suffix` is added to the file's stem.
    """
    folder = checkpoint if os.path.isdir(checkpoint) else os.path.join("runs", Path(checkpoint).name, "untouched")
    stem, extension = os.path.splitext(out or os.path.join(folder, "mmau_predictions.json"))
    return stem + suffix + extension


def without_answers(records: list[tuple[str, dict]]) -> tuple[list[dict], list[str]]:
    """Return records of a question file without the keys that with_answers has added in an earlier evaluation.

    records: (place, record) of find_records. Lists a problem for each record that is not from a predictions file but
    has one of these keys: with_answers would overwrite the user's own data.
    """
    found, problems = [], []
    for place, record in records:
        added = ADDED_TO_MMSU if record.get(MMSU) else ADDED
        taken = [key for key in added if key in present(record)]
        if taken and not {"model_prediction", "model_output", "completion"} <= record.keys():
            problems.append(f"{place}: has the field {taken[0]!r}, which predictions files use; rename the field")
        found.append({key: value for key, value in record.items() if key not in added})
    return found, problems


def with_answers(
    records: list[dict], questions: list[Question], answers: dict[int, list[str]], errors: dict[int, str], sampled: bool
) -> list[dict]:
    """Return the records with the keys that a predictions file adds.

    questions: of the records. answers: each question's completions by the question's index. errors: why a question has
    none. If `sampled`, the prediction is the majority vote of the completions.
    """
    predicted = []
    for i, record in enumerate(records):
        completions = answers.get(i, [""])
        answer = majority_vote([prediction(text, questions[i].choices) for text in completions])
        written = as_written(questions[i], answer)
        if record.get(MMSU):  # MMSU's script reads a letter
            record, written = record | {"response": written}, answer
        record = record | dict.fromkeys(ADDED[:3], written) | {"completion": completions[0]}
        if sampled:
            record["samples"] = completions if i in answers else []
        if i in errors:
            record["error"] = errors[i]
        predicted.append(record)
    return predicted


def identify_questions(records: list[dict], clips: list[str | None]) -> str:
    """Return a hash of the records, their order and their clips' digests."""
    return hashlib.sha256(json.dumps([records, clips]).encode()).hexdigest()


def identify_checkpoint(checkpoint: str) -> list:
    """Return what identifies a checkpoint: its path, and name, size and time of each of its files.

    An adapter's list includes its base model.
    """
    files = sorted({path for pattern in MODEL_FILES for path in Path(checkpoint).glob(pattern)})
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if is_adapter(checkpoint):
        stats.append(identify_checkpoint(adapter_base(checkpoint)))
    return [os.path.abspath(checkpoint) if files else checkpoint, *stats]


def is_done(out: str, settings: dict) -> bool:
    """Tell whether `out` holds predictions with these settings, unchanged since they were written."""
    saved = saved_settings(out)
    saved.pop("question_file", None)  # a question file may be saved again with the same records
    try:
        return saved == as_saved(settings, Path(out).read_bytes())
    except OSError:
        return False


def saved_settings(out: str) -> dict:
    """Read the settings beside a predictions file. Returns an empty dict if they are missing or damaged."""
    try:
        saved = json.loads(Path(settings_path(out)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def check_writable(paths: list[str]) -> None:
    """Raise InputError if a file could not be written, before hours of work are spent on its content."""
    for path in map(Path, paths):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        check_folder(path.parent, path)


def as_saved(settings: dict, predictions: bytes) -> dict:
    """Return the content of .settings.json for a predictions file's bytes."""
    return settings | {"sha256": hashlib.sha256(predictions).hexdigest()}


def write_predictions(out: str, records: list[dict], settings: dict, question_file: dict | None = None) -> None:
    """Write a predictions file and its settings, and remove its journal. Raises InputError.

    question_file: the result of versions.identify_file, to be stored with the settings. An existing file with other
    settings, or changed since it was written, is kept as .old, .old_2, ...
    """
    if os.path.exists(out) and not is_done(out, settings):
        aside = set_aside(Path(out))
        if os.path.exists(settings_path(out)):
            os.replace(settings_path(out), settings_path(str(aside)))
        print(f"{out} had other settings, or was changed since it was written: it is now {aside}")
    # ASCII, because MMAU's script opens it in the default encoding. MMSU's script reads JSON lines.
    if out.endswith(".jsonl") or any(record.get(MMSU) for record in records):
        text = "".join(json.dumps(record) + "\n" for record in records)
    else:
        text = json.dumps(records, indent=2) + "\n"
    with writing_answers(Path(out)):
        write_text(Path(out), text)
        saved = as_saved(settings, text.encode()) | {"question_file": question_file}
        write_text(Path(settings_path(out)), json.dumps(saved, indent=2) + "\n")
    Path(journal_path(out)).unlink(missing_ok=True)


def settings_path(out: str) -> str:
    return out + ".settings.json"


def journal_path(out: str) -> str:
    return out + ".partial.jsonl"


def writing_answers(path: Path):
    """Wrap `writing` for a file of an evaluation."""
    return writing(path, lambda: "check the disk; the same command continues after the last saved answer")


# ---- the journal ----


def read_journal(path: str, settings: dict, num_questions: int, samples: int) -> dict[int, list[str]]:
    """Return the answers in a journal by question index, and prepare the file for append_journal.

    The first line holds `settings`. Each further line is one answer: the `samples` completions of one of
    `num_questions` questions. A torn or damaged line is cut off, with everything after it. A journal with other
    settings is renamed to path.old and a new one is started, as if there were none.
    """
    require_ownership()
    header = json.dumps(settings, sort_keys=True)
    try:
        *lines, _ = Path(path).read_bytes().split(b"\n")  # text after the last line end is a torn line
    except FileNotFoundError:
        lines = []
    if lines and lines[0] != header.encode():
        print(f"{path} has other settings: starting anew, it is now {set_aside(Path(path))}", file=sys.stderr)
        lines = []
    if not lines:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(header + "\n", encoding="utf-8")
        return {}
    answers, intact = {}, len(lines[0]) + 1
    for line in lines[1:]:
        answer = _parse_line(line, num_questions, samples)
        if answer is None:
            break
        answers |= answer
        intact += len(line) + 1
    os.truncate(path, intact)
    return answers


def append_journal(path: str, answers: dict[int, list[str]]) -> None:
    """Add answers to a journal. Call read_journal first. Raises InputError."""
    with writing_answers(Path(path)), open(path, "a", encoding="utf-8") as file:
        for i, completions in answers.items():
            file.write(_line(i, completions) + "\n")


def _line(i: int, completions: list[str]) -> str:
    return json.dumps({"question": i, "completions": completions})


def _parse_line(line: bytes, num_questions: int, samples: int) -> dict[int, list[str]] | None:
    """Return the answer in a journal's line, or None unless this evaluation could have written exactly these bytes."""
    try:
        record = json.loads(line.decode())
        i, completions = record["question"], record["completions"]
        known = type(i) is int and 0 <= i < num_questions
        whole = isinstance(completions, list) and len(completions) == samples
        whole = whole and all(isinstance(text, str) for text in completions)
        return {i: completions} if known and whole and _line(i, completions) == line.decode() else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
