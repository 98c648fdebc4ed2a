"""GRPO for audio question answering, from scratch in plain PyTorch.

Group Relative Policy Optimization (arXiv 2402.03300), applied to Qwen2-Audio as in arXiv 2503.11197. One step:

    1. take B questions with their clips               data.py         ids [B, P], mel [B, mels, F]
    2. sample G completions of each                    policy.py       [B * G, T]
    3. reward each completion                          reward.py       [B, G]
    4. advantage = reward compared with its group      here            [B, G]
    5. log-probs of reference and policy               policy.py       [B * G, T]
    6. clipped loss with a KL penalty, backward        here            scalar
    7. clip the gradient, AdamW                        training/       weights

    python grpo_aqa.py                    the toy: trains a tiny model on synthesized sounds, on a CPU
    torchrun --nproc_per_node 8 grpo_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs --skip_bad_audio

Shapes: B prompts per rank, G completions per prompt, N = B * G, P prompt tokens, T completion tokens, F mel frames.
"""

import argparse
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import Question, step_indices
from infra.flags import ON_OFF
from infra.processes import mean_length
from model.decoding import GroupDecoder
from model.lora import adapter_off, dropout_on
from model.qwen2_audio import Prompt, frozen_copy, pick_prompts
from policy import completion_logprobs, data_parallel, decode_text, sample_group, stop_token_ids
from reward import REWARDS
from training.groups import Groups, equal_rewards, needs_sampling, replace_equal
from training.metrics import summarize
from training.optimizer import ShardedAdamW, clip_scale, trainable
from training.run import Run, run_training
from training.settings import LR, TOY, TOY_LR, add_setting, parse_settings, shared_settings

# ---- the algorithm ----


