"""Checks before a model is loaded: the question file, the header and last sample of each clip, prompts and answers.

Two thousand of 38,000 clips from the web may be missing or cut off. One message reports all problems before training
starts.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig

from data import Question, answer_is_a_choice, build_prompt, find_questions, target_text
from infra.audio import SAMPLE_RATE, audio_package, audio_seconds, load_audio
from infra.errors import InputError, list_problems
from infra.files import write_text
from infra.processes import SharedInputError, gather
from model.checkpoints import load_processor, loading_errors
from model.lora import base_of
from model.qwen2_audio import TOKENS_PER_SECOND
from policy import decode_text, encode_targets
from reward import REWARDS, in_nfc

CACHE = "audio_headers.json"  # in a run folder
MARKUP_TOKENS = 48  # upper bound of the chat markup's tokens
SKIP = "; replace them, name their folder with --audio_dir, or go on without them with --skip_bad_audio"


# ---- questions and clips ----


@dataclass
class Checked:
    """The questions of a file after all checks."""

    questions: list[Question]  # with an answer and a usable clip
    skipped: dict[str, str]  # left-out questions by place: what is wrong with the clip
    seconds: dict[str, float]  # length of each usable clip, by path


def load_checked(
    path: str, audio_dir: str | None, skip_bad_audio: bool, cache: Path | None = None, decode: bool = False
) -> Checked:
    """Read a question file and check that each question has an answer and a usable clip.

    A clip is checked by its header, and with `decode` by all of its samples. The file `cache` remembers good headers by
    path, size and time. With `skip_bad_audio`, questions without a usable clip are left out. Raises InputError, which
    lists all problems of the file and of the clips.
    """
    questions, problems = find_questions(path, audio_dir)
    problems += [f"{q.place}: has no answer; give it, or take this question out" for q in questions if q.answer is None]
    paths = list(dict.fromkeys(question.audio for question in questions))
    clips = decode_clips(paths) if decode else check_headers(paths, cache)
    faults = {path: fault for path, (fault, _) in clips.items() if fault is not None}
    skipped = {question.place: faults[question.audio] for question in questions if question.audio in faults}
    usable = [question for question in questions if question.audio not in faults]
    if problems:
        problems += [] if skip_bad_audio else [f"{place}: {fault}" for place, fault in skipped.items()]
        raise InputError(list_problems(problems))
    if skipped and not (skip_bad_audio and usable):
        raise InputError(bad_audio_report(skipped, len(questions), SKIP))
    if skipped:
        print(bad_audio_report(skipped, len(questions), "; going on without them"), flush=True)
    return Checked(usable, skipped, {path: seconds for path, (_, seconds) in clips.items() if path not in faults})


def bad_audio_report(faults: dict[str, str], total: int, remedy: str) -> str:
    """Say how many of `total` questions have no usable clip, and list the first. faults: by the question's place."""
    listed = [f"{place}: {fault}" for place, fault in faults.items()]
    return list_problems(listed, f"{len(faults)} of {total} questions have no usable clip", remedy)


def long_clips_note(seconds: Iterable[float], heard: float) -> str | None:
    """Say how many clips the model hears only in part; None if it hears all of each. seconds: length of each clip."""
    lengths = list(seconds)
    cut = sum(length > heard for length in lengths)
    if not cut:
        return None
    return f"{cut} of {len(lengths)} clips are longer than {heard:g} s: the model hears their first {heard:g} s"


# ---- checking clips ----

Clips = dict[str, tuple[str | None, float]]  # by path: what is wrong, None if nothing is; length in seconds


def check_headers(paths: list[str], cache: Path | None = None) -> Clips:
    """Check the header and the last sample of each clip, many at once.

    The file `cache` remembers size, time and length of good clips, which are not opened again until size or time
    change. A bad clip is opened again, because a disk that failed once may be back.
    """
    known = _read_cache(cache)

    def check(path):
        try:
            stat = os.stat(path)
            version = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            version = None  # audio_seconds says what is wrong
        entry = known.get(os.path.abspath(path))
        if version and isinstance(entry, list) and entry[:2] == version and isinstance(entry[-1], float):
            return entry, None
        try:
            return [*(version or ()), audio_seconds(path)], None
        except InputError as error:
            return None, str(error)

    found = dict(zip(paths, _in_threads(check, paths, "checking audio headers")))
    good = {os.path.abspath(path): entry for path, (entry, fault) in found.items() if fault is None}
    if cache and not good.items() <= known.items():
        with suppress(OSError):  # it is only a cache, and another job may be writing it, too
            write_text(cache, json.dumps(known | good) + "\n")
    return {path: (fault, entry[-1] if entry else 0.0) for path, (entry, fault) in found.items()}


