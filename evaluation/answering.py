"""Answer many questions: in batches of similar length, shared over the ranks, written to a journal batch by batch.

The batches depend only on the questions and the batch size, and each batch has its own random generator. So neither
the number of ranks nor an interruption changes an answer. This holds with sampling and in bfloat16 too, where an answer
may depend on the other questions of its batch.
"""

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Question, build_prompt
from evaluation.predictions import append_journal, read_journal
from infra.audio import audio_seconds
from infra.errors import SHOWN
from infra.processes import exit_if_abandoned, gather, on_rank_0
from model.decoding import GroupDecoder
from model.qwen2_audio import TOKENS_PER_SECOND
from policy import decode_text, encode_ahead, sample_group, stop_token_ids, to_device
from reward import prediction


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
    """Return the whole texts of `samples` completions of each question, in the order of `questions`, on every rank.

    Temperature 0 takes the most likely token each time. Each batch holds batch_size prompts. `journal` is a file and
    the settings that answers depend on: answers in the file are reused, new ones are added (see read_journal). Raises
    InputError if a clip cannot be read.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = similar_lengths(processor, questions, template, batch_size)
    answers = {}
    if journal:
        answers = on_rank_0(lambda: read_journal(*journal, len(questions), samples))
    # If one answer of a batch is missing, the whole batch is computed again: then it is as without an interruption.
    todo = [number for number, batch in enumerate(batches) if not all(i in answers for i in batch)]
    mine = ([questions[i] for i in batches[number]] for number in todo[rank::ranks])
    prompts = encode_ahead(processor, mine, template, silence)
    stop_ids = stop_token_ids(model, processor)
    decoder = GroupDecoder(model, samples, max_new_tokens, cuda_graph, prompts=len(batches[0]) if batches else 0)

    missing = sum(len(batches[number]) for number in todo)
    progress = tqdm(
        total=len(questions), initial=len(questions) - missing, desc="answering", unit="question", disable=rank != 0
    )
    for first in range(0, len(todo), ranks):  # one batch for each rank; in the last round, some ranks may have none
        added = {}
        if first + rank < len(todo):
            number = todo[first + rank]
            _, prompt = next(prompts)
            generator = torch.Generator(model.device).manual_seed(seed * 1_000_003 + number)
            prompt = to_device(prompt, model.device)
            completions, mask, _ = sample_group(
                model, prompt, samples, max_new_tokens, temperature, stop_ids, generator, decoder
            )
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
    """Group the questions' indices into batches whose prompts have similar lengths in tokens, text and audio.

    The longest come first, so that too little memory shows at once. Reads the clips' headers. Raises InputError if a
    header cannot be read.
    """
    longest = processor.feature_extractor.chunk_length  # seconds that the model hears of a clip

    def length(i):
        text = processor.tokenizer(build_prompt(questions[i], template))["input_ids"]
        return len(text) + TOKENS_PER_SECOND * min(audio_seconds(questions[i].audio), longest)

    order = sorted(range(len(questions)), key=length, reverse=True)  # questions of equal length stay in file order
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_batching(model, processor, questions: list[Question], batch_size: int, **options) -> str:
    """Answer questions in batches and one by one, and say how many predictions differ. All ranks call this.

    options: other keywords of answer_questions.
    """
    batched, single = (
        [text for (text,) in answer_questions(model, processor, questions, batch_size=size, **options)]
        for size in (batch_size, 1)
    )
    differing = [
        q.id for q, a, b in zip(questions, batched, single) if prediction(a, q.choices) != prediction(b, q.choices)
    ]
    completions = sum(a != b for a, b in zip(batched, single))
    text = (
        f"{len(questions)} questions in batches of {batch_size} and one by one, {str(model.dtype)[6:]} on "
        f"{model.device.type}: {len(differing)} predictions differ, {completions} whole completions"
    )
    if differing:
        text += f"\ndifferent predictions: {', '.join(differing[:SHOWN])}{', ...' if len(differing) > SHOWN else ''}"
    return text
