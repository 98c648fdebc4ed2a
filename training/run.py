"""The run around a training loop: everything in a training script that is not the algorithm.

grpo_aqa.train and sft_aqa.train use one Run object:

    run.load_policy()           load the policy and its processor
    run.first_prompt()          encode one question, for the warm-up of DistributedDataParallel
    run.longest_prompt()        bound on the tokens of any prompt, for the decoder's memory
    run.start(...)              make the run folder, or restore the state to resume from
    run.steps()                 the steps that are left; ends early after SIGTERM
    run.next_batch()            this rank's next questions, encoded ahead by a thread
    run.clock("train")          measure a phase; name it if memory runs out
    run.require_finite(...)     stop before a loss or gradient that is not finite reaches the weights
    run.record(...)             metrics.jsonl and the progress bar
    run.log_completions(...)    completions.jsonl
    run.save_if_due()           checkpoint and resume state
    run.finish()                score the held-out questions again, print the run folder
"""

import argparse
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data import Question, build_prompt, digest, shuffle_choices
from evaluation.scores import best_step
from infra.errors import InputError, list_names
from infra.files import check_folder
from infra.ownership import OWNER
from infra.processes import (
    Clock,
    SharedInputError,
    catch_sigterm,
    exit_if_abandoned,
    finish_together,
    gather,
    launchers,
    mean_over_ranks,
    memory_errors,
    on_rank_0,
    owning_together,
    peak_memory_gb,
    require_gpu_each,
    setup_distributed,
)
from model.checkpoints import check_model, identify_model, load_on_all_ranks, pick_dtype
from model.lora import add_lora
from model.qwen2_audio import TOKENS_PER_SECOND, Prompt, freeze_audio_tower
from policy import BadClip, encode_ahead, listen, to_device
from training.groups import Groups
from training.heldout import heldout_table, score_heldout
from training.metrics import append_jsonl, log_completions
from training.optimizer import ShardedAdamW
from training.preflight import CACHE, MARKUP_TOKENS, Checked, check_texts, heard_seconds, load_checked, long_clips_note
from training.run_folder import (
    check_model_stays,
    find_state,
    load_state,
    note_bad_clips,
    open_run,
    save_run,
    what_is_saved,
    writing_run,
)
from training.settings import TOY_MODEL
from training.tensorboard import TensorBoard, require_tensorboard
from training.toy_model import make_toy


def run_training(args: argparse.Namespace, script: str, method: str, train) -> int:
    """Join the other ranks, check the inputs and call train(args, run). Return the exit status."""
    device = setup_distributed()[-1]

    def work():
        if args.model != TOY_MODEL:
            require_gpu_each()
        on_rank_0(lambda: check_folder(Path(args.out)))
        with owning_together([Path(args.out, OWNER)]):
            run = Run(args, method, device)
            with memory_errors("the start"):  # later phases have names of their own
                train(args, run)

    return finish_together(script, work, interrupted=lambda: what_is_saved(Path(args.out)))