def _read_cache(cache: Path | None) -> dict:
    try:
        known = json.loads(cache.read_text(encoding="utf-8")) if cache else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def decode_clips(paths: list[str]) -> Clips:
    """Decode each clip and check all of its samples."""
    return dict(zip(paths, _in_threads(_decode, paths, "checking audio")))


def _decode(path: str) -> tuple[str | None, float]:
    try:
        return None, len(load_audio(path)) / SAMPLE_RATE
    except InputError as error:
        return str(error), 0.0


def digest_clips(paths: list[str], bar: bool) -> dict[str, tuple[str | None, str | None, float]]:
    """Decode each clip. Return path -> (SHA-256 of the file or None if unreadable, what is wrong or None, seconds)."""

    def check(path):
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None
        except OSError:
            digest = None  # load_audio reports it
        return digest, *_decode(path)

    return dict(zip(paths, _in_threads(check, paths, "checking audio", bar)))


def read_clips(questions: list[Question], skip_bad_audio: bool) -> tuple[list[str | None], dict[int, str], list[float]]:
    """Decode all clips, shared over the ranks.

    Returns the digest of each question's clip; for questions with an unusable clip, by index, what is wrong; and the
    seconds of each usable clip. Raises SharedInputError if a clip is unusable, unless skip_bad_audio.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    paths = list(dict.fromkeys(question.audio for question in questions))
    checked = {}
    for part in gather(digest_clips(paths[rank::ranks], bar=rank == 0)):
        checked |= part
    digests, reasons, _ = zip(*(checked[question.audio] for question in questions))
    errors = {i: reason for i, reason in enumerate(reasons) if reason is not None}
    faults = {questions[i].place: reason for i, reason in errors.items()}
    if errors and not skip_bad_audio:
        remedy = "; replace them, name their folder with --audio_dir, or count them as wrong with --skip_bad_audio"
        raise SharedInputError(bad_audio_report(faults, len(questions), remedy))
    if errors and rank == 0:
        print(bad_audio_report(faults, len(questions), " and count as wrong; the predictions file names them all"))
    return list(digests), errors, [seconds for _, reason, seconds in checked.values() if reason is None]


def _in_threads(function, paths: list[str], what: str, bar: bool = True) -> list:
    """Call the function for each path in threads: reading and decoding release Python's lock."""
    audio_package("soundfile"), audio_package("soxr")  # if one is missing, say so once and not for each clip
    with ThreadPoolExecutor(max_workers=32) as pool:
        return list(tqdm(pool.map(function, paths), desc=what, unit="clip", total=len(paths), delay=1, disable=not bar))


# ---- what fits the model ----


def heard_seconds(name_or_path: str) -> float:
    """Return the seconds of a clip that a model hears: 30, or what a tiny model was made for. Loads no weights."""
    return _heard_seconds(_model_config(name_or_path))


def _heard_seconds(config) -> float:
    return config.audio_config.max_source_positions / 50  # 20 ms each


def _model_config(name_or_path: str):
    base = base_of(name_or_path)
    with loading_errors(name_or_path):
        return AutoConfig.from_pretrained(base, trust_remote_code=False)


