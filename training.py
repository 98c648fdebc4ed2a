"""The run around a training algorithm, the same for grpo_aqa.py and sft_aqa.py: settings, start, steps, metrics, saves.

A script's `train` reads: load_policy_to_train, start, and for each of steps_to_take its own gradient, then update,
record_step and save_if_due; finish at the end.
"""

import argparse
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import toy
from answering import answer_questions, heldout_table, score_answers
from checkpoint import find_state, load_state, note_bad_clips, open_run, save_run
from data import TEMPLATES, Question, digest, step_indices
from errors import SHOWN, InputError
from files import check_folder, what_is_saved
from flags import Parser
from lora import add_lora
from metrics import append_jsonl
from optimizer import ShardedAdamW
from policy import (
    DTYPES,
    BadClip,
    Prompt,
    encode_ahead,
    freeze_audio_tower,
    listen,
    pick_dtype,
    to_device,
)
from preflight import CACHE, Checked, check_context, check_model, load_checked
from runtime import (
    Clock,
    SharedInputError,
    catch_sigterm,
    data_parallel,
    exit_if_abandoned,
    finish_together,
    gather,
    launchers,
    load_on_all_ranks,
    mean_over_ranks,
    memory_errors,
    on_rank_0,
    peak_memory_gb,
    require_gpu_each,
    setup_distributed,
)

# ---- settings ----

# Without --model: made where they are missing, and shared by the scripts.
TOY_MODEL, TOY_DATA, TOY_HELDOUT = map(str, toy.paths(toy.FOLDER))
TOY_PROMPTS = 16  # of a step, shared by the ranks, so that the toy learns alike on 1, 2 and 8 processes
MODEL_NAME = "<model's name>"  # in a default of --out
LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # the language model's; three, the tower's too
LORA_LR = 10  # times the learning rate of full fine-tuning is about LoRA's best one (thinkingmachines.ai/blog/lora)


def add_setting(parser: argparse._ActionsContainer, name: str, default, help: str, **kwargs) -> None:
    """Add --name to the command line, of its default's type; the help line shows the default."""
    kind, shown = (str, "") if default is None else (type(default), " [%(default)s]")
    parser.add_argument(f"--{name}", default=default, type=kind, help=help + shown, **kwargs)


