"""Predictions files: the input's own records with a model's answers added, and whether one is there already.

Beside a predictions file NAME stands NAME.settings.json: all that its answers depend on, and its own hash. A file that
was changed by hand, or is of other settings, is not taken for done.
"""

import hashlib
import json
import os
from pathlib import Path

from errors import InputError
from files import check_folder, set_aside, write_text, writing_answers
from lora import adapter_base, is_adapter
from reward import prediction
from scores import majority_vote

# Of a checkpoint, what answers depend on; predictions may lie beside it.
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer*", "vocab.json", "merges.txt", "*chat_template*")
ADDED = ("model_prediction", "model_output", "completion", "samples", "error")


def with_answers(
    records: list[dict], answers: dict[int, list[str]], errors: dict[int, str], sampled: bool
) -> list[dict]:
    """The records with the keys that a predictions file adds to them.

    answers: the completions of each question, by its index; errors: why a question has none; sampled: whether the
    prediction is the majority vote of several.
    """
    predicted = []
    for i, record in enumerate(records):
        record = {key: value for key, value in record.items() if key not in ADDED}  # of an earlier predictions file
        completions = answers.get(i, [""])
        said = majority_vote([prediction(text) for text in completions]) if sampled else prediction(completions[0])
        record = record | {"model_prediction": said, "model_output": said, "completion": completions[0]}
        if sampled:
            record["samples"] = completions if i in answers else []
        if i in errors:
            record["error"] = errors[i]
        predicted.append(record)
    return predicted


def identify_questions(records: list[dict], clips: list[str | None]) -> str:
    """A text that differs where the records, their order, or the digests of their clips differ."""
    return hashlib.sha256(json.dumps([records, clips]).encode()).hexdigest()


def identify_checkpoint(checkpoint: str) -> list:
    """A checkpoint's name with its files' names, sizes and times: what tells it from another of that name. Those of its
    base are among an adapter's."""
    files = sorted({path for pattern in MODEL_FILES for path in Path(checkpoint).glob(pattern)})
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    if is_adapter(checkpoint):
        stats.append(identify_checkpoint(adapter_base(checkpoint)))
    return [os.path.abspath(checkpoint) if files else checkpoint, *stats]


def is_done(out: str, settings: dict) -> bool:
    """Whether `out` holds predictions of these settings, whole and as they were written."""
    try:
        return _saved_settings(out) == as_saved(settings, Path(out).read_bytes())
    except OSError:
        return False


def _saved_settings(out: str) -> dict:
    try:
        saved = json.loads(Path(settings_path(out)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def check_writable(paths: list[str]) -> None:
    """Raise InputError for files that could not be written, before hours of work are spent on what goes into them."""
    for path in map(Path, paths):
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        check_folder(path.parent, path)


def as_saved(settings: dict, predictions: bytes) -> dict:
    """What stands in .settings.json beside a predictions file."""
    return settings | {"sha256": hashlib.sha256(predictions).hexdigest()}


def write_predictions(out: str, records: list[dict], settings: dict) -> None:
    """Write a predictions file and its settings beside it, and remove its journal. Raises InputError.

    A file of that name that is of other settings, or was changed since it was written, is kept as .old, .old_2, ...
    """
    if os.path.exists(out) and not is_done(out, settings):
        aside = set_aside(Path(out))
        if os.path.exists(settings_path(out)):
            os.replace(settings_path(out), settings_path(str(aside)))
        print(f"{out} was of other settings, or changed since: it is now {aside}")
    text = json.dumps(records, indent=2) + "\n"  # in ASCII: MMAU's script opens it in whatever encoding is the default
    with writing_answers(Path(out)):
        write_text(Path(out), text)
        write_text(Path(settings_path(out)), json.dumps(as_saved(settings, text.encode()), indent=2) + "\n")
    Path(journal_path(out)).unlink(missing_ok=True)


def settings_path(out: str) -> str:
    return out + ".settings.json"


def journal_path(out: str) -> str:
    return out + ".partial.jsonl"
