"""Test whether a model listens: silence, another question's clip, choices in another order.

Changes the questions, formats the tables of these tests, and selects the questions that need their sound.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import Question, shuffle_choices
from evaluation.scores import (
    Score,
    align,
    deviation,
    discordant,
    guessing,
    is_right_exactly,
    mcnemar_exact,
    p_text,
    percent,
    score_cells,
    task_groups,
)
from infra.errors import InputError
from infra.files import write_text
from infra.processes import SharedInputError

SILENCE, OTHER_CLIP = "silence", "another question's audio"  # names of the ablations without the question's own sound
RIGHT_WITH_AUDIO = "right_with_audio"  # the field that write_needs_audio adds

# ---- changed questions ----


def variants(args: argparse.Namespace) -> dict[str, dict]:
    """Return the evaluations of each checkpoint: name -> how the questions are changed."""
    plain = {"silence": False, "shuffle_audio": False, "shuffle_choices": None}
    if args.ablations:
        return {
            "plain": plain,
            SILENCE: plain | {"silence": True},
            OTHER_CLIP: plain | {"shuffle_audio": True},
            "choices shuffled": plain | {"shuffle_choices": args.seed},
        }
    plain = {name: getattr(args, name) for name in plain}
    orders = range(2, (args.orders or 1) + 1)  # order 1 is the file's own
    seeds = {k: args.seed * 100_003 + k for k in orders}  # no two values of --seed share an order
    return {"plain": plain} | {f"order {k}": plain | {"shuffle_choices": seeds[k], "order": k} for k in orders}


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
        questions = [shuffle_choices(question, changes["shuffle_choices"], i) for i, question in enumerate(questions)]
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
    if "order" in changes:
        return f"{text}_order_{changes['order']}"
    return text + ("_shuffled_choices" if changes["shuffle_choices"] is not None else "")


def note(changes: dict) -> str:
    """Describe how the questions were changed."""
    text = "; the clips were silence" if changes["silence"] else ""
    text += "; the clips were those of other questions" if changes["shuffle_audio"] else ""
    return text + ("; the choices were in another order" if changes["shuffle_choices"] is not None else "")


# ---- tables ----


def listening(plain: list[bool], silent: list[bool], other: list[bool]) -> tuple[float, float, float]:
    """Return S = accuracy - (accuracy with silence + accuracy with another clip) / 2, and the ends of its interval.

    plain, silent, other: whether each question is right in each of the three evaluations. S is near 0 if the model
    answers from the text alone (arXiv 2509.21060 measures accuracy with silence), and at most 1. The interval is a 95%
    percentile bootstrap over questions with 10,000 resamples. A question adds -1, -0.5, 0, 0.5 or 1 to S. To resample
    the questions is therefore to draw the counts of these five values from a multinomial distribution.
    """
    gains = np.array(plain, float) - (np.array(silent, float) + np.array(other, float)) / 2
    values, counts = np.unique(gains, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(gains), counts / len(gains), size=10_000)
    low, high = np.quantile(drawn @ values / len(gains), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def ablation_table(questions: list[Question], correct_by_name: dict[str, list[bool]]) -> str:
    """Format the accuracy of the ablations, in total and by task, each compared with the plain evaluation.

    correct_by_name: for each of `variants`, whether each question is right. Differences and S (see listening) are in
    percentage points. p is from McNemar's exact test.
    """
    plain = correct_by_name["plain"]
    rows: list[tuple[str, ...]] = [("", "accuracy", "95% interval", "right", "difference", "p")]
    for group, indices in task_groups(questions).items():
        rows.append((group,))
        for name, correct in correct_by_name.items():
            score = Score(sum(correct[i] for i in indices), len(indices))
            cells = ["", ""]
            if correct is not plain:
                only_plain, only_this = discordant([plain[i] for i in indices], [correct[i] for i in indices])
                difference = (only_this - only_plain) / len(indices) * 100
                cells = [f"{difference:+.2f}", p_text(mcnemar_exact(only_plain, only_this))]
            rows.append((f"  {name}", *score_cells(score), *cells))
        rows.append(("  guessing", percent(guessing([questions[i] for i in indices]), 1)))
        own = [[correct_by_name[name][i] for i in indices] for name in ("plain", SILENCE, OTHER_CLIP)]
        share, low, high = listening(*own)
        rows.append(("  S (listening)", f"{100 * share:+.2f}", f"[{100 * low:+.2f}, {100 * high:+.2f}]"))
    return align(rows, right=(1, 2, 3, 4, 5))


def orders_table(questions: list[Question], correct: list[list[bool]], same: list[bool]) -> str:
    """Format accuracy over several orders of the choices, in total and by task (arXiv 2510.04584).

    correct: for each order, whether each question is right. same: whether a question's answer is the same in all
    orders. The deviation of the K accuracies divides by K - 1.
    """
    columns = [(f"{len(correct)} orders of the choices", "mean accuracy", "deviation", "same answer in all orders")]
    for group, indices in task_groups(questions).items():
        shares = [sum(own[i] for i in indices) / len(indices) for own in correct]
        kept = sum(same[i] for i in indices)
        cells = percent(sum(shares), len(shares)), percent(deviation(shares), 1), percent(kept, len(indices))
        columns.append((f"{group} ({len(indices)})", *cells))
    return align(list(zip(*columns)), right=range(1, len(columns)))


# ---- questions that need their sound ----


def check_needs_audio(records: list[dict], questions: list[Question]) -> None:
    """Raise InputError if write_needs_audio would overwrite a field of the user's own records."""
    for record, question in zip(records, questions, strict=True):
        if record.get(RIGHT_WITH_AUDIO) not in (None, True, False):  # an earlier write_needs_audio wrote a boolean
            fault = f"has the field {RIGHT_WITH_AUDIO!r}, which --write_needs_audio uses"
            raise InputError(f"{question.place}: {fault}; rename the field")


def write_needs_audio(
    path: str, records: list[dict], questions: list[Question], predicted: dict[str, list[dict]], folder: str
) -> str:
    """Write the questions that are wrong both with silence and with another clip, as a question file for training.

    records: of the question file. predicted: name of the evaluation -> records of its predictions file. folder: where
    relative audio paths start. RIGHT_WITH_AUDIO tells whether the plain answer is right. Leaves out questions without
    an answer or without a usable clip. If MMAU's rule cannot tell the choices apart, exact comparison decides. Writes
    no file if there are no such questions. Returns how many there are, and the flags to train with.
    """

    def right(name: str, i: int) -> bool:
        return is_right_exactly(questions[i], predicted[name][i]["model_prediction"])

    asked = [i for i, q in enumerate(questions) if q.answer is not None and "error" not in predicted["plain"][i]]
    needing = [i for i in asked if not right(SILENCE, i) and not right(OTHER_CLIP, i)]
    counted = f"{len(needing)} of {len(asked)} questions are wrong with silence and with another clip"
    if not needing:
        return f"{counted}: nothing to write to {path}"
    lines = []
    for i in needing:
        record = records[i] | {RIGHT_WITH_AUDIO: right("plain", i)}
        if questions[i].also:  # the rows with the other answers may be left out
            record["answer"] = [questions[i].answer, *questions[i].also]
        lines.append(json.dumps(record) + "\n")
    write_text(Path(path), "".join(lines))
    return (
        f"{path}: {counted}; {sum(right('plain', i) for i in needing)} of these are right with their own\n"
        f"train with --data {shlex.quote(path)} --audio_dir {shlex.quote(folder or '.')}"
    )
