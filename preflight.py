"""Checks before a model is loaded: the question file, the header and last sample of every clip, the model's files.

Of 38,000 clips pulled from the web, two thousand may be gone or cut off. What is wrong is said at once and together,
not one clip a day.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

from audio import audio_seconds, load_audio
from data import Question, build_prompt, find_questions
from errors import InputError, list_problems
from files import write_text
from lora import adapter_base, base_of, is_adapter

CACHE = "audio_headers.json"  # in a run folder
TOKENS_PER_SECOND = 25  # of audio
MARKUP_TOKENS = 48  # at most, of the chat markup around a prompt
SKIP = "; replace them, name their folder with --audio_dir, or go on without them with --skip_bad_audio"


# ---- questions and clips ----


@dataclass
class Checked:
    questions: list[Question]  # those with a usable clip
    skipped: dict[str, str]  # place of each other one: what is wrong with its clip


def load_checked(
    path: str, audio_dir: str | None, skip_bad_audio: bool, cache: Path | None = None, decode: bool = False
) -> Checked:
    """The questions of a file, of which every one must have an answer and a usable clip. Raises InputError, for all
    that is wrong with the file and the clips together.

    With `skip_bad_audio`, questions without a usable clip are left out. A clip is judged by its header, and known by
    path, size and time in the file `cache` from then on; with `decode`, by all of its samples.
    """
    questions, problems = find_questions(path, audio_dir)
    problems += [f"{question.place}: has no answer; give it, or take this question out" for question in questions
                 if question.answer is None]  # fmt: skip
    paths = list(dict.fromkeys(question.audio for question in questions))
    faults = decode_clips(paths) if decode else check_headers(paths, cache)
    skipped = {question.place: faults[question.audio] for question in questions if question.audio in faults}
    usable = [question for question in questions if question.audio not in faults]
    if problems:
        problems += [] if skip_bad_audio else [f"{place}: {fault}" for place, fault in skipped.items()]
        raise InputError(list_problems(problems))
    if skipped and not (skip_bad_audio and usable):
        raise InputError(bad_audio_report(skipped, len(questions), SKIP))
    if skipped:
        print(bad_audio_report(skipped, len(questions), "; going on without them"), flush=True)
    return Checked(usable, skipped)


def bad_audio_report(faults: dict[str, str], total: int, remedy: str) -> str:
    """How many of `total` questions have no usable clip, and the first of them. faults: by the question's place."""
    listed = [f"{place}: {fault}" for place, fault in faults.items()]
    return list_problems(listed, f"{len(faults)} of {total} questions have no usable clip", remedy)


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
    faults = dict(zip(paths, _in_threads(_decoding_fault, paths, "checking audio")))
    return {path: fault for path, fault in faults.items() if fault is not None}


def _decoding_fault(path: str) -> str | None:
    try:
        load_audio(path)
    except InputError as error:
        return str(error)
    return None


def digest_clips(paths: list[str], bar: bool) -> dict[str, tuple[str | None, str | None]]:
    """For each clip a digest of its file, None if it can't be read, and why load_audio refuses it, None if it doesn't.

    Decodes all of them.
    """

    def check(path):
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None
        except OSError:
            digest = None  # load_audio will say so
        return digest, _decoding_fault(path)

    return dict(zip(paths, _in_threads(check, paths, "checking audio", bar)))


def _in_threads(function, paths: list[str], what: str, bar: bool = True) -> list:
    """The function's value for each path, computed in threads: reading and decoding need no interpreter."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        return list(tqdm(pool.map(function, paths), desc=what, unit="clip", total=len(paths), delay=1, disable=not bar))


# ---- the model ----


@contextmanager
def loading_errors(name_or_path: str, what: str = "a Qwen2-Audio model"):
    """Inside `with`, whatever goes wrong ends in an InputError."""
    try:
        yield
    except Exception as error:  # transformers, safetensors and tokenizers raise all kinds for files they can't use
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name_or_path}: cannot be loaded as {what} ({reason})") from None


def check_model(name_or_path: str) -> None:
    """Raise InputError unless a Hugging Face name or folder is a Qwen2-Audio model, or a folder a LoRA adapter of one.
    Loads no weights."""
    if is_adapter(name_or_path):
        base = adapter_base(name_or_path)
        try:
            if os.path.isabs(base) and not os.path.exists(base):
                raise InputError("it is not there")
            check_model(base)
        except RecursionError:
            raise InputError(f"{name_or_path}: this adapter's bases are adapters of each other; name a model") from None
        except InputError as error:
            raise InputError(
                f"{name_or_path}: the base model of this adapter, {base}, cannot be used ({error}); put it there, or "
                "name another place as base_model_name_or_path in adapter_config.json"
            ) from None
        return
    if os.path.exists(name_or_path):
        if not os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise InputError(f"{name_or_path}: not a model folder, it holds no config.json")
        _check_weight_files(name_or_path)
    with loading_errors(name_or_path):
        model_type = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).model_type
        if model_type != "qwen2_audio":
            raise ValueError(f"its config.json says {model_type}")


def _check_weight_files(folder: str) -> None:
    """Raise InputError unless a model folder has all of its weights, as safetensors."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):
        try:
            with open(index, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: cannot be used ({type(error).__name__}: {error}); copy it again") from None
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, {missing[0]}; copy it again"
            )
    elif not os.path.isfile(os.path.join(folder, "model.safetensors")):
        pickled = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        if pickled:
            what = f"only {pickled[0]}, a pickle, which could run code when it is opened; convert it to safetensors"
            raise InputError(f"{folder}: holds no model.safetensors, {what}")
        raise InputError(f"{folder}: holds no model.safetensors; is this the folder of a checkpoint?")


def check_context(name_or_path: str, questions: list[Question], template: str, max_new_tokens: int) -> None:
    """Raise InputError if a prompt and a completion together can be longer than the model's context. Loads no weights.

    Where the text's bytes already fit, its tokens, which are fewer, are not counted.
    """
    base = base_of(name_or_path)
    with loading_errors(name_or_path):
        context = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().max_position_embeddings
    if max_new_tokens >= context:
        raise InputError(
            f"--max_new_tokens {max_new_tokens} is more than the context of {name_or_path}, {context} tokens"
        )
    spare = context - max_new_tokens - MARKUP_TOKENS
    long = [q for q in questions if len(build_prompt(q, template).encode()) + 30 * TOKENS_PER_SECOND > spare]
    if not long:
        return
    with loading_errors(name_or_path):
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    problems = []
    for question in long:
        text = processor.tokenizer(build_prompt(question, template))["input_ids"]
        heard = min(audio_seconds(question.audio), processor.feature_extractor.chunk_length)
        tokens = len(text) + int(heard * TOKENS_PER_SECOND)
        if tokens > spare:
            problems.append(
                f"{question.place or question.id}: a prompt of {tokens} tokens and --max_new_tokens {max_new_tokens} "
                f"are too long for the model's context of {context}; shorten or remove this question"
            )
    if problems:
        raise InputError(list_problems(problems, f"{len(problems)} questions are too long" if problems[1:] else ""))
