"""GRPO for audio question answering, from scratch in plain PyTorch.

Group Relative Policy Optimization (arXiv 2402.03300) as arXiv 2503.11197 applies it to Qwen2-Audio. One step:

    take B questions                       data.py        prompts, with audio
    sample G completions of each           policy.py      each prompt computed once
    reward = accuracy + format             reward.py      [B, G]
    advantage within the group             here           [B, G]
    log-probs of reference and policy      policy.py      [B * G, T]
    clipped loss with a KL penalty         here           scalar
    backward, average over ranks           here
    AdamW                                  optimizer.py

    python grpo_aqa.py                                  the toy: trains a tiny model on synthesized sounds, on a CPU
    torchrun --nproc_per_node 8 grpo_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data train_qa.jsonl

Shapes: B prompts per rank, G completions each, N = B * G, T completion tokens.
"""

import argparse
import copy
import os
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import toy
from answering import heldout_table, score_greedily
from checkpoint import append_jsonl, find_state, load_state, log_completions, open_run, save_run
from data import TEMPLATES, Question, build_prompt, check_answers, digest, load_questions, step_indices
from decoding import GroupDecoder
from optimizer import ShardedAdamW
from policy import (
    DTYPES,
    Prompt,
    check_model,
    completion_logprobs,
    decode_text,
    encode_ahead,
    encode_prompts,
    pick_dtype,
    sample_group,
    slice_prompt,
    stop_token_ids,
    to_device,
)
from reward import accuracy_reward, format_reward
from runtime import (
    Clock,
    SharedInputError,
    catch_sigterm,
    data_parallel,
    exit_if_abandoned,
    finish_together,
    launchers,
    load_on_all_ranks,
    mean_over_ranks,
    on_rank_0,
    peak_memory_gb,
    setup_distributed,
)