class Run:
    """One training run on one rank. All ranks call each method together."""

    def __init__(self, args: argparse.Namespace, method: str, device: torch.device, strict: bool = True):
        """Check the inputs before any weights are loaded. Raises SharedInputError.

        method: "GRPO" or "SFT". strict: refuse right answers that cannot be rewarded, instead of listing them.
        """
        self.args, self.method, self.device = args, method, device
        self.out = Path(args.out)
        self.batch_size = args.prompts_per_rank * dist.get_world_size()  # questions of a batch, all ranks
        started_by = launchers()
        checked = on_rank_0(lambda: check_inputs(args, method, started_by, strict))
        self.config, self.questions, self.heldout, self.state, self.longest_clip = checked  # the last one in seconds
        self.bad_clips: dict[str, str] = {}  # found by this rank in training: what is wrong, by Question.place
        # step; position: questions used by all ranks, also in the current step; before: held-out scores before step 1
        self.progress: dict = {}
        self.replaced: list[str] = []  # places of the step's questions that had a bad clip
        self.stopping = False  # after a SIGTERM
        self.after: tuple[float, float] | None = None  # held-out scores of the newest step that has some

    # ---- start ----

    def load_policy(self) -> tuple[Any, Any]:
        """Load the policy, add LoRA or freeze the audio tower as the settings say. Return (policy, processor)."""
        args = self.args
        policy, processor = load_on_all_ranks(args.model, pick_dtype(args.dtype, self.device), self.device)
        if args.freeze_audio_tower:
            freeze_audio_tower(policy)
        if args.lora_rank:
            try:
                add_lora(
                    policy,
                    args.model,
                    rank=args.lora_rank,
                    alpha=args.lora_alpha,
                    dropout=args.lora_dropout,
                    targets=[name.strip() for name in args.lora_targets.split(",") if name.strip()],
                    freeze_audio_tower=args.freeze_audio_tower,
                    seed=args.seed,
                )
            except InputError as error:
                raise SharedInputError(str(error)) from None
        self.policy, self.processor = policy, processor
        return policy, processor

    def longest_prompt(self) -> int:
        """Bound the tokens of any prompt: tokens of the longest text, of the longest clip and of the markup.

        MARKUP_TOKENS has about 20 tokens to spare. Another order of the choices needs a few of them: the punctuation
        around the first and the last choice may become more tokens.
        """
        texts = [build_prompt(question, self.args.template) for question in self.questions]
        text_tokens = max(map(len, self.processor.tokenizer(texts)["input_ids"]))
        return text_tokens + MARKUP_TOKENS + math.ceil(TOKENS_PER_SECOND * self.longest_clip)

    def first_prompt(self) -> Prompt:
        """Encode one question, for the warm-up passes of data_parallel."""
        shares = iter([self.questions[:1]])
        _, prompt = next(encode_questions(self.processor, self.questions, shares, self.args, self.bad_clips))
        return to_device(prompt, self.device)

    def start(self, optimizer: ShardedAdamW, order: Callable[[int], list[int]], batches_per_step: int = 1) -> None:
        """Make the run folder and score the held-out questions, or restore the state to resume from.

        order(position) returns the indices of this rank's next questions. position: questions used so far by all ranks.
        batches_per_step: the most calls of next_batch in a step.
        """
        args, self.optimizer, self.order = self.args, optimizer, order
        seed = args.seed * 100_003 + dist.get_rank()  # each rank draws its own random numbers
        self.generator = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(seed)  # for dropout
        open_run(self.out, self.config, self.state, self.policy)
        if self.state:
            self.progress = load_state(self.state, optimizer, self.generator)
        else:
            self.progress = {"step": 0, "position": 0}
            self.progress["before"] = self._score_heldout(step=0) if self.heldout else None
        self.board = TensorBoard(args, self.config, self.progress["step"])
        self.preempted: threading.Event = catch_sigterm()
        done = self.progress["step"]
        self.bar = tqdm(desc=self.method, unit="step", initial=done, total=args.steps, disable=dist.get_rank() != 0)

        first = self.progress["position"]
        last = first + (args.steps - done) * batches_per_step * self.batch_size
        shares = map(self._share, range(first, last, self.batch_size))
        self.batches = encode_questions(self.processor, self.questions, shares, args, self.bad_clips)

    def _share(self, position: int) -> list[Question]:
        """Return this rank's questions of the batch at a position of the data order.

        With --vary_choice_order, --seed and a question's position in the data order decide the order of its choices.
        """
        questions = [self.questions[i] for i in self.order(position)]
        if not self.args.vary_choice_order:
            return questions
        first = position + dist.get_rank() * self.args.prompts_per_rank
        return [shuffle_choices(q, self.args.seed, CHOICES, first + n) for n, q in enumerate(questions)]

    def _score_heldout(self, step: int) -> tuple[float, float]:
        """Score greedy answers to the held-out questions after a step: (accuracy, format)."""
        right, format_ = score_heldout(self.heldout, self.policy, self.processor, self.args)
        self.progress.setdefault("heldout", {})[str(step)] = right  # JSON's keys are texts
        return sum(right) / len(right), format_

    # ---- a step ----

    def steps(self) -> Iterator[int]:
        """Yield the number of each step that is left, until SIGTERM announces the end of the job."""
        for step in range(self.progress["step"] + 1, self.args.steps + 1):
            if self.stopping:
                return
            self.step, self.clock, self.replaced = step, Clock(self.device), []
            yield step

    def next_batch(self) -> tuple[list[Question], Prompt]:
        """Return this rank's next questions, and their prompts on the device."""
        with self.clock("data"):
            try:
                batch, prompt = next(self.batches)
            except BadClip as error:
                remedy = "or go on without such clips, with --resume --skip_bad_audio"
                raise InputError(f"step {self.step}: {error}, {remedy}; {what_is_saved(self.out)}") from None
            prompt = to_device(prompt, self.device)
        if self.args.skip_bad_audio:
            planned = self._share(self.progress["position"])
            self.replaced += [old.place for old, new in zip(planned, batch) if old.place != new.place]
        self.progress["position"] += self.batch_size
        if self.args.freeze_audio_tower:
            with self.clock("listen"):
                prompt = listen(self.policy, prompt)  # once for sampling, reference and training
        return batch, prompt

    def require_finite(self, loss: float, grad_norm: float, batch: list[Question]) -> None:
        """Raise SharedInputError, with the weights unchanged, if a rank's loss or the gradient is not finite.

        batch: the questions of this rank's loss.
        """
        finite = mean_over_ranks({"loss": float(math.isfinite(loss))}, self.device)["loss"] == 1
        if finite and math.isfinite(grad_norm):
            return
        fault = f"the norm of the gradient is {grad_norm}" if finite else "the loss is not finite"
        suspects = batch if finite or not math.isfinite(loss) else []
        ids = [name for part in gather([question.id for question in suspects]) for name in part]
        raise SharedInputError(
            f"step {self.step}: {fault}, with the questions {list_names(ids)}; the weights are as before the step and "
            f"nothing was saved; {what_is_saved(self.out)}; look at these questions, or lower --lr"
        )

    def record(self, lr: float, metrics: dict, shown: list[str]) -> None:
        """Write the step's metrics to metrics.jsonl, averaged over the ranks, and some of them to the progress bar.

        A metric that is None stays None. Sets `stopping` on all ranks if a rank had a SIGTERM. Every --heldout_every
        steps and after the last one, adds the held-out scores; their time is not part of `seconds`.
        """
        values = {name: value for name, value in metrics.items() if value is not None}
        values |= {"seconds": self.clock.total()}
        values |= {f"seconds_{phase}": spent for phase, spent in self.clock.phases.items()}
        values |= {"peak_memory_gb": peak_memory_gb(self.device), "preempted": float(self.preempted.is_set())}
        values |= {"replaced_questions": float(len(self.replaced))} if self.args.skip_bad_audio else {}
        means = mean_over_ranks(values, self.device)
        exit_if_abandoned()
        self.stopping = means.pop("preempted") > 0
        record = {"step": self.step, "lr": lr} | metrics | means
        if self.args.skip_bad_audio:
            record["replaced_questions"] = round(means["replaced_questions"] * dist.get_world_size())  # of all ranks
            if record["replaced_questions"]:
                met = gather({place: self.bad_clips[place] for place in self.replaced})
                new = {place: fault for part in met for place, fault in part.items()}
                on_rank_0(lambda: note_bad_clips(self.out, self.step, new))
        every, started = self.args.heldout_every, time.perf_counter()
        if self.heldout and every and (self.step % every == 0 or self.step == self.args.steps):
            self.after = accuracy, format_ = self._score_heldout(self.step)
            record |= {"heldout_accuracy": accuracy, "heldout_format": format_, "heldout_questions": len(self.heldout)}
            record["seconds_heldout"] = time.perf_counter() - started
        if dist.get_rank() == 0:
            with writing_run(self.out / "metrics.jsonl", self.out):
                append_jsonl(self.out / "metrics.jsonl", record)
            self.board.log_metrics(record)
        self.bar.set_postfix({SHORT.get(name, name): _short(record[name]) for name in shown})
        self.bar.update()

    def log_completions(self, groups: Groups, advantages: Tensor) -> None:
        """Write rank 0's completions of the step to completions.jsonl, every --log_completions_every steps."""
        if self.step % self.args.log_completions_every == 0 and dist.get_rank() == 0:
            path = self.out / "completions.jsonl"
            with writing_run(path, self.out):
                records = log_completions(path, self.step, self.args.template, groups, advantages)
            self.board.log_completions(records)

    def save_if_due(self) -> None:
        """Count the step as done. Save a checkpoint and the resume state if due: both after the last step.

        After a SIGTERM, the state is due.
        """
        self.progress["step"] = self.step
        last = self.step == self.args.steps
        checkpoint = last or self.step % self.args.save_every == 0
        state = last or self.step % self.args.save_state_every == 0 or self.stopping
        if checkpoint or state:
            save_run(
                self.out,
                self.progress,
                self.policy,
                self.processor,
                self.optimizer,
                self.generator,
                checkpoint=checkpoint,
                state=state,
                keep_last=self.args.keep_last,
                template=self.args.template,
            )

    def finish(self) -> None:
        """Score the held-out questions again and print the run folder; after a SIGTERM, print how to continue."""
        self.bar.close()
        step = self.progress["step"]
        if step < self.args.steps:
            if dist.get_rank() == 0:
                print(f"\nSIGTERM: stopped after step {step}; --resume continues from there", flush=True)
            return
        if self.heldout:
            after = self.after or self._score_heldout(step)
        if dist.get_rank() == 0:
            print(f"\nmetrics, curves and checkpoints: {self.out}")
            if self.heldout:
                scores = {f"before {self.method}": self.progress["before"], f"after {self.method}": after}
                print(f"\n{heldout_table(self.heldout, scores)}")
                if self.args.heldout_every:
                    right = {int(name): own for name, own in self.progress["heldout"].items() if name != "0"}
                    print("\n".join(best_step(right)))