def score_completions(
    texts: list[str], questions: list[Question], template: str, names: list[str]
) -> dict[str, Tensor]:
    """Compute the named rewards of B * G texts, the first G about the first question: [B, G] each, on the CPU."""
    asked = [question for question in questions for _ in range(len(texts) // len(questions))]  # [B * G]
    scores = {}
    for name in names:
        values = [REWARDS[name](text, question, template) for text, question in zip(texts, asked)]
        scores[name] = torch.tensor(values, dtype=torch.float32).view(len(questions), -1)
    return scores


def total_reward(scores: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Add up the weighted rewards of each completion, [B, G] each -> [B, G]."""
    return torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(dim=0)


def group_advantages(rewards: Tensor, normalize_std: bool = True) -> Tensor:
    """Compute the advantage of each completion over its group, [B, G] -> [B, G] in float32.

    A = (r - mean(r)) / (std(r) + 1e-4) with the group's unbiased deviation (arXiv 2402.03300, section 4.1.2), without
    the division if normalize_std is False. In a group of equal rewards every advantage is exactly 0.
    """
    rewards = rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # [B, G] - [B, 1]
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return advantages.masked_fill(equal_rewards(rewards)[:, None], 0.0)  # their mean may be off by a rounding


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    length: float | None = None,
    ratio: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the GRPO objective, negated, as a scalar loss (arXiv 2402.03300, equations 3 and 4), and its variants.

        rho  = pi / pi_old
        gain = min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        kl   = pi_ref / pi - log(pi_ref / pi) - 1              the unbiased, never negative "k3" estimator
        loss = mean over completions of (mean over tokens of -(gain - beta * kl))

    logprobs, old_logprobs, ref_logprobs, mask: [N, T]; advantages: [N]. Gradient flows through `logprobs` only.
    `ref_logprobs` may be None if beta is 0. `length`: divide the sum over a completion's tokens by this number, not by
    the number of its tokens (see loss_length). ratio "sequence": one rho per completion, the geometric mean over its
    tokens, so that the completion is clipped as a whole (GSPO, arXiv 2507.18071, equations 5 and 7).

    Also returns stats without gradient: clip_fraction, the share of tokens that lose their gradient to clipping, and,
    with `ref_logprobs`, kl in nats per token. Both are means over completions of means over tokens in all variants, so
    that variants compare.
    """
    mask = mask.bool()  # [N, T]
    logprobs = logprobs.float().masked_fill(~mask, 0)  # [N, T]
    old_logprobs = old_logprobs.float().masked_fill(~mask, 0).detach()  # [N, T]
    own_lengths = mask.sum(dim=1).clamp(min=1)  # [N]

    def mean_over_completions(per_token: Tensor, lengths: Tensor | float = own_lengths) -> Tensor:
        return ((per_token * mask).sum(dim=1) / lengths).mean()  # [N, T] -> [N] -> scalar

    advantages = advantages.float()[:, None]  # [N, 1]
    log_rho = logprobs - old_logprobs  # [N, T]
    if ratio == "sequence":
        log_rho = log_rho.sum(dim=1, keepdim=True) / own_lengths[:, None]  # [N, 1]
    rho = log_rho.exp()  # [N, T] or [N, 1]
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)  # [N, T] or [N, 1]
    per_token_loss = -gain  # [N, T] or [N, 1]

    stats = {}
    assert beta == 0 or ref_logprobs is not None, "a KL penalty needs the reference's log-probs"
    if ref_logprobs is not None:
        log_ref_ratio = ref_logprobs.float().masked_fill(~mask, 0).detach() - logprobs  # [N, T]
        kl = log_ref_ratio.exp() - log_ref_ratio - 1  # [N, T]
        if beta != 0:  # else the KL is only measured
            per_token_loss = per_token_loss + beta * kl  # [N, T]
        stats["kl"] = mean_over_completions(kl.detach())  # scalar

    clipped = ((advantages > 0) & (rho > 1 + clip_high)) | ((advantages < 0) & (rho < 1 - clip_low))  # [N, T] or [N, 1]
    stats["clip_fraction"] = mean_over_completions(clipped.float())
    return mean_over_completions(per_token_loss, own_lengths if length is None else length), stats


def loss_length(mask: Tensor, loss_average: str, max_new_tokens: int) -> float | None:
    """Return the divisor of a completion's sum over tokens, for grpo_loss. mask: [N, T] of the whole step.

        completion   None: its own length, so all completions weigh the same       arXiv 2402.03300, equation 3
        token        the mean length over all ranks, so all tokens weigh the same  DAPO, arXiv 2503.14476
        constant     the longest possible length, the same in all steps            Dr. GRPO, arXiv 2503.20783

    All ranks call this, each with the same number of completions.
    """
    if loss_average == "token":
        return mean_length(mask)
    return float(max_new_tokens) if loss_average == "constant" else None


@dataclass
class Rollout:
    """A batch of completions and everything that is constant during its updates."""

    prompt: Prompt  # of N / G questions
    completions: Tensor  # [N, T]
    mask: Tensor  # [N, T]: True up to and including the end of turn
    advantages: Tensor  # [N]
    ref_logprobs: Tensor | None  # [N, T]; None without a KL penalty
    old_logprobs: Tensor | None  # [N, T]; None for a single update: old and current policy are the same
    sampled_logprobs: Tensor | None = None  # [N, T]: the sampler's, for sampler_gap
    share: float = 1.0  # of its part's completions; the others, left out, have no gradient


@torch.no_grad()
def make_rollouts(
    policy,
    reference,
    prompt: Prompt,
    completions: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    parts: int,
    temperature: float,
    keep_old: bool,
    sampled_logprobs: Tensor | None = None,
    clock=lambda phase: nullcontext(),
) -> list[Rollout]:
    """Split sampled completions into equal parts, and compute the log-probs that stay constant during the updates.

    prompt: B prompts; completions, mask: [N, T]; advantages: [N]. reference: None without a KL penalty. Each of the
    `parts` goes through the model by itself (gradient accumulation). keep_old: also compute the log-probs of the policy
    as it sampled, which several updates need. sampled_logprobs: [N, T], those of sample_group, for sampler_gap.

    Without a reference, groups of equal rewards are left out: with all advantages 0 and no KL, their gradient is 0. A
    part keeps at least one group, because DistributedDataParallel waits for a backward pass of every rank.
    """
    prompts, rollouts = len(prompt["input_ids"]), []
    group_size, size = len(completions) // prompts, prompts // parts
    useful = (advantages.view(prompts, group_size) != 0).any(dim=1).tolist()  # B
    for i in range(0, prompts, size):
        kept = [b for b in range(i, i + size) if useful[b] or reference is not None] or [i]
        rows = [b * group_size + g for b in kept for g in range(group_size)]
        part = pick_prompts(prompt, kept), completions[rows], mask[rows]
        ref_logprobs = old_logprobs = None
        if reference is not None:
            with clock("reference"), adapter_off(policy):  # with LoRA, the reference is the policy without its adapter
                ref_logprobs, _ = completion_logprobs(reference, *part, temperature)
        if keep_old:
            with clock("train"):
                old_logprobs, _ = completion_logprobs(policy, *part, temperature)
        sampled = None if sampled_logprobs is None else sampled_logprobs[rows]
        rollouts.append(Rollout(*part, advantages[rows], ref_logprobs, old_logprobs, sampled, len(kept) / size))
    return rollouts


def accumulate_gradients(
    ddp_policy: DistributedDataParallel,
    rollouts: list[Rollout],
    *,
    temperature: float,
    clip_low: float,
    clip_high: float,
    beta: float,
    length: float | None = None,
    ratio: str = "token",
) -> dict[str, float]:
    """Run log-probs, loss and backward for the rollouts of equal parts, one after the other. Return the loss and stats.

    Leaves the gradient of the mean loss over the rollouts of all ranks in the parameters. Gradients add up on each
    rank, and the ranks average them once, in the last backward. temperature: that of sampling. The other keywords are
    those of grpo_loss. Among the stats is sampler_gap: the mean absolute difference between the log-probs of this pass
    and the sampler's. Before the first update, both are of the same policy, so the gap is only rounding (and the
    dropout of LoRA).
    """
    sums: dict[str, float] = defaultdict(float)
    for rollout in rollouts:
        with nullcontext() if rollout is rollouts[-1] else ddp_policy.no_sync():
            logprobs, entropy = ddp_policy(rollout.prompt, rollout.completions, rollout.mask, temperature)  # [N, T]
            loss, stats = grpo_loss(
                logprobs,
                logprobs.detach() if rollout.old_logprobs is None else rollout.old_logprobs,
                rollout.ref_logprobs,
                rollout.advantages,
                rollout.mask,
                clip_low=clip_low,
                clip_high=clip_high,
                beta=beta,
                length=length,
                ratio=ratio,
            )
            loss = rollout.share * loss  # completions that were left out have loss 0 and are not clipped
            (loss / len(rollouts)).backward()
        stats["clip_fraction"] *= rollout.share
        stats |= {"loss": loss, "entropy": entropy.sum() / rollout.mask.sum()}
        if rollout.sampled_logprobs is not None:  # like `logprobs`, 0 outside the mask
            stats["sampler_gap"] = (logprobs - rollout.sampled_logprobs).abs().sum() / rollout.mask.sum()
        for name, value in stats.items():
            sums[name] += value.item() / len(rollouts)
    return sums


def make_reference(policy, beta: float, lora_rank: int, freeze_audio_tower: bool) -> Any:
    """Return the frozen starting checkpoint that the KL penalty pulls towards; None if beta is 0.

    With LoRA the reference is the policy itself, called with its adapter off. A frozen audio tower is shared.
    """
    if beta == 0:
        return None
    if lora_rank:
        return policy
    return frozen_copy(policy, share_audio_tower=freeze_audio_tower)


# ---- the loop ----


def train(args: argparse.Namespace, run: Run) -> None:
    """Train the policy with GRPO. `run` does what is not the algorithm: checks, batches, metrics, saves, resuming."""
    # Policy; reference (with --log_kl also for beta 0), copied before run.start may load resumed weights; gradients
    # averaged over the ranks; optimizer.
    policy, processor = run.load_policy()
    reference = make_reference(policy, args.beta or args.log_kl, args.lora_rank, args.freeze_audio_tower)
    ddp_policy = data_parallel(policy, run.first_prompt(), args.gradient_checkpointing)
    optimizer = ShardedAdamW(trainable(policy))

    # The data order: every epoch is a new shuffle of all questions; the ranks share each batch of questions.
    order = partial(step_indices, len(run.questions), prompts_per_rank=args.prompts_per_rank, rank=dist.get_rank(),
                    seed=args.seed)  # fmt: skip
    run.start(optimizer, order, batches_per_step=1 + args.dynamic_sampling)
    decoder = GroupDecoder(  # its memory serves all steps
        policy, args.group_size, args.max_new_tokens, args.cuda_graph, args.prompts_per_rank, run.longest_prompt()
    )
    stop_ids = stop_token_ids(policy, processor)

    for step in run.steps():
        lr = args.lr * (1 - (step - 1) / args.steps)  # linear decay to 0

        sampled: list[Groups] = []
        while needs_sampling(sampled, args.dynamic_sampling):  # a single round without --dynamic_sampling
            # 1. Questions: B of them, this rank's share of the batch.
            questions, prompt = run.next_batch()

            # 2. Sample G completions of each question, [B * G, T].
            with run.clock("sample"):
                completions, mask, logprobs = sample_group(
                    policy, prompt, args.group_size, args.max_new_tokens, args.temperature, stop_ids, run.generator,
                    decoder,
                )  # fmt: skip
            texts = decode_text(processor, completions, mask)

            # 3. Rewards: a weighted sum, [B, G].
            scores = score_completions(texts, questions, args.template, list(args.reward_weights))
            rewards = total_reward(scores, args.reward_weights)
            sampled.append(Groups(questions, prompt, completions, mask, logprobs, texts, scores, rewards))
        with run.clock("data"):
            groups = replace_equal(sampled)  # with a single round, its own groups

        # 4. Advantages within each group, [B, G].
        advantages = group_advantages(groups.rewards, args.normalize_std)

        # 5. Log-probs of the reference and, if there are several updates, of the policy that sampled, [B * G, T].
        rollouts = make_rollouts(
            policy, reference, groups.prompt, groups.completions, groups.mask, advantages.flatten().to(run.device),
            parts=args.accumulation_steps, temperature=args.temperature, keep_old=args.updates_per_rollout > 1,
            sampled_logprobs=groups.sampled_logprobs, clock=run.clock,
        )  # fmt: skip

        # 6. Log-probs of the policy, loss, backward. With a single update the policy is still the one that sampled: its
        #    ratio is exactly 1, and nothing is clipped.
        length, updates = loss_length(groups.mask, args.loss_average, args.max_new_tokens), []
        for _ in range(args.updates_per_rollout):
            with run.clock("train"), dropout_on(policy):
                stats = accumulate_gradients(
                    ddp_policy, rollouts, temperature=args.temperature, clip_low=args.clip_low,
                    clip_high=args.clip_high, beta=args.beta, length=length, ratio=args.ratio,
                )  # fmt: skip

            # 7. Clip the gradient to a global norm, and take a step of AdamW.
            with run.clock("update"):
                grad_norm = optimizer.grad_norm()
                run.require_finite(stats["loss"], grad_norm, groups.questions)
                optimizer.step(lr, clip_scale(grad_norm, args.max_grad_norm))
            updates.append(stats)

        # Metrics, completions, checkpoint, resume state.
        metrics = {"kl": None} | {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics |= {"sampler_gap": updates[0]["sampler_gap"], "grad_norm": grad_norm}  # later updates change the policy
        metrics |= summarize(sampled, groups, stop_ids, run.clock.phases["sample"])
        run.record(lr, metrics, shown=["reward", *scores, "kl", "completion_tokens", "seconds"])
        run.log_completions(groups, advantages)
        run.save_if_due()
    run.finish()


# ---- command line ----

DEFAULTS = dict(out="runs/<model's name>", lr=LR["grpo_aqa.py"])  # the paper's, as those in make_parser
TOY_DEFAULTS = TOY | dict(out="runs/toy", lr=TOY_LR["grpo_aqa.py"])  # in their place without --model


def reward_weights(text: str) -> dict[str, float]:
    """Parse --reward_weights: "accuracy=1,format=0.5" -> {"accuracy": 1.0, "format": 0.5}."""
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in REWARDS:
            raise argparse.ArgumentTypeError(f"unknown reward {name!r}; choose from {', '.join(REWARDS)}")
        if name in weights:
            raise argparse.ArgumentTypeError(f"names the reward {name!r} twice")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = float("nan")
        if not abs(weights[name]) <= 1e6:
            raise argparse.ArgumentTypeError(f"{part!r} needs a number, as in {name}=1")
    return weights


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of GRPO's settings."""
    parser = shared_settings(description, DEFAULTS, TOY_DEFAULTS)
    group = parser.add_argument_group("GRPO")
    add = partial(add_setting, group)
    add("group_size", 8, "completions sampled per question")
    add("temperature", 1.0, "temperature of sampling and of all log-probs")
    add("reward_weights", "accuracy=1,format=1", "rewards and their weights", type=reward_weights, metavar="NAME=W,...")
    add("beta", 0.04, "weight of the KL penalty; 0: no reference model")
    add("clip_low", 0.2, "clip the ratio at 1 minus this")
    add("clip_high", 0.2, "clip the ratio at 1 plus this")
    add("ratio", "token", "one ratio per token, or per completion (GSPO)", choices=("token", "sequence"))
    averages = "divide a completion's loss by its length, the step's mean length, or --max_new_tokens"
    add("loss_average", "completion", averages, choices=("completion", "token", "constant"))
    add("normalize_std", "on", "divide advantages by their group's deviation", **ON_OFF)
    add("updates_per_rollout", 1, "optimizer steps per rollout")
    add("dynamic_sampling", 0, "most further rounds of sampling to replace groups of equal rewards (DAPO)")
    group.add_argument("--log_kl", action="store_true", help="measure the KL with beta 0, too; needs the reference")
    add("log_completions_every", 10, "steps between entries of completions.jsonl")
    return parser


def parse_args(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or make_parser("Train Qwen2-Audio on audio questions with GRPO.")
    return parse_settings(parser, argv, DEFAULTS, TOY_DEFAULTS)


if __name__ == "__main__":
    sys.exit(run_training(parse_args(), "grpo_aqa.py", "GRPO", train))