# ---- the algorithm ----


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Advantage of each completion over its group's mean reward, [B, G] -> [B, G] in float32.

    A = (r - mean(r)) / (std(r) + 1e-4), with the unbiased deviation of the group (arXiv 2402.03300, section 4.1.2);
    without the division if normalize_std is False. Completions of a group of equal rewards have advantage exactly 0.
    """
    rewards = rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # where the mean may still be off by a rounding
    return advantages.masked_fill(equal, 0.0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective, negated, as a scalar loss (arXiv 2402.03300, equations 3 and 4).

        ratio  = pi / pi_old
        policy = min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        kl     = pi_ref / pi - log(pi_ref / pi) - 1              the unbiased, never negative "k3" estimator
        loss   = mean over completions of the mean over their tokens of -(policy - beta * kl)

    logprobs, old_logprobs, ref_logprobs, mask: [N, T]; advantages: [N]. Gradient flows through `logprobs` only.
    `ref_logprobs` may be None when beta is 0. Also returns stats without gradient: clip_fraction, the share of tokens
    whose gradient clipping removes, and kl, in nats per token, each averaged as the loss is.
    """
    mask = mask.bool()
    logprobs, old_logprobs = logprobs.float().masked_fill(~mask, 0), old_logprobs.float().masked_fill(~mask, 0)

    def mean_over_completions(per_token: Tensor) -> Tensor:
        return ((per_token * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()

    advantages = advantages.float()[:, None]
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)

    stats = {}
    if beta != 0:
        log_ref_ratio = ref_logprobs.float().masked_fill(~mask, 0).detach() - logprobs
        kl = log_ref_ratio.exp() - log_ref_ratio - 1
        per_token_loss = per_token_loss + beta * kl
        stats["kl"] = mean_over_completions(kl.detach())

    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    stats["clip_fraction"] = mean_over_completions(clipped.float())
    return mean_over_completions(per_token_loss), stats


@dataclass
class Rollout:
    """Prompts with their groups of completions, and all that stays fixed while the policy learns from them."""

    prompt: Prompt  # of N / G questions
    completions: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    advantages: Tensor  # [N]
    ref_logprobs: Tensor | None  # [N, T]; None without a KL penalty
    old_logprobs: Tensor | None  # [N, T]; None where the policy has not changed since it sampled


def accumulate_gradients(ddp_policy: DistributedDataParallel, rollouts: list[Rollout], args) -> dict[str, float]:
    """Backward through the loss of equally large rollouts, one after the other. Returns the loss and its stats.

    Leaves in the parameters the gradient of the mean loss over the rollouts of all ranks: gradients add up locally
    and are averaged over the ranks once, with the last rollout.
    """
    sums: dict[str, float] = defaultdict(float)
    for rollout in rollouts:
        with nullcontext() if rollout is rollouts[-1] else ddp_policy.no_sync():
            logprobs, entropy = ddp_policy(rollout.prompt, rollout.completions, rollout.mask, args.temperature)
            old_logprobs = logprobs.detach() if rollout.old_logprobs is None else rollout.old_logprobs
            loss, stats = grpo_loss(
                logprobs,
                old_logprobs,
                rollout.ref_logprobs,
                rollout.advantages,
                rollout.mask,
                args.clip_low,
                args.clip_high,
                args.beta,
            )
            (loss / len(rollouts)).backward()
        stats |= {"loss": loss, "entropy": entropy.sum() / rollout.mask.sum()}
        for name, value in stats.items():
            sums[name] += value.item() / len(rollouts)
    return sums


@dataclass
class Run:
    """What rank 0 finds out before any weights are loaded."""

    config: dict
    questions: list[Question]
    heldout: list[Question]
    state: Path | None  # the folder to resume from


def train(args: argparse.Namespace, run: Run, rank: int, world_size: int, device: torch.device) -> None:
    """The whole run: load, score, loop over steps, save, score again."""
    out, questions, heldout = Path(args.out), run.questions, run.heldout
    policy, processor = load_on_all_ranks(args.model, pick_dtype(args.dtype, device), device)
    reference = None  # the frozen starting checkpoint, which the KL penalty pulls towards
    if args.beta != 0:
        reference = copy.deepcopy(policy).requires_grad_(False)
    checkpointing = {"on": True, "off": False, "auto": device.type == "cuda"}[args.gradient_checkpointing]
    any_prompt = to_device(encode_prompts(processor, questions[:1], args.template), device)
    ddp_policy = data_parallel(policy, any_prompt, checkpointing)
    optimizer = ShardedAdamW({name: p for name, p in policy.named_parameters() if p.requires_grad})
    generator = torch.Generator(device).manual_seed(args.seed * 100_003 + rank)  # each rank draws its own samples
    stop_ids = stop_token_ids(policy, processor)
    cuda_graph = args.cuda_graph == "on"
    decoder = GroupDecoder(policy, args.group_size, args.max_new_tokens, cuda_graph)
    open_run(out, run.config, run.state, policy)
    if run.state:
        progress = load_state(run.state, optimizer, generator)
    else:
        before = score_greedily(policy, processor, heldout, args.template, args.max_new_tokens, cuda_graph)
        progress = {"step": 0, "position": 0, "before": before}  # position: questions used by all ranks

    preempted = catch_sigterm()
    steps = range(progress["step"] + 1, args.steps + 1)
    batch_size = args.prompts_per_rank * world_size
    positions = range(progress["position"], progress["position"] + len(steps) * batch_size, batch_size)
    shares = (step_indices(len(questions), position, args.prompts_per_rank, rank, args.seed) for position in positions)
    batches = encode_ahead(processor, ([questions[i] for i in share] for share in shares), args.template)
    bar = tqdm(steps, desc="GRPO", unit="step", initial=progress["step"], total=args.steps, disable=rank != 0)
    for step in bar:
        clock = Clock(device)
        lr = args.lr * (1 - (step - 1) / args.steps)  # linear decay to 0

        # 1. Questions: this rank's share of the step's batch, B of them, which have been prepared ahead.
        with clock("data"):
            batch, prompt = next(batches)
            prompt = to_device(prompt, device)

        # 2. G completions of each.
        with clock("sample"):
            sizes = args.group_size, args.max_new_tokens
            completions, mask = sample_group(policy, prompt, *sizes, args.temperature, stop_ids, generator, decoder)

        # 3. Rewards and advantages, [B, G].
        texts = decode_text(processor, completions, mask)
        answers = [question.answer for question in batch for _ in range(args.group_size)]
        accuracy = torch.tensor([accuracy_reward(text, answer) for text, answer in zip(texts, answers)])
        well_formed = torch.tensor([format_reward(text, args.template) for text in texts])
        rewards = (accuracy + well_formed).view(len(batch), args.group_size)
        advantages = group_advantages(rewards)

        # 4. Log-probs of the reference and, if it is about to be updated more than once, of the policy that sampled.
        #    The prompts are split into equal parts, one forward and backward each (gradient accumulation).
        rollouts = []
        size = args.prompts_per_rank // args.accumulation_steps
        for i in range(0, args.prompts_per_rank, size):
            rows = slice(i * args.group_size, (i + size) * args.group_size)
            inputs = slice_prompt(prompt, i, i + size), completions[rows], mask[rows]
            ref_logprobs = old_logprobs = None
            with torch.no_grad():
                if reference is not None:
                    with clock("reference"):
                        ref_logprobs, _ = completion_logprobs(reference, *inputs, args.temperature)
                if args.updates_per_rollout > 1:
                    with clock("train"):
                        old_logprobs, _ = completion_logprobs(policy, *inputs, args.temperature)
            rollouts.append(Rollout(*inputs, advantages.flatten()[rows].to(device), ref_logprobs, old_logprobs))

        # 5. Updates. With a single one the policy is still the one that sampled: its ratio is 1, nothing is clipped.
        updates = []
        for _ in range(args.updates_per_rollout):
            with clock("train"):
                updates.append(accumulate_gradients(ddp_policy, rollouts, args))
            with clock("update"):
                try:
                    grad_norm = optimizer.step(lr, args.max_grad_norm)  # clips the gradient first
                except FloatingPointError as error:
                    raise SharedInputError(f"step {step}: {error}; the weights are as before it") from None

        # 6. Metrics and completions.
        metrics = mean_over_ranks(
            {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
            | {
                "reward": rewards.mean().item(),
                "reward_std": rewards.std(dim=1).mean().item(),  # within groups: what advantages are made of
                "accuracy": accuracy.mean().item(),
                "format": well_formed.mean().item(),
                "completion_tokens": mask.sum(dim=1).float().mean().item(),
                "equal_reward_groups": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
                "grad_norm": grad_norm,
                "seconds": clock.total(),
                **{f"seconds_{phase}": seconds for phase, seconds in clock.phases.items()},
                "peak_memory_gb": peak_memory_gb(device),
                "preempted": float(preempted.is_set()),
            },
            device,
        )
        exit_if_abandoned()
        stopping = metrics.pop("preempted") > 0  # for all ranks at the same step, once one has had a SIGTERM
        if rank == 0:
            append_jsonl(out / "metrics.jsonl", {"step": step, "lr": lr, "kl": None} | metrics)
            bar.set_postfix({
                "reward": f"{metrics['reward']:.2f}",
                "accuracy": f"{metrics['accuracy']:.2f}",
                "format": f"{metrics['format']:.2f}",
                "kl": f"{metrics['kl']:.3f}" if reference is not None else "off",
                "tokens": f"{metrics['completion_tokens']:.1f}",
                "s/step": f"{metrics['seconds']:.2f}",
            })  # fmt: skip
            if step % args.log_completions_every == 0:
                prompts = [build_prompt(question, args.template) for question in batch]
                log_completions(out / "completions.jsonl", step, batch, prompts, texts, rewards, advantages)

        # 7. Checkpoint and resume state; only the state if the job is about to be ended.
        progress |= {"step": step, "position": progress["position"] + batch_size}
        due = step % args.save_every == 0 or step == args.steps
        if due or stopping:
            save_run(out, progress, policy, processor, optimizer, generator, due, args.keep_last)
        if stopping:
            break

    bar.close()
    if progress["step"] < args.steps:
        if rank == 0:
            print(f"\nSIGTERM: stopped after step {progress['step']}; --resume continues from there", flush=True)
        return
    after = score_greedily(policy, processor, heldout, args.template, args.max_new_tokens, cuda_graph)
    if rank == 0:
        print(f"\nmetrics, curves and checkpoints: {out}")
        if heldout:
            print(f"\n{heldout_table(heldout, {'before GRPO': progress['before'], 'after GRPO': after})}")


# ---- command line ----

# Without --model, these take the place of the defaults below, which are the paper's.
TOY = dict(out="runs/toy", steps=360, accumulation_steps=1, max_new_tokens=16, lr=3e-4, dtype="float32")
TOY_MODEL, TOY_DATA, TOY_HELDOUT = map(str, toy.paths(Path(TOY["out"])))  # made where they are missing
TOY_PROMPTS = 16  # of a step, shared by the ranks, so that the toy learns alike on 1, 2 and 8 processes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model NAME --data FILE] [settings]",
        description="Train Qwen2-Audio on audio questions with GRPO. Without --model: the toy, which needs no GPU. "
        f"Its defaults: {' '.join(f'--{name} {value}' for name, value in TOY.items())}, "
        f"and --prompts_per_rank {TOY_PROMPTS} / processes.",
    )

    def add(name, default, help, **kwargs):
        kind, shown = (str, "") if default is None else (type(default), " [%(default)s]")
        parser.add_argument(f"--{name}", default=default, type=kind, help=help + shown, **kwargs)

    add("model", None, "Hugging Face name or folder of a Qwen2-Audio model")
    add("data", None, "training questions: an R1-AQA, AVQA, MMAU or plain file")
    add("audio_dir", None, "folder that relative audio paths start from [the question file's]")
    add("heldout", None, "questions to score greedily before and after; audio paths start from their file's folder")
    add("out", None, "run folder [runs/<model's name>]")
    add("steps", 1000, "rollouts to train on")
    add("prompts_per_rank", 2, "questions per process and step")
    add("accumulation_steps", 2, "forward and backward passes that these are split into")
    add("group_size", 8, "completions sampled per question")
    add("max_new_tokens", 256, "longest completion, in tokens")
    add("temperature", 1.0, "of sampling, and of all log-probs")
    add("template", "answer", "prompt template, and with it the rewarded format", choices=TEMPLATES)
    add("lr", 1e-6, "learning rate of AdamW at the start; it decays linearly to 0")
    add("beta", 0.04, "weight of the KL penalty; 0 holds no reference model")
    add("clip_low", 0.2, "the ratio is clipped below 1 minus this")
    add("clip_high", 0.2, "the ratio is clipped above 1 plus this")
    add("updates_per_rollout", 1, "optimizer steps on each rollout")
    add("max_grad_norm", 1.0, "gradients are scaled down to this global norm")
    add("seed", 0, "of the order of questions and of sampling")
    add("dtype", "auto", "of the weights; auto is bfloat16 on a GPU, else float32", choices=("auto", *DTYPES))
    add("gradient_checkpointing", "auto", "recompute layers; auto: on a GPU", choices=("auto", "on", "off"))
    add("cuda_graph", "on", "decode by CUDA graphs, on a GPU", choices=("on", "off"))
    add("save_every", 100, "steps from one checkpoint and resume state to the next")
    add("keep_last", 0, "newest checkpoints to keep; 0 keeps all")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest state")
    add("log_completions_every", 10, "steps from one entry of completions.jsonl to the next")

    args = parser.parse_args(argv)
    if args.model is None:
        if args.data:
            parser.error("--data needs --model (`python toy.py --questions FILE --out DIR` makes a tiny one)")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        parser.set_defaults(model=TOY_MODEL, data=TOY_DATA, heldout=TOY_HELDOUT, **TOY)
        parser.set_defaults(prompts_per_rank=max(1, TOY_PROMPTS // processes))
        args = parser.parse_args(argv)
    elif args.data is None:
        parser.error("--model needs --data, a file of training questions")
    elif args.out is None:
        args.out = f"runs/{Path(args.model).name}"

    least = dict.fromkeys(("steps", "prompts_per_rank", "accumulation_steps", "max_new_tokens"), 1)
    least |= dict.fromkeys(("updates_per_rollout", "save_every", "log_completions_every"), 1)
    for name, minimum in (least | {"group_size": 2}).items():
        if getattr(args, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}, not {getattr(args, name)}")
    if args.keep_last < 0:
        parser.error(f"--keep_last must be at least 0, not {args.keep_last}")
    if args.prompts_per_rank % args.accumulation_steps:
        parser.error("--prompts_per_rank must be a multiple of --accumulation_steps")
    if args.temperature <= 0:
        parser.error("--temperature must be above 0: GRPO learns from samples that differ")
    return args


def prepare(args: argparse.Namespace, started_by: list[str]) -> Run:
    """Make the toy or check the user's inputs, and look for a state to resume from. Raises InputError."""
    if args.model == TOY_MODEL:
        toy.make_toy(Path(TOY_MODEL).parent)
    questions = load_questions(args.data, args.audio_dir)
    check_answers(questions, args.data)
    heldout = load_questions(args.heldout) if args.heldout else []
    check_answers(heldout, args.heldout)
    check_model(args.model)
    config = vars(args) | {
        "heldout": args.heldout and os.path.abspath(args.heldout),  # eval_mmau.py finds it from anywhere
        "questions_digest": digest(questions),
        "world_size": dist.get_world_size(),
        "launchers": started_by,
    }
    return Run(config, questions, heldout, find_state(Path(args.out), config, args.resume))


def main() -> int:
    args = parse_args()
    rank, world_size, device = setup_distributed()
    started_by = launchers()

    def work():
        run = on_rank_0(lambda: prepare(args, started_by))
        train(args, run, rank, world_size, device)

    return finish_together("grpo_aqa.py", work)


if __name__ == "__main__":
    sys.exit(main())
