"""Checks before a model is loaded: the question file, and the header and last sample of every clip.

Of 38,000 clips pulled from the web, two thousand may be gone or cut off. What is wrong is said at once and together,
not one clip a day.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from checkpoint import write_text
from data import InputError, Question, audio_seconds, load_audio, load_questions, report

CACHE = "audio_headers.json"  # in a run folder
SKIP = "; replace them, name their folder with --audio_dir, or go on without them with --skip_bad_audio"


@dataclass
class Checked:
    questions: list[Question]  # those with a usable clip
    skipped: dict[str, str]  # place of each other one: what is wrong with its clip


def load_checked(
    path: str, audio_dir: str | None, skip_bad_audio: bool, cache: Path | None = None, decode: bool = False
) -> Checked:
    """load_questions, of which every one must have an answer and a usable clip. Raises InputError for all others.

    With `skip_bad_audio`, questions without a usable clip are left out. A clip is judged by its header, and known by
    path, size and time in the file `cache` from then on; with `decode`, by all of its samples.
    """
    questions = load_questions(path, audio_dir)
    withheld = [f"{question.place}: has no answer; give it, or take this question out" for question in questions
                if question.answer is None]  # fmt: skip
    if withheld:
        heading = f"{path}: {len(withheld)} of {len(questions)} questions have no answer" if withheld[1:] else ""
        raise InputError(report(withheld, heading))
    paths = list(dict.fromkeys(question.audio for question in questions))
    faults = decode_clips(paths) if decode else check_headers(paths, cache)
    skipped = {question.place: faults[question.audio] for question in questions if question.audio in faults}
    usable = [question for question in questions if question.audio not in faults]
    if skipped and not (skip_bad_audio and usable):
        raise InputError(bad_audio_report(skipped, len(questions), SKIP))
    if skipped:
        print(bad_audio_report(skipped, len(questions), "; going on without them"), flush=True)
    return Checked(usable, skipped)


def bad_audio_report(faults: dict[str, str], total: int, remedy: str) -> str:
    """How many of `total` questions have no usable clip, and the first of them. faults: by the question's place."""
    listed = [f"{place}: {fault}" for place, fault in faults.items()]
    return report(listed, f"{len(faults)} of {total} questions have no usable clip", remedy)


def check_headers(paths: list[str], cache: Path | None = None) -> dict[str, str]:
    """The clips whose header, or last sample, says that they cannot be used, and why. Opens many at once.

    Clips found good are written to the file `cache` with size and time, and not opened again while they have these.
    Others are: a disk that failed once may be back.
    """
    known = _read_cache(cache)

    def check(path):
        try:
            stat = os.stat(path)
            version = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            version = None  # audio_seconds says what is wrong
        if version and known.get(os.path.abspath(path)) == version:
            return version, None
        try:
            audio_seconds(path)
        except InputError as error:
            return None, str(error)
        return version, None

    found = dict(zip(paths, _in_threads(check, paths, "checking audio headers")))
    good = {os.path.abspath(path): version for path, (version, fault) in found.items() if fault is None}
    if cache and not good.items() <= known.items():
        write_text(cache, json.dumps(known | good) + "\n")
    return {path: fault for path, (_, fault) in found.items() if fault is not None}


def _read_cache(cache: Path | None) -> dict:
    try:
        known = json.loads(cache.read_text(encoding="utf-8")) if cache else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def decode_clips(paths: list[str]) -> dict[str, str]:
    """The clips that load_audio refuses, and why. Decodes all of them."""
    return {path: fault for path, (_, fault) in digest_clips(paths, bar=True).items() if fault is not None}


def digest_clips(paths: list[str], bar: bool) -> dict[str, tuple[str | None, str | None]]:
    """For each clip a digest of its file, None if it can't be read, and why load_audio refuses it, None if it doesn't.

    Decodes all of them.
    """

    def check(path):
        digest = fault = None
        try:
            load_audio(path)
        except InputError as error:
            fault = str(error)
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None
        except OSError:
            pass  # then load_audio has said so
        return digest, fault

    return dict(zip(paths, _in_threads(check, paths, "checking audio", bar)))


def _in_threads(function, paths: list[str], what: str, bar: bool = True) -> list:
    """The function's value for each path, computed in threads: reading and decoding need no interpreter."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        return list(tqdm(pool.map(function, paths), desc=what, unit="clip", total=len(paths), delay=1, disable=not bar))
