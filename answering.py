"""Answering many questions: in batches of similar length, shared over the ranks, written to a journal as they come.

The batches follow from the questions and the batch size alone, and each has random numbers of its own. So neither the
number of ranks nor an interruption changes an answer, with sampling and in bfloat16 as well, where an answer may
depend on what else is in its batch.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from audio import audio_seconds
from data import Question, build_prompt
from decoding import GroupDecoder
from files import set_aside, writing_answers
from policy import decode_text, encode_ahead, sample_group, stop_token_ids, to_device
from preflight import TOKENS_PER_SECOND
from reward import format_reward, guessing, prediction
from runtime import exit_if_abandoned, gather, on_rank_0
from scores import is_right


def answer_questions(
    model,
    processor,
    questions: list[Question],
    template: str,
    max_new_tokens: int,
    batch_size: int,
    *,
    silence: bool = False,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    journal: tuple[str, dict] | None = None,
    cuda_graph: bool = True,
) -> list[list[str]]:
    """The whole texts of `samples` completions of each question, in the order of `questions`; the same on every rank.

    Temperature 0 takes the most likely token each time. Each batch holds batch_size prompts. `journal` is a file and
    the settings that its answers depend on, as in read_journal: answers found there are taken over, new ones are
    added. Raises InputError for a clip that cannot be read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = similar_lengths(processor, questions, template, batch_size)
    answers = {}
    if journal:
        answers = on_rank_0(lambda: read_journal(*journal, len(questions), samples))
    # A batch of which an answer is missing is computed as a whole: as it would have been without an interruption.
    todo = [number for number, batch in enumerate(batches) if not all(i in answers for i in batch)]
    mine = ([questions[i] for i in batches[number]] for number in todo[rank::ranks])
    prompts = encode_ahead(processor, mine, template, silence)
    stop_ids = stop_token_ids(model, processor)
    decoder = GroupDecoder(model, samples, max_new_tokens, cuda_graph)

    missing = sum(len(batches[number]) for number in todo)
    progress = tqdm(
        total=len(questions), initial=len(questions) - missing, desc="answering", unit="question", disable=rank != 0
    )
    for first in range(0, len(todo), ranks):  # a batch for each rank; in the last round some may be left without
        added = {}
        if first + rank < len(todo):
            number = todo[first + rank]
            _, prompt = next(prompts)
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + number)
            inputs = model, to_device(prompt, model.device), samples, max_new_tokens, temperature, stop_ids, generator
            completions, mask = sample_group(*inputs, decoder)
            texts = decode_text(processor, completions, mask)
            added = {i: texts[row * samples : (row + 1) * samples] for row, i in enumerate(batches[number])}
        added = {i: own for part in gather(added) for i, own in part.items()}
        exit_if_abandoned()
        if journal and rank == 0:
            append_journal(journal[0], added)
        answers |= added
        progress.update(len(added))
    progress.close()
    return [answers[i] for i in range(len(questions))]


def similar_lengths(processor, questions: list[Question], template: str, batch_size: int) -> list[list[int]]:
    """Batches of indices of questions whose prompts have about as many tokens, text and audio, by the clips' headers.

    The longest first, so that too little memory shows at once. Raises InputError for a clip without a header.
    """
    longest = processor.feature_extractor.chunk_length  # seconds that the model hears of a clip

    def length(i):
        text = processor.tokenizer(build_prompt(questions[i], template))["input_ids"]
        return len(text) + TOKENS_PER_SECOND * min(audio_seconds(questions[i].audio), longest)

    order = sorted(range(len(questions)), key=length, reverse=True)  # questions of equal length stay in file order
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


# ---- held-out questions ----


def score_answers(questions: list[Question], answers: list[list[str]], template: str) -> tuple[float, float]:
    """Accuracy by MMAU's rule and share of well-formed completions, of one completion of each question."""
    pairs = [(question, completion) for question, (completion,) in zip(questions, answers)]
    correct = sum(is_right(question, prediction(completion)) for question, completion in pairs)
    format_ = sum(format_reward(completion, template) for _, completion in pairs)
    return correct / len(pairs), format_ / len(pairs)


def heldout_table(questions: list[Question], scores: dict[str, tuple[float, float]]) -> str:
    """Accuracy and format of named scores of score_answers, with what guessing would score, as aligned lines."""
    chance = guessing([question.choices for question in questions])
    lines = [f"{len(questions)} held-out questions, greedy   accuracy   format", f"  {'guessing':<30}  {chance:.3f}"]
    lines += [f"  {name:<30}  {accuracy:.3f}      {format_:.3f}" for name, (accuracy, format_) in scores.items()]
    return "\n".join(lines)


# ---- the journal ----


def read_journal(path: str, settings: dict, num_questions: int, samples: int) -> dict[int, list[str]]:
    """The answers in a journal, by the index of their question. Afterwards the file is ready to be added to.

    The first line holds `settings`, each further one an answer: `samples` completions of one of `num_questions`
    questions. A journal of other settings is set aside as path.old; a line that a kill has torn, or that is damaged
    in another way, is cut off with all that follows it; without a journal, one is started.
    """
    header = json.dumps(settings, sort_keys=True)
    try:
        *lines, _ = Path(path).read_bytes().split(b"\n")  # what follows the last line end is torn
    except FileNotFoundError:
        lines = []
    if lines and lines[0] != header.encode():
        print(f"{path} is of other settings: starting anew, it is now {set_aside(Path(path))}", file=sys.stderr)
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
    """Add answers to a journal that read_journal has prepared. Raises InputError."""
    with writing_answers(Path(path)), open(path, "a", encoding="utf-8") as file:
        for i, completions in answers.items():
            file.write(_line(i, completions) + "\n")


def _line(i: int, completions: list[str]) -> str:
    return json.dumps({"question": i, "completions": completions})


def _parse_line(line: bytes, num_questions: int, samples: int) -> dict[int, list[str]] | None:
    """The answer in a journal's line; None unless it is, to the byte, one that this evaluation writes."""
    try:
        record = json.loads(line.decode())
        i, completions = record["question"], record["completions"]
        known = type(i) is int and 0 <= i < num_questions
        whole = isinstance(completions, list) and len(completions) == samples
        whole = whole and all(isinstance(text, str) for text in completions)
        return {i: completions} if known and whole and _line(i, completions) == line.decode() else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
