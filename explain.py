"""Explain one step of GRPO with all its numbers, as text and as a page; show the completions of a run.

    python explain.py                                          one step of the toy, as text
    python explain.py --html step.html                         also as a page: tokens in color, their numbers on hover
    python explain.py --model NAME --data FILE [settings]      a model of yours; the settings are those of grpo_aqa.py
    python explain.py --run runs/toy                           a page of the completions that a run has logged

Takes one training step on one question with the functions of grpo_aqa.py. Then it computes the loss a second time, one
token after the other, and compares: a difference raises. Nothing is written to the run folder but the cache of checked
clips. With --run, it loads no model and takes no step.
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import grpo_aqa
from data import AUDIO_TOKEN, Question, step_indices
from evaluation.completions_page import completions_html, is_group
from evaluation.explain_page import to_html, to_text
from evaluation.explain_story import Group, Step, Token, Update, completion_loss, tell
from grpo_aqa import (
    accumulate_gradients,
    group_advantages,
    loss_length,
    make_reference,
    make_rollouts,
    score_completions,
    total_reward,
)
from infra.errors import InputError
from infra.files import write_text
from infra.processes import SharedInputError, finish_together, setup_distributed
from model.lora import dropout_on
from policy import (
    completion_logprobs,
    data_parallel,
    decode_text,
    listen,
    sample_group,
    stop_token_ids,
    to_device,
)
from training.metrics import read_jsonl
from training.optimizer import ShardedAdamW, clip_scale, trainable
from training.run import Run, encode_questions

LOOK_THROUGH = 16  # questions, to find one whose completions have different rewards

# ---- the step ----


def choose_group(args, policy, processor, questions: list[Question], device) -> tuple[Group, int]:
    """Sample a group for each of training's first questions until the rewards of a group differ.

    Returns that group, or the first group if the rewards are equal in all of them, and the number of groups sampled.
    """
    seed = args.seed * 100_003  # that of rank 0 in training
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    stop_ids, first, bad_clips = stop_token_ids(policy, processor), None, dict[str, str]()
    count = min(LOOK_THROUGH, len(questions))
    for number, i in enumerate(step_indices(len(questions), 0, count, 0, args.seed), start=1):
        [question], prompt = next(encode_questions(processor, questions, iter([[questions[i]]]), args, bad_clips))
        if question is not questions[i]:
            print(f"{questions[i].place}: {bad_clips[questions[i].place]}; another question takes its place")
        prompt = to_device(prompt, device)
        if args.freeze_audio_tower:
            prompt = listen(policy, prompt)
        completions, mask, _ = sample_group(
            policy, prompt, args.group_size, args.max_new_tokens, args.temperature, stop_ids, generator
        )
        texts = decode_text(processor, completions, mask)
        scores = score_completions(texts, [question], args.template, list(args.reward_weights))
        rewards = total_reward(scores, args.reward_weights)
        group = Group(question, prompt, completions, mask, texts, scores, rewards)
        if (rewards != rewards[0, 0]).any():
            return group, number
        first = first or group
    assert first is not None, "there are no questions"
    return first, count


def take_step(args, policy, processor, questions: list[Question], device: torch.device) -> Step:
    """Take a training step on one question as grpo_aqa.train does, and keep everything that it computes.

    Changes the policy. Raises RuntimeError if the tokens' terms do not add up to the loss of the training loop.
    """
    reference = make_reference(policy, args.beta, args.lora_rank, args.freeze_audio_tower)
    group, looked_at = choose_group(args, policy, processor, questions, device)
    ddp_policy = data_parallel(policy, group.prompt, args.gradient_checkpointing)
    optimizer = ShardedAdamW(trainable(policy))

    advantages = group_advantages(group.rewards, args.normalize_std)[0]
    inputs = group.prompt, group.completions, group.mask
    [rollout] = make_rollouts(
        policy, reference, *inputs, advantages.to(device), parts=1, temperature=args.temperature,
        keep_old=args.updates_per_rollout > 1,
    )  # fmt: skip
    before = rollout.old_logprobs
    if before is None:
        with torch.no_grad():
            before, _ = completion_logprobs(policy, *inputs, args.temperature)
    length = loss_length(group.mask, args.loss_average, args.max_new_tokens)

    seen, updates = [], []  # seen: the log-probs of the training loop's own forward pass, with its dropout
    hook = ddp_policy.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].detach()))
    words = [[_word(processor, i) for i in row[valid]] for row, valid in zip(group.completions, group.mask)]
    for number in range(1, args.updates_per_rollout + 1):
        with dropout_on(policy):
            stats = accumulate_gradients(
                ddp_policy, [rollout], temperature=args.temperature, clip_low=args.clip_low, clip_high=args.clip_high,
                beta=args.beta, length=length, ratio=args.ratio,
            )  # fmt: skip
        old = seen[-1] if rollout.old_logprobs is None else rollout.old_logprobs
        tokens = take_apart(args, words, seen[-1], old, rollout.ref_logprobs, advantages, length)
        check_sums(tokens, stats, length)
        grad_norm = optimizer.grad_norm()
        try:
            optimizer.step(args.lr, clip_scale(grad_norm, args.max_grad_norm))
        except FloatingPointError as error:
            raise InputError(f"{error}; there is no step to explain") from None
        updates.append(Update(number, tokens, stats, grad_norm))
    hook.remove()
    with torch.no_grad():
        after, _ = completion_logprobs(policy, *inputs, args.temperature)

    text = processor.tokenizer.decode(group.prompt["input_ids"][0])
    text = re.sub(f"(?:{re.escape(AUDIO_TOKEN)})+", lambda run: f"{AUDIO_TOKEN} x {run[0].count(AUDIO_TOKEN)}", text)
    sums = before.sum(dim=1).tolist(), after.sum(dim=1).tolist()
    audio_tokens = int((group.prompt["input_ids"] == policy.config.audio_token_id).sum())
    return Step(group, looked_at, text, audio_tokens, advantages.tolist(), length, updates, *sums)


def _word(processor, token_id: Tensor) -> str:
    return processor.tokenizer.decode([int(token_id)], clean_up_tokenization_spaces=False)


def take_apart(
    args,
    words: list[list[str]],
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    length: float | None,
) -> list[list[Token]]:
    """Compute grpo_loss token by token, from the formulas of its docstring.

    words: texts of each completion's tokens; logprobs, old_logprobs, ref_logprobs: [G, T]; advantages: [G].
    """
    completions = []
    for i, (texts, advantage) in enumerate(zip(words, advantages.tolist())):
        size = len(texts)
        policy, policy_old = logprobs[i, :size].tolist(), old_logprobs[i, :size].tolist()
        reference = [None] * size if ref_logprobs is None else ref_logprobs[i, :size].tolist()
        log_ratios = [new - old for new, old in zip(policy, policy_old)]
        if args.ratio == "sequence":
            log_ratios = [sum(log_ratios) / size] * size
        tokens = []
        for text, new, old, ref, log_ratio in zip(texts, policy, policy_old, reference, log_ratios):
            ratio = math.exp(log_ratio)
            gain = min(ratio * advantage, min(max(ratio, 1 - args.clip_low), 1 + args.clip_high) * advantage)
            clipped = gain < ratio * advantage  # the loss no longer depends on the ratio
            loss, slope, kl = -gain, 0.0 if clipped else -ratio * advantage, None
            if ref is not None:
                kl = math.exp(ref - new) - (ref - new) - 1
                loss += args.beta * kl
                slope += args.beta * (1 - math.exp(ref - new))
            gradient = slope / (length or size) / len(words)
            tokens.append(Token(text, new, old, ref, ratio, clipped, kl, loss, gradient))
        completions.append(tokens)
    return completions


def check_sums(completions: list[list[Token]], stats: dict[str, float], length: float | None) -> None:
    """Raise RuntimeError unless the tokens add up to the loss, clip_fraction and KL of accumulate_gradients."""
    mine = {"loss": [completion_loss(tokens, length) for tokens in completions]}
    mine["clip_fraction"] = [statistics.fmean(token.clipped for token in tokens) for tokens in completions]
    if "kl" in stats:
        mine["kl"] = [statistics.fmean(token.kl for token in tokens) for tokens in completions]  # type: ignore[misc]
    for name, values in mine.items():
        mean, largest = statistics.fmean(values), max(map(abs, values))
        if not abs(mean - stats[name]) <= 1e-5 * (1 + largest):  # float32 rounds; NaN never matches
            raise RuntimeError(f"{name}: the tokens add up to {mean}, and the training loop has {stats[name]}")


# ---- the completions of a run ----


def show_run(run: Path, html: str) -> None:
    """Write the page `html` of the completions that a run has logged. Raises SharedInputError."""
    path = run / "completions.jsonl"
    if not path.is_file():
        raise SharedInputError(f"{path}: is missing; --run takes the folder of a run of grpo_aqa.py, which writes it")
    lines = path.read_bytes().count(b"\n")  # a running training adds lines: count first
    groups = [record for record in read_jsonl(path) if is_group(record)]
    if not groups:
        fault = f"all {lines} lines are damaged" if lines else "is empty; it fills every --log_completions_every steps"
        raise SharedInputError(f"{path}: {fault}")
    text, notes = completions_html(groups, html, str(path), damaged=max(0, lines - len(groups)))
    print(f"{len(groups)} questions with their completions", *notes, sep="\n")
    write_page(html, text)


def write_page(path: str, text: str) -> None:
    """Write a page and print its path. Raises SharedInputError."""
    try:
        write_text(Path(path), text)
    except (OSError, ValueError) as error:
        raise SharedInputError(f"--html {path}: cannot be written ({error})") from None
    print(f"page: {path}")


# ---- the command ----


def explain(args) -> int:
    """Take one step, print its story and, with --html, write it as a page; or show a run. Return the exit status."""
    device = setup_distributed()[-1]

    def work():
        if dist.get_world_size() > 1:
            raise SharedInputError("explain.py runs on one rank; start it without torchrun")
        if args.run is not None:
            return show_run(Path(args.run), args.html or str(Path(args.run, "completions.html")))
        if args.resume:
            raise SharedInputError("--resume is for training; name a checkpoint of the run with --model")
        run = Run(args, "GRPO", device, strict=False)  # nothing is trained: list answers that cannot be rewarded
        policy, processor = run.load_policy()
        step = take_step(args, policy, processor, run.questions, device)
        parts = tell(step, args)
        print(to_text(parts), flush=True)
        if args.html:
            print()
            write_page(args.html, to_html(parts, "One step of GRPO"))

    return finish_together("explain.py", work, interrupted=lambda: "nothing was written")


def parse_args(argv: list[str] | None = None):
    parser = grpo_aqa.make_parser("Explain one step of GRPO with all its numbers.")
    parser.add_argument("--html", metavar="FILE", help="also write the explanation as a web page")
    page = "instead, write a page of the completions that this run has logged, FOLDER/completions.html or --html"
    parser.add_argument("--run", metavar="FOLDER", help=page)
    parser.set_defaults(out="runs/explain")  # only for the cache of checked clips
    args = grpo_aqa.parse_args(argv, parser)
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    others = {name for name, value in given.items() if value is not None} - {"run", "html"}
    if args.run is not None and others:
        parser.error(f"--run takes no setting but --html; leave out --{min(others)}")
    return args


if __name__ == "__main__":
    sys.exit(explain(parse_args()))