def check_texts(name_or_path: str, questions: list[Question], template: str, max_new_tokens: int, strict: bool) -> None:
    """Check that prompts and answers fit a model. Loads its tokenizer, but no weights.

    Raises InputError if a question has a special token, if a prompt is too long or, if `strict`, if a right answer
    cannot be rewarded. Training is strict. An evaluation only lists these answers: it takes a published benchmark as it
    is, and MMAU's rule also accepts texts that are not exactly the answer.
    """
    if count := sum(not question.choices for question in questions):
        print(f"{count} of {len(questions)} questions have no choices: their answers are compared by words", flush=True)
    processor = load_processor(name_or_path)
    added = processor.tokenizer.added_tokens_decoder.values()
    if problems := special_tokens_in(questions, [token.content for token in added if token.special]):
        raise InputError(list_problems(problems))
    check_context(name_or_path, processor, questions, template, max_new_tokens)
    problems = unrewardable(processor, questions, template, max_new_tokens)
    heading = f"{len(problems)} of {len(questions)} right answers cannot be rewarded" if problems[1:] else ""
    if problems and strict:
        raise InputError(list_problems(problems, heading))
    if problems:
        print(list_problems(problems, heading), flush=True)


def special_tokens_in(questions: list[Question], tokens: list[str]) -> list[str]:
    """Return a line for each question with a special token, which the model would read as markup, not as text."""
    special, problems = re.compile("|".join(map(re.escape, tokens))), []
    for question in questions:
        if found := special.search("\n".join([question.question, *question.choices])):
            problems.append(f"{question.place}: has the special token {found[0]}; remove or reword it")
    return problems


def unrewardable(processor, questions: list[Question], template: str, max_new_tokens: int) -> list[str]:
    """Return a line with the reason for each question whose right answer cannot be rewarded.

    Encodes and decodes the right completion of each distinct answer, because the rewards read decoded tokens. Questions
    without an answer are left out.
    """
    # Open questions have other rewards, so an answer may occur twice: with choices and without.
    distinct = {(q.answer, q.choices == []): q for q in questions if q.answer is not None}
    keys, reasons = list(distinct), {}
    for start in range(0, len(keys), 100):  # in batches, because targets are padded to the longest one
        some = keys[start : start + 100]
        thought = "<think></think>" if template == "think" else ""
        targets = [thought + target_text(answer, "answer" if thought else template) for answer, _ in some]
        tokens, mask = encode_targets(processor, targets)
        texts, lengths = decode_text(processor, tokens, mask), (mask.sum(dim=1) - 1).tolist()  # without end of turn
        for key, text, length in zip(some, texts, lengths):
            if any(REWARDS[name](text, distinct[key], template) != 1 for name in ("accuracy", "format")):
                reasons[key] = f"the rewards do not find it in {text!r:.200}; reword the answer"
            elif length > max_new_tokens:
                reasons[key] = f"it takes {length} tokens; raise --max_new_tokens to {length} or more"
    problems = []
    for question in questions:
        if question.answer is None:
            continue
        reason = reasons.get((question.answer, question.choices == []))
        if not answer_is_a_choice(question):
            reason = "it is not one of the choices; correct the answer or the choices"
        elif question.choices and in_nfc(question.answer) not in in_nfc(build_prompt(question, template)):
            reason = "the prompt does not contain it; let the template show the choices"
        if reason:
            problems.append(f"{question.place}: the right answer {question.answer!r:.100} cannot be rewarded: {reason}")
    return problems


def check_context(name_or_path: str, processor, questions: list[Question], template: str, max_new_tokens: int) -> None:
    """Raise InputError if a prompt and its longest completion do not fit into the model's context.

    A prompt has at most as many text tokens as bytes, so tokens are counted only if the bytes do not fit.
    """
    config = _model_config(name_or_path)
    context = config.get_text_config().max_position_embeddings
    if max_new_tokens >= context:
        raise InputError(
            f"--max_new_tokens {max_new_tokens} is more than the context of {name_or_path}, {context} tokens"
        )
    spare, longest = context - max_new_tokens - MARKUP_TOKENS, _heard_seconds(config)
    long = [q for q in questions if len(build_prompt(q, template).encode()) + longest * TOKENS_PER_SECOND > spare]
    problems = []
    for question in long:
        text = processor.tokenizer(build_prompt(question, template))["input_ids"]
        heard = min(audio_seconds(question.audio), longest)
        tokens = len(text) + int(heard * TOKENS_PER_SECOND)
        if tokens > spare:
            problems.append(
                f"{question.place or question.id}: a prompt of {tokens} tokens and --max_new_tokens {max_new_tokens} "
                f"are too long for the model's context of {context}; shorten or remove this question"
            )
    if problems:
        raise InputError(list_problems(problems, f"{len(problems)} questions are too long" if problems[1:] else ""))
