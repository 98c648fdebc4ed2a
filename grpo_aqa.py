"""GRPO for audio question answering, from scratch in plain PyTorch.

Group Relative Policy Optimization (arXiv 2402.03300) as arXiv 2503.11197 applies it to Qwen2-Audio. One step:

    take B questions                       data.py        prompts, with audio
    sample G completions of each           policy.py      each prompt computed once
    reward = accuracy + format             reward.py      [B, G]
    advantage within the group             here           [B, G]
    log-probs of reference and policy      policy.py      [B * G, T]
    clipped loss with a KL penalty         here           scalar
    backward, average over ranks, AdamW    here

    python grpo_aqa.py                                  the toy: trains a tiny model on synthesized sounds, on a CPU
    torchrun --nproc_per_node 8 grpo_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data train_qa.jsonl

Shapes: B prompts per rank, G completions each, N = B * G, T completion tokens.
"""

import argparse
import os
import resource
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import toy
from checkpoint import append_jsonl, draw_curves, save_checkpoint, start_run
from data import TEMPLATES, InputError, Question, build_prompt, load_questions, step_indices
from policy import (
    answer_greedily,
    check_model,
    completion_logprobs,
    decode_text,
    encode_prompts,
    load_policy,
    pick_dtype,
    sample_group,
    slice_prompt,
    stop_token_ids,
    to_device,
)
from reward import accuracy_reward, format_reward, mmau_match, prediction

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