# ---- before and beside the steps ----

CHOICES = 2**32 - 1  # seeds the orders of choices; step_indices seeds an epoch by its number, which is smaller
SHORT = {"completion_tokens": "tokens", "seconds": "s/step"}  # names on the progress bar


def _short(value: float | None) -> str:
    return "off" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"


def check_inputs(
    args: argparse.Namespace, method: str, started_by: list[str], strict: bool = True
) -> tuple[dict, list[Question], list[Question], Path | None, float]:
    """Make the toy if it is asked for, and check all inputs before any weights are loaded. Raises InputError.

    Returns the run's config.json, the questions, the held-out questions, the state to resume from if there is one, and
    the most seconds that the model hears of a question's clip.
    """
    if args.tensorboard:
        require_tensorboard()
    if args.model == TOY_MODEL:
        make_toy(Path(TOY_MODEL).parent)
    check_model(args.model)
    check_model_stays(Path(args.out), args.model)
    training = load_checked(args.data, args.audio_dir, args.skip_bad_audio, Path(args.out, CACHE))
    heldout = Checked([], {}, {})
    if args.heldout:  # few enough to decode all of them
        heldout = load_checked(args.heldout, None, args.skip_bad_audio, decode=True)
    heard = heard_seconds(args.model)
    if note := long_clips_note((training.seconds | heldout.seconds).values(), heard):
        print(note, flush=True)
    check_texts(args.model, training.questions, args.template, args.max_new_tokens, strict)
    if heldout.questions:
        check_texts(args.model, heldout.questions, args.template, args.max_new_tokens, strict=False)
    config = vars(args) | {
        "method": method,
        "model_files": identify_model(args.model),
        "heldout": args.heldout and os.path.abspath(args.heldout),  # eval_mmau.py finds it from any folder
        "questions_digest": digest(training.questions),
        "skipped_questions": len(training.skipped),
        "skipped_heldout": len(heldout.skipped),
        "bad_clips_met": {},  # bad clips that were found in training: what is wrong, by question's place
        "world_size": dist.get_world_size(),
        "launchers": started_by,
    }
    state = find_state(Path(args.out), config, args.resume)
    return config, training.questions, heldout.questions, state, min(heard, max(training.seconds.values()))


def encode_questions(
    processor,
    questions: list[Question],
    batches: Iterator[list[Question]],
    args: argparse.Namespace,
    bad_clips: dict[str, str],
) -> Iterator[tuple[list[Question], Prompt]]:
    """Encode batches of the questions ahead. With --skip_bad_audio, replace questions whose clip is bad.

    Adds the bad clips to bad_clips: what is wrong, by Question.place.
    """
    replace = partial(replace_bad, questions, bad_clips) if args.skip_bad_audio else None
    return encode_ahead(processor, batches, args.template, replace=replace)


def replace_bad(
    questions: list[Question], bad_clips: dict[str, str], batch: list[Question], error: BadClip
) -> list[Question]:
    """Return the batch with another question in place of the one whose clip is bad: the next good one of the file.

    Adds the bad clip to bad_clips. Which question replaces it depends on the file and its clips alone, so a resumed run
    trains on the same questions. Raises InputError if no good clip is left.
    """
    bad_clips[error.question.place] = error.fault
    start = next(i for i, question in enumerate(questions) if question.place == error.question.place)
    for other in questions[start + 1 :] + questions[:start]:
        if other.place not in bad_clips:
            return [other if question is error.question else question for question in batch]
    raise InputError(f"no question has a usable clip; {error}")
