"""Change the questions to test whether a model listens: silence, another question's clip, choices in another order."""

import argparse
import dataclasses

import numpy as np
import torch.distributed as dist

from data import Question
from infra.processes import SharedInputError


def variants(args: argparse.Namespace) -> dict[str, dict]:
    """Return the evaluations of each checkpoint: name -> how the questions are changed."""
    plain = {"silence": False, "shuffle_audio": False, "shuffle_choices": None}
    if args.ablations:
        return {
            "plain": plain,
            "silence": plain | {"silence": True},
            "another question's audio": plain | {"shuffle_audio": True},
            "choices shuffled": plain | {"shuffle_choices": args.seed},
        }
    return {"plain": {name: getattr(args, name) for name in plain}}


def change(questions: list[Question], changes: dict, seed: int) -> list[Question]:
    """Exchange clips and reorder choices, as `changes` asks for. Silence is not made here: encode_prompts does that."""
    if changes["shuffle_audio"]:
        exchanged = exchange_clips(questions, seed)
        kept = sum(a.audio == b.audio for a, b in zip(questions, exchanged))
        if kept == len(questions):
            raise SharedInputError("--shuffle_audio and --ablations need questions about more than one clip")
        if kept and dist.get_rank() == 0:
            print(f"{kept} of {len(questions)} questions keep their clip, since more than half share one clip")
        questions = exchanged
    if changes["shuffle_choices"] is not None:
        orders = [np.random.default_rng([changes["shuffle_choices"], i]) for i in range(len(questions))]
        questions = [
            dataclasses.replace(q, choices=[q.choices[j] for j in order.permutation(len(q.choices))])
            for q, order in zip(questions, orders)
        ]
    return questions


def exchange_clips(questions: list[Question], seed: int) -> list[Question]:
    """Give each question the clip of another one. Questions keep their clip only if more than half share one clip.

    Questions are put in a random order in which questions with the same clip are neighbours. Then each takes the clip
    of the question n places further on, where n is the number of questions with the most common clip.
    """
    by_clip = {}
    for i in np.random.default_rng(seed).permutation(len(questions)):
        by_clip.setdefault(questions[i].audio, []).append(i)
    order = [i for group in by_clip.values() for i in group]
    step = max(map(len, by_clip.values()), default=0)
    exchanged = list(questions)
    for place, i in enumerate(order):
        giver = questions[order[(place + step) % len(order)]]
        exchanged[i] = dataclasses.replace(questions[i], audio=giver.audio)
    return exchanged


def suffix(changes: dict) -> str:
    """Return the end of a predictions file's name that tells how the questions were changed."""
    text = "_silence" if changes["silence"] else ""
    text += "_shuffled_audio" if changes["shuffle_audio"] else ""
    return text + ("_shuffled_choices" if changes["shuffle_choices"] is not None else "")


def note(changes: dict) -> str:
    """Describe how the questions were changed."""
    text = "; the clips were silence" if changes["silence"] else ""
    text += "; the clips were those of other questions" if changes["shuffle_audio"] else ""
    return text + ("; the choices were in another order" if changes["shuffle_choices"] is not None else "")