class CompletionLogprobs(nn.Module):
    """policy.completion_logprobs as a module: DistributedDataParallel averages gradients of what a forward() used."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return completion_logprobs(self.model, *inputs)


def train(args: argparse.Namespace, rank: int, world_size: int, device: torch.device) -> None:
    """The training loop."""
    out = Path(args.out)
    questions = load_questions(args.data, args.audio_dir)
    heldout = load_questions(args.heldout) if args.heldout else []
    policy, processor = load_policy(args.model, pick_dtype(args.dtype, device), device)
    reference = None  # the frozen starting checkpoint that the KL penalty pulls towards
    if args.beta != 0:
        reference = load_policy(args.model, policy.dtype, device)[0].requires_grad_(False)
    ddp_policy = DistributedDataParallel(CompletionLogprobs(policy), gradient_as_bucket_view=True)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(args.seed * 100_003 + rank)  # ranks sample independently
    stop_ids = stop_token_ids(policy, processor)
    if rank == 0:
        start_run(out, vars(args) | {"world_size": world_size, "questions": len(questions)})
    before = score_greedily(policy, processor, heldout, args, rank, world_size)

    bar = tqdm(range(args.steps), desc="GRPO", unit="step", disable=rank != 0)
    for step in bar:
        seconds = dict.fromkeys(("data", "sample", "reference", "train", "update"), 0.0)
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)  # linear decay to 0

        # Questions: this rank's share of the step's batch.
        with timed(seconds, "data", device):
            indices = step_indices(len(questions), step, args.prompts_per_rank, rank, world_size, args.seed)
            batch = [questions[i] for i in indices]
            prompt = to_device(encode_prompts(processor, batch, args.template), device)

        # Rollout: G completions of each prompt.
        with timed(seconds, "sample", device):
            completions, mask = sample_group(
                policy, prompt, args.group_size, args.max_new_tokens, args.temperature, stop_ids, generator
            )

        # Rewards and advantages, [B, G].
        texts = decode_text(processor, completions, mask)
        answers = [question.answer for question in batch for _ in range(args.group_size)]
        accuracy = torch.tensor([accuracy_reward(text, answer) for text, answer in zip(texts, answers)])
        format_ = torch.tensor([format_reward(text, args.template) for text in texts])
        rewards = (accuracy + format_).view(-1, args.group_size)
        advantages = group_advantages(rewards)

        # What stays fixed while the policy is updated: log-probs of the reference and of the policy that sampled.
        # The step's prompts are split into equal parts, one forward and backward each (gradient accumulation).
        parts = []
        for i in range(0, len(batch), len(batch) // args.accumulation_steps):
            j = i + len(batch) // args.accumulation_steps
            rows = slice(i * args.group_size, j * args.group_size)
            inputs = (slice_prompt(prompt, i, j), completions[rows], mask[rows], args.temperature)
            ref_logprobs = old_logprobs = None
            with torch.no_grad():
                if reference is not None:
                    with timed(seconds, "reference", device):
                        ref_logprobs, _ = completion_logprobs(reference, *inputs)
                if args.updates_per_rollout > 1:
                    with timed(seconds, "train", device):
                        old_logprobs, _ = completion_logprobs(policy, *inputs)
            parts.append((inputs, old_logprobs, ref_logprobs, advantages[i:j].flatten().to(device)))

        # Updates. With one update per rollout the sampling policy is the current one: ratio 1, nothing clipped.
        sums: dict[str, float] = {}
        for _ in range(args.updates_per_rollout):
            with timed(seconds, "train", device):
                for inputs, old_logprobs, ref_logprobs, part_advantages in parts:
                    last = inputs is parts[-1][0]
                    with nullcontext() if last else ddp_policy.no_sync():  # gradients are averaged over ranks once
                        logprobs, entropy = ddp_policy(*inputs)
                        loss, stats = grpo_loss(
                            logprobs,
                            logprobs.detach() if old_logprobs is None else old_logprobs,
                            ref_logprobs,
                            part_advantages,
                            inputs[2],
                            args.clip_low,
                            args.clip_high,
                            args.beta,
                        )
                        (loss / len(parts)).backward()
                    stats |= {"loss": loss.detach(), "entropy": entropy.sum() / inputs[2].sum()}
                    for name, value in stats.items():
                        sums[name] = sums.get(name, 0.0) + value.item()
            with timed(seconds, "update", device):
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

        # Metrics, averaged over ranks.
        passes = len(parts) * args.updates_per_rollout
        metrics = mean_over_ranks(
            {name: value / passes for name, value in sums.items()}
            | {
                "reward": rewards.mean().item(),
                "reward_std": rewards.std(dim=1).mean().item(),  # within groups: what the advantages rest on
                "accuracy": accuracy.mean().item(),
                "format": format_.mean().item(),
                "completion_tokens": mask.sum(dim=1).float().mean().item(),
                "equal_reward_groups": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
                "grad_norm": grad_norm.item(),
                "seconds": time.perf_counter() - started,
                **{f"seconds_{name}": value for name, value in seconds.items()},
                "peak_memory_gb": peak_memory_gb(device),
            },
            device,
        )
        if rank == 0:
            metrics = {"step": step + 1, "lr": optimizer.param_groups[0]["lr"], "kl": None} | metrics
            append_jsonl(out / "metrics.jsonl", metrics)
            shown = {"reward": "reward", "acc": "accuracy", "format": "format", "kl": "kl", "tokens": "completion_tokens"}
            bar.set_postfix({short: f"{metrics[name] or 0:.3f}" for short, name in shown.items()})
            if (step + 1) % args.log_completions_every == 0:
                log_completions(out / "completions.jsonl", step + 1, batch, args.template, texts, rewards, advantages)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save_checkpoint(out / f"step_{step + 1:06d}", policy, processor)
                draw_curves(out)
        if (step + 1) % args.save_every == 0:
            dist.barrier()  # the others wait while rank 0 saves

    after = score_greedily(policy, processor, heldout, args, rank, world_size)
    if rank == 0:
        print(f"metrics, curves and checkpoints: {out}")
        if heldout:
            guess = sum(1 / len(question.choices) for question in heldout) / len(heldout)
            print(f"\n{len(heldout)} held-out questions, greedy    accuracy  format")
            print(f"  guessing                         {guess:.3f}")
            print(f"  before GRPO                      {before[0]:.3f}     {before[1]:.3f}")
            print(f"  after GRPO                       {after[0]:.3f}     {after[1]:.3f}")


# ---- around the algorithm ----


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device):
    """Add the wall-clock seconds of a block to seconds[phase], the GPU's work included."""
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[phase] += time.perf_counter() - started


def mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """The mean of each value over all ranks."""
    means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(means)
    return dict(zip(values, (means / dist.get_world_size()).tolist()))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process has held so far, on the GPU or, without one, as resident set. 1 GB = 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def log_completions(path, step, batch, template, texts, rewards, advantages) -> None:
    """Write rank 0's questions of a step with their completions, rewards and advantages, one line a question."""
    group_size = rewards.shape[1]
    for b, question in enumerate(batch):
        append_jsonl(
            path,
            {
                "step": step,
                "id": question.id,
                "audio": question.audio,
                "prompt": build_prompt(question, template),
                "answer": question.answer,
                "completions": texts[b * group_size : (b + 1) * group_size],
                "rewards": rewards[b].tolist(),
                "advantages": [round(advantage, 4) for advantage in advantages[b].tolist()],
            },
        )


def score_greedily(policy, processor, questions: list[Question], args, rank, world_size) -> tuple[float, float]:
    """Greedy accuracy (MMAU's rule) and share of well-formed completions; the questions are shared over the ranks."""
    if not questions:
        return 0.0, 0.0
    counts = torch.zeros(2, dtype=torch.float64)
    mine = questions[rank::world_size]
    for i in range(0, len(mine), 32):
        batch = mine[i : i + 32]
        for question, text in zip(batch, answer_greedily(policy, processor, batch, args.template, args.max_new_tokens)):
            counts[0] += mmau_match(question.answer, prediction(text), question.choices)
            counts[1] += format_reward(text, args.template)
    counts = counts.to(policy.device)
    dist.all_reduce(counts)
    return tuple((counts / len(questions)).tolist())