def shared_settings(description: str, defaults: dict, toy_defaults: dict) -> argparse.ArgumentParser:
    """The command line that the scripts share. `defaults` are those in which they differ, `toy_defaults` those that
    take their place without --model. Others can be added."""
    parser = Parser(
        usage="%(prog)s [--model NAME --data FILE] [settings]",
        description=f"{description} Without --model: the toy, which needs no GPU. Its defaults: "
        f"{' '.join(f'--{name} {value}' for name, value in toy_defaults.items())}, "
        f"and --prompts_per_rank {TOY_PROMPTS} / processes.",
    )

    def add(name, default, help, **kwargs):
        add_setting(parser, name, default, help, **kwargs)

    add("model", None, "Hugging Face name or folder of a Qwen2-Audio model")
    add("data", None, "training questions: an R1-AQA, AVQA, MMAU or plain file")
    add("audio_dir", None, "folder that relative audio paths start from [the question file's]")
    add("heldout", None, "questions to score greedily before and after; audio paths start from their file's folder")
    add("out", None, f"run folder [{defaults['out']}]")
    add("steps", 1000, "batches of questions to train on")
    add("prompts_per_rank", 2, "questions per process and step")
    add("accumulation_steps", 2, "forward and backward passes that these are split into")
    add("template", "answer", "prompt template, and with it the form of an answer", choices=TEMPLATES)
    add("max_new_tokens", 256, "longest completion, in tokens")
    lr = f"[{defaults['lr']:g}; with LoRA {LORA_LR * defaults['lr']:g}]"
    parser.add_argument("--lr", type=float, help=f"learning rate of AdamW at the start; it decays linearly to 0 {lr}")
    add("max_grad_norm", 1.0, "gradients are scaled down to this global norm")
    add("seed", 0, "of the order of questions and of all that is drawn")
    add("dtype", "auto", "of the weights; auto is bfloat16 on a GPU, else float32", choices=("auto", *DTYPES))
    add("gradient_checkpointing", "auto", "recompute layers; auto: on a GPU", choices=("auto", "on", "off"))
    add("cuda_graph", "on", "decode by CUDA graphs, on a GPU", choices=("on", "off"))
    add("save_every", 100, "steps from one checkpoint and resume state to the next")
    add("keep_last", 0, "newest checkpoints to keep; 0 keeps all")
    add("lora_rank", 0, "train low-rank adapters of this rank (LoRA); 0 trains all weights")
    add("lora_alpha", 32.0, "an adapter's product is scaled by this over its rank")
    add("lora_dropout", 0.0, "share of an adapter's inputs dropped in training")
    add("lora_targets", LORA_TARGETS, "linear layers that get adapters, by name")
    parser.add_argument("--freeze_audio_tower", action="store_true", help="leave the audio tower as it is")
    skip = "go on without questions whose clip is missing or broken, instead of stopping"
    parser.add_argument("--skip_bad_audio", action="store_true", help=skip)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest state")
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, defaults: dict, toy_defaults: dict
) -> argparse.Namespace:
    """Parse and check what shared_settings asks for; the dictionaries are the same as there."""
    args = parser.parse_args(argv)
    if args.model is None:
        for name in ("data", "audio_dir", "heldout"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model (`python toy.py --questions FILE --out DIR` makes a tiny one)")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        parser.set_defaults(model=TOY_MODEL, data=TOY_DATA, heldout=TOY_HELDOUT, **toy_defaults | {"lr": None})
        parser.set_defaults(prompts_per_rank=max(1, TOY_PROMPTS // processes))
        args, defaults = parser.parse_args(argv), toy_defaults
    elif args.data is None:
        parser.error("--model needs --data, a file of training questions")
    if args.out is None:
        args.out = defaults["out"].replace(MODEL_NAME, Path(args.model).name)
    if args.lr is None:
        args.lr = defaults["lr"] * (LORA_LR if args.lora_rank else 1)

    for name in () if args.lora_rank else ("lora_alpha", "lora_dropout", "lora_targets"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --lora_rank")
    if args.prompts_per_rank % args.accumulation_steps:
        parser.error("--prompts_per_rank must be a multiple of --accumulation_steps")
    return args


# ---- start ----


@dataclass
class Run:
    """What rank 0 finds out before any weights are loaded."""

    config: dict
    questions: list[Question]  # those with a usable clip
    heldout: list[Question]
    state: Path | None  # the folder to resume from


@dataclass
class Learner:
    """What a rank holds from step to step."""

    policy: Any  # a Qwen2-Audio model
    processor: object
    ddp_policy: DistributedDataParallel  # policy.completion_logprobs, with gradients averaged over the ranks
    optimizer: ShardedAdamW
    generator: torch.Generator  # of what this rank draws
    progress: dict  # step; position: questions used by all ranks; before: the base's held-out scores
    preempted: threading.Event  # set by SIGTERM
    batch: list[Question] = field(default_factory=list)  # this rank's questions of the step
    bad_clips: dict[str, str] = field(default_factory=dict)  # found by this rank: by question's place, what is wrong
    replaced: list[str] = field(default_factory=list)  # places of questions of the step with a bad clip


def run_training(args: argparse.Namespace, script: str, method: str, train) -> int:
    """Join the other processes and call `train(args, run, device)`. Returns the exit status."""
    device = setup_distributed()[-1]
    started_by = launchers()

    def work():
        if args.model != TOY_MODEL:
            require_gpu_each()
        run = on_rank_0(lambda: prepare(args, method, started_by))
        with memory_errors("the start"):  # what comes later has a phase of its own
            train(args, run, device)

    return finish_together(script, work, interrupted=lambda: what_is_saved(Path(args.out)))


def prepare(args: argparse.Namespace, method: str, started_by: list[str]) -> Run:
    """Make the toy or check the user's inputs, and look for a state to resume from. Raises InputError."""
    if args.model == TOY_MODEL:
        toy.make_toy(Path(TOY_MODEL).parent)
    check_folder(Path(args.out))
    check_model(args.model)
    training = load_checked(args.data, args.audio_dir, args.skip_bad_audio, Path(args.out, CACHE))
    heldout = Checked([], {})
    if args.heldout:  # few enough to be decoded at once
        heldout = load_checked(args.heldout, None, args.skip_bad_audio, decode=True)
    check_context(args.model, training.questions + heldout.questions, args.template, args.max_new_tokens)
    config = vars(args) | {
        "method": method,
        "heldout": args.heldout and os.path.abspath(args.heldout),  # eval_mmau.py finds it from anywhere
        "questions_digest": digest(training.questions),
        "skipped_questions": len(training.skipped),
        "skipped_heldout": len(heldout.skipped),
        "bad_clips_met": {},  # those that turned out bad when they were decoded, and why
        "world_size": dist.get_world_size(),
        "launchers": started_by,
    }
    return Run(config, training.questions, heldout.questions, find_state(Path(args.out), config, args.resume))


def load_policy_to_train(args: argparse.Namespace, device: torch.device):
    """The starting checkpoint, of which what is to be trained requires gradients. Returns (model, processor)."""
    policy, processor = load_on_all_ranks(args.model, pick_dtype(args.dtype, device), device)
    if args.freeze_audio_tower:
        freeze_audio_tower(policy)
    if args.lora_rank:
        targets = [name.strip() for name in args.lora_targets.split(",") if name.strip()]
        how = args.lora_rank, args.lora_alpha, args.lora_dropout, targets
        try:
            add_lora(policy, args.model, *how, args.freeze_audio_tower, args.seed)
        except InputError as error:
            raise SharedInputError(str(error)) from None
    return policy, processor


def recomputes_layers(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the backward pass computes layers a second time, to save memory."""
    return {"on": True, "off": False, "auto": device.type == "cuda"}[args.gradient_checkpointing]


def start(args: argparse.Namespace, run: Run, policy, processor, device: torch.device) -> Learner:
    """Begin a run with the loaded policy, or continue the one in args.out."""
    _, any_prompt = next(encode_batches(args, processor, run.questions, iter([run.questions[:1]]), bad_clips={}))
    ddp_policy = data_parallel(policy, to_device(any_prompt, device), recomputes_layers(args, device))
    optimizer = ShardedAdamW({name: p for name, p in policy.named_parameters() if p.requires_grad})
    seed = args.seed * 100_003 + dist.get_rank()  # each rank draws its own
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    open_run(Path(args.out), run.config, run.state, policy)
    if run.state:
        progress = load_state(run.state, optimizer, generator)
    else:
        progress = {"step": 0, "position": 0, "before": score_heldout(args, run, policy, processor)}
    return Learner(policy, processor, ddp_policy, optimizer, generator, progress, catch_sigterm())


def score_heldout(args: argparse.Namespace, run: Run, policy, processor) -> tuple[float, float] | None:
    """Greedy accuracy and format on the held-out questions, if there are any, shared over the ranks."""
    if not run.heldout:
        return None
    batch_size = 4 * args.prompts_per_rank  # with one completion each, not a step's group
    settings = args.template, args.max_new_tokens, batch_size
    with memory_errors("the held-out questions"):
        answers = answer_questions(policy, processor, run.heldout, *settings, cuda_graph=args.cuda_graph == "on")
    return score_answers(run.heldout, answers, args.template)


# ---- a step ----


def steps_to_take(
    args: argparse.Namespace, run: Run, learner: Learner, device: torch.device
) -> Iterator[tuple[int, float, list[Question], Prompt, Clock]]:
    """For each step that is left: its number, learning rate, this rank's questions, their prompt, and a clock.

    Prompts are prepared ahead, in a thread.
    """
    rank, progress = dist.get_rank(), learner.progress
    steps = range(progress["step"] + 1, args.steps + 1)
    batch_size = args.prompts_per_rank * dist.get_world_size()
    positions = range(progress["position"], progress["position"] + len(steps) * batch_size, batch_size)

    def share(position):
        indices = step_indices(len(run.questions), position, args.prompts_per_rank, rank, args.seed)
        return [run.questions[i] for i in indices]

    batches = encode_batches(args, learner.processor, run.questions, map(share, positions), learner.bad_clips)
    for step, position in zip(steps, positions):
        clock = Clock(device)
        with clock("data"):
            try:
                batch, prompt = next(batches)
            except BadClip as error:
                remedy = "or go on without such clips, with --resume --skip_bad_audio"
                raise InputError(f"step {step}: {error}, {remedy}; {what_is_saved(Path(args.out))}") from None
            prompt = to_device(prompt, device)
        learner.batch = batch
        if args.skip_bad_audio:
            learner.replaced = [old.place for old, new in zip(share(position), batch) if old is not new]
        if args.freeze_audio_tower:
            with clock("listen"):
                prompt = listen(learner.policy, prompt)  # once for all that is computed from it
        yield step, args.lr * (1 - (step - 1) / args.steps), batch, prompt, clock  # linear decay to 0


def encode_batches(
    args: argparse.Namespace,
    processor,
    questions: list[Question],
    batches: Iterator[list[Question]],
    bad_clips: dict[str, str],
) -> Iterator[tuple[list[Question], Prompt]]:
    """encode_ahead of batches of the questions; with --skip_bad_audio, replace_bad takes bad clips out of them."""
    replace = partial(replace_bad, questions, bad_clips) if args.skip_bad_audio else None
    return encode_ahead(processor, batches, args.template, replace=replace)


def replace_bad(
    questions: list[Question], bad_clips: dict[str, str], batch: list[Question], error: BadClip
) -> list[Question]:
    """The batch with another question for the one whose clip is bad: the next in the file that is not known to be.

    Adds to bad_clips. Which question that is in the end follows from the file and its clips alone, so that a resumed
    run trains on the same ones. Raises InputError if no good clip is left.
    """
    bad_clips[error.question.place] = error.fault
    start = next(i for i, question in enumerate(questions) if question is error.question)
    for other in questions[start + 1 :] + questions[:start]:
        if other.place not in bad_clips:
            return [other if question is error.question else question for question in batch]
    raise InputError(f"no question has a usable clip; {error}")


def progress_bar(args: argparse.Namespace, learner: Learner, method: str) -> tqdm:
    """A bar over the run's steps, on rank 0."""
    done = learner.progress["step"]
    return tqdm(desc=method, unit="step", initial=done, total=args.steps, disable=dist.get_rank() != 0)


def update(args: argparse.Namespace, learner: Learner, step: int, lr: float, loss: float) -> float:
    """One step of the optimizer along the gradient that is there. Returns the gradient's norm before clipping.

    Raises SharedInputError, with the weights as before, if the norm or any rank's loss is not finite.
    """
    learns = mean_over_ranks({"finite": float(math.isfinite(loss))}, learner.policy.device)["finite"] == 1
    try:
        if learns:
            return learner.optimizer.step(lr, args.max_grad_norm)
        fault = "the loss is not finite"
    except FloatingPointError as error:
        fault = str(error)
    suspects = learner.batch if learns or not math.isfinite(loss) else []
    ids = [name for part in gather([question.id for question in suspects]) for name in part]
    listed = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")
    raise SharedInputError(
        f"step {step}: {fault}, with the questions {listed}; the weights are as before it and nothing was saved; "
        f"{what_is_saved(Path(args.out))}; look at these questions, or lower --lr"
    )


def record_step(
    args: argparse.Namespace, learner: Learner, step: int, lr: float, metrics: dict, clock: Clock
) -> tuple[dict, bool]:
    """Add a step's metrics, their means over the ranks, to metrics.jsonl. Those that are None stay None.

    Returns them, and whether all ranks are to stop after this step, because one of them had a SIGTERM.
    """
    values = {name: value for name, value in metrics.items() if value is not None}
    values |= {"seconds": clock.total()} | {f"seconds_{phase}": spent for phase, spent in clock.phases.items()}
    values |= {"peak_memory_gb": peak_memory_gb(clock.device), "preempted": float(learner.preempted.is_set())}
    values |= {"replaced_questions": float(len(learner.replaced))} if args.skip_bad_audio else {}
    means = mean_over_ranks(values, clock.device)
    exit_if_abandoned()
    stopping = means.pop("preempted") > 0
    record = {"step": step, "lr": lr} | metrics | means
    if args.skip_bad_audio:
        record["replaced_questions"] = round(means["replaced_questions"] * dist.get_world_size())  # of all ranks
        if record["replaced_questions"]:
            met = gather({place: learner.bad_clips[place] for place in learner.replaced})
            on_rank_0(lambda: note_bad_clips(Path(args.out), step, {k: v for part in met for k, v in part.items()}))
    if dist.get_rank() == 0:
        append_jsonl(Path(args.out) / "metrics.jsonl", record)
    return record, stopping


def save_if_due(args: argparse.Namespace, learner: Learner, step: int, stopping: bool) -> None:
    """Count the step as done; save a checkpoint and the resume state if it is time, only the state if stopping."""
    batch_size = args.prompts_per_rank * dist.get_world_size()
    learner.progress |= {"step": step, "position": learner.progress["position"] + batch_size}
    due = step % args.save_every == 0 or step == args.steps
    if due or stopping:
        what = learner.policy, learner.processor, learner.optimizer, learner.generator
        save_run(Path(args.out), learner.progress, *what, due, args.keep_last, args.template)


def finish(args: argparse.Namespace, run: Run, learner: Learner, method: str) -> None:
    """Score the held-out questions again and print where everything is; or say that the run is not over."""
    if learner.progress["step"] < args.steps:
        if dist.get_rank() == 0:
            step = learner.progress["step"]
            print(f"\nSIGTERM: stopped after step {step}; --resume continues from there", flush=True)
        return
    after = score_heldout(args, run, learner.policy, learner.processor)
    if dist.get_rank() == 0:
        print(f"\nmetrics, curves and checkpoints: {args.out}")
        if run.heldout:
            scores = {f"before {method}": learner.progress["before"], f"after {method}": after}
            print(f"\n{heldout_table(run.heldout, scores)}")