# ---- command line ----

PAPER = dict(
    steps=1000,
    prompts_per_rank=2,
    accumulation_steps=2,
    group_size=8,
    max_new_tokens=256,
    lr=1e-6,
    beta=0.04,
    save_every=100,
)
TOY = dict(steps=300, accumulation_steps=1, max_new_tokens=16, lr=3e-4)
TOY_PROMPTS = 16  # a step's, shared over the ranks, so that the toy learns alike on 1, 2 and 8 processes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train Qwen2-Audio on audio questions with GRPO. Without --model: the toy, on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Toy defaults: " + ", ".join(f"--{name} {value}" for name, value in TOY.items())
        + f", {TOY_PROMPTS} prompts a step over all ranks, --out runs/toy.",
    )  # fmt: skip
    add = parser.add_argument
    add("--model", help="Hugging Face name or folder of a Qwen2-Audio model")
    add("--data", help="training questions: R1-AQA, AVQA, MMAU or plain file")
    add("--audio_dir", help="folder that relative audio paths start from; default: the question file's")
    add("--heldout", help="questions to score greedily before and after training; audio beside the file")
    add("--out", help="run folder; default: runs/<name of the model>")
    add("--steps", type=int, default=PAPER["steps"], help="rollouts to train on")
    add("--prompts_per_rank", type=int, default=PAPER["prompts_per_rank"], help="questions per rank and step")
    add("--accumulation_steps", type=int, default=PAPER["accumulation_steps"], help="passes they are split into")
    add("--group_size", type=int, default=PAPER["group_size"], help="completions sampled per question (G)")
    add("--max_new_tokens", type=int, default=PAPER["max_new_tokens"], help="longest completion, in tokens")
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--template", choices=TEMPLATES, default="answer", help="prompt template, and the format that is rewarded")
    add("--lr", type=float, default=PAPER["lr"], help="AdamW's learning rate at the start; decays linearly to 0")
    add("--beta", type=float, default=PAPER["beta"], help="weight of the KL penalty; 0 holds no reference model")
    add("--clip_low", type=float, default=0.2, help="the ratio is clipped below 1 - this")
    add("--clip_high", type=float, default=0.2, help="and above 1 + this")
    add("--updates_per_rollout", type=int, default=1, help="optimizer steps on each rollout")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this global norm")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU")
    add("--save_every", type=int, default=PAPER["save_every"], help="steps between checkpoints")
    add("--log_completions_every", type=int, default=10, help="steps between entries of completions.jsonl")

    args = parser.parse_args(argv)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.model is None:
        parser.set_defaults(**TOY, prompts_per_rank=max(1, TOY_PROMPTS // world_size), out="runs/toy")
        args = parser.parse_args(argv)
        if args.data:
            parser.error("--data needs --model; `python toy.py --questions FILE --out DIR` makes a tiny one for it")
    elif args.data is None:
        parser.error("--model needs --data, the file of training questions")
    else:
        args.out = args.out or f"runs/{Path(args.model).name}"

    for name, least in dict(steps=1, prompts_per_rank=1, accumulation_steps=1, group_size=2, max_new_tokens=1,
                            updates_per_rollout=1, save_every=1, log_completions_every=1).items():  # fmt: skip
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if args.prompts_per_rank % args.accumulation_steps:
        parser.error("--prompts_per_rank must be a multiple of --accumulation_steps")
    if args.temperature <= 0:
        parser.error("--temperature must be above 0; GRPO learns from differing samples")
    return args


def setup_distributed() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, or make one of a single process. Returns rank, size, device."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    store = None if "RANK" in os.environ else dist.HashStore()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    return rank, world_size, device


def main() -> int:
    args = parse_args()
    rank, world_size, device = setup_distributed()
    message = [None]
    if rank == 0:  # checks the inputs, and makes the toy, before the others touch them
        try:
            if args.model is None:
                toy.make_toy(Path("runs/toy"), args.seed)
            else:
                check_model(args.model)
                load_questions(args.data, args.audio_dir)
        except InputError as error:
            message = [str(error)]
            print(f"grpo_aqa.py: error: {error}", file=sys.stderr, flush=True)
    dist.broadcast_object_list(message)
    if message[0] is None:
        if args.model is None:
            args.model, args.data, args.heldout = "runs/toy/base", "runs/toy/world/train.jsonl", "runs/toy/world/heldout.json"
        train(args, rank, world_size, device)
    dist.destroy_process_group()
    return 0 if message[0] is None else 1


if __name__ == "__main__":
    sys.exit(main())
