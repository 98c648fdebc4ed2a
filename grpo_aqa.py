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
    torchrun --nproc_per_node 8 grpo_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs

Shapes: B prompts per rank, G completions each, N = B * G, T completion tokens.
"""

import argparse
import copy
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import Question, build_prompt
from decoding import GroupDecoder
from lora import adapter_off, dropout_on
from metrics import log_completions
from policy import Prompt, completion_logprobs, decode_text, sample_group, slice_prompt, stop_token_ids
from reward import accuracy_reward, format_reward
from runtime import mean_length
from training import (
    Run,
    add_setting,
    finish,
    load_policy_to_train,
    parse_settings,
    progress_bar,
    record_step,
    run_training,
    save_if_due,
    shared_settings,
    start,
    steps_to_take,
    update,
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
    length: float | None = None,
    ratio: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective, negated, as a scalar loss (arXiv 2402.03300, equations 3 and 4), and its variants.

        rho  = pi / pi_old
        gain = min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        kl   = pi_ref / pi - log(pi_ref / pi) - 1              the unbiased, never negative "k3" estimator
        loss = mean over completions of the mean over their tokens of -(gain - beta * kl)

    With a `length`, the sum over a completion's tokens is divided by that instead of by their number (see loss_length).
    With ratio "sequence", all tokens of a completion have the same rho, the geometric mean of theirs, and are clipped
    together (GSPO, arXiv 2507.18071, equations 5 and 7).

    logprobs, old_logprobs, ref_logprobs, mask: [N, T]; advantages: [N]. Gradient flows through `logprobs` only.
    `ref_logprobs` may be None when beta is 0. Also returns stats without gradient: clip_fraction, the share of tokens
    whose gradient clipping removes, and kl, in nats per token. To mean the same in all variants, both are means over
    completions of the mean over their tokens, whatever the loss is divided by.
    """
    mask = mask.bool()
    logprobs, old_logprobs = logprobs.float().masked_fill(~mask, 0), old_logprobs.float().masked_fill(~mask, 0)
    own_lengths = mask.sum(dim=1).clamp(min=1)

    def mean_over_completions(per_token: Tensor, lengths: Tensor | float = own_lengths) -> Tensor:
        return ((per_token * mask).sum(dim=1) / lengths).mean()

    advantages = advantages.float()[:, None]
    log_rho = logprobs - old_logprobs.detach()
    if ratio == "sequence":
        log_rho = log_rho.sum(dim=1, keepdim=True) / own_lengths[:, None]  # [N, 1]
    rho = log_rho.exp()
    gain = torch.minimum(rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages)
    per_token_loss = -gain

    stats = {}
    if beta != 0:
        assert ref_logprobs is not None, "a KL penalty needs the reference's log-probs"
        log_ref_ratio = ref_logprobs.float().masked_fill(~mask, 0).detach() - logprobs
        kl = log_ref_ratio.exp() - log_ref_ratio - 1
        per_token_loss = per_token_loss + beta * kl
        stats["kl"] = mean_over_completions(kl.detach())

    clipped = ((advantages > 0) & (rho > 1 + clip_high)) | ((advantages < 0) & (rho < 1 - clip_low))
    stats["clip_fraction"] = mean_over_completions(clipped.float())
    return mean_over_completions(per_token_loss, own_lengths if length is None else length), stats


def loss_length(mask: Tensor, loss_average: str, max_new_tokens: int) -> float | None:
    """What grpo_loss divides the sum over each completion's tokens by, for the completions [N, T] of a whole step.

        completion   None: by its own length, so that all completions weigh the same    arXiv 2402.03300, equation 3
        token        the mean length over all ranks, so that all tokens do              DAPO, arXiv 2503.14476
        constant     the longest possible length, the same in all steps                 Dr. GRPO, arXiv 2503.20783

    Every rank has to call it, with as many completions as the others.
    """
    if loss_average == "token":
        return mean_length(mask)
    return float(max_new_tokens) if loss_average == "constant" else None


def score_completions(texts: list[str], questions: list[Question], template: str) -> tuple[Tensor, Tensor]:
    """Accuracy and format reward of B * G texts, G about each of B questions in turn, [B, G] each, on the CPU."""
    answers = [question.known_answer for question in questions for _ in range(len(texts) // len(questions))]
    accuracy = torch.tensor([accuracy_reward(text, answer) for text, answer in zip(texts, answers)])
    format_ = torch.tensor([format_reward(text, template) for text in texts])
    return accuracy.view(len(questions), -1), format_.view(len(questions), -1)


@dataclass
class Rollout:
    """Prompts with their groups of completions, and all that stays fixed while the policy learns from them."""

    prompt: Prompt  # of N / G questions
    completions: Tensor  # [N, T]
    mask: Tensor  # [N, T]
    advantages: Tensor  # [N]
    ref_logprobs: Tensor | None  # [N, T]; None without a KL penalty
    old_logprobs: Tensor | None  # [N, T]; None where the policy has not changed since it sampled


def accumulate_gradients(
    ddp_policy: DistributedDataParallel, rollouts: list[Rollout], args, length: float | None = None
) -> dict[str, float]:
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
                length,
                args.ratio,
            )
            (loss / len(rollouts)).backward()
        stats |= {"loss": loss, "entropy": entropy.sum() / rollout.mask.sum()}
        for name, value in stats.items():
            sums[name] += value.item() / len(rollouts)
    return sums


def make_reference(args, policy):
    """The frozen starting checkpoint, which the KL penalty pulls towards; None without one. Shares a frozen tower.

    With LoRA it is the policy itself, to be called with its adapter off.
    """
    if args.beta == 0:
        return None
    if args.lora_rank:
        return policy
    shared = {id(policy.model.audio_tower): policy.model.audio_tower} if args.freeze_audio_tower else {}
    return copy.deepcopy(policy, shared).requires_grad_(False)


# ---- the loop ----


def train(args: argparse.Namespace, run: Run, device: torch.device) -> None:
    """The whole run: load, score, loop over steps, save, score again."""
    policy, processor = load_policy_to_train(args, device)
    reference = make_reference(args, policy)
    learner = start(args, run, policy, processor, device)
    stop_ids = stop_token_ids(policy, processor)
    decoder = GroupDecoder(policy, args.group_size, args.max_new_tokens, args.cuda_graph == "on")
    bar = progress_bar(args, learner, "GRPO")

    # 1. Questions: this rank's share of the step's batch, B of them.
    for step, lr, batch, prompt, clock in steps_to_take(args, run, learner, device):
        # 2. G completions of each.
        with clock("sample"):
            sizes = args.group_size, args.max_new_tokens
            completions, mask = sample_group(
                policy, prompt, *sizes, args.temperature, stop_ids, learner.generator, decoder
            )

        # 3. Rewards and advantages, [B, G].
        texts = decode_text(processor, completions, mask)
        accuracy, format_ = score_completions(texts, batch, args.template)
        rewards = accuracy + format_
        advantages = group_advantages(rewards, args.normalize_std == "on")

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
                    with clock("reference"), adapter_off(policy):
                        ref_logprobs, _ = completion_logprobs(reference, *inputs, args.temperature)
                if args.updates_per_rollout > 1:
                    with clock("train"):
                        old_logprobs, _ = completion_logprobs(policy, *inputs, args.temperature)
            rollouts.append(Rollout(*inputs, advantages.flatten()[rows].to(device), ref_logprobs, old_logprobs))

        # 5. Updates. With a single one the policy is still the one that sampled: its ratio is 1, nothing is clipped.
        #    (With several, dropout of an adapter puts its noise into the ratio.)
        length, updates = loss_length(mask, args.loss_average, args.max_new_tokens), []
        for _ in range(args.updates_per_rollout):
            with clock("train"), dropout_on(policy):
                updates.append(accumulate_gradients(learner.ddp_policy, rollouts, args, length))
            with clock("update"):
                grad_norm = update(args, learner, step, lr, updates[-1]["loss"])  # clips the gradient first

        # 6. Metrics and completions.
        metrics = {"kl": None} | {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        metrics |= {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(dim=1).mean().item(),  # within groups: what advantages are made of
            "accuracy": accuracy.mean().item(),
            "format": format_.mean().item(),
            "completion_tokens": mask.sum(dim=1).float().mean().item(),
            "equal_reward_groups": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
            "grad_norm": grad_norm,
        }
        metrics, stopping = record_step(args, learner, step, lr, metrics, clock)
        bar.set_postfix({
            "reward": f"{metrics['reward']:.2f}",
            "accuracy": f"{metrics['accuracy']:.2f}",
            "format": f"{metrics['format']:.2f}",
            "kl": "off" if metrics["kl"] is None else f"{metrics['kl']:.3f}",
            "tokens": f"{metrics['completion_tokens']:.1f}",
            "s/step": f"{metrics['seconds']:.2f}",
        })  # fmt: skip
        bar.update()
        if step % args.log_completions_every == 0 and dist.get_rank() == 0:
            prompts = [build_prompt(question, args.template) for question in batch]
            log_completions(Path(args.out) / "completions.jsonl", step, batch, prompts, texts, rewards, advantages)

        # 7. Checkpoint and resume state; only the state if the job is about to be ended.
        save_if_due(args, learner, step, stopping)
        if stopping:
            break

    bar.close()
    finish(args, run, learner, "GRPO")


# ---- command line ----

DEFAULTS = dict(out="runs/<model's name>", lr=1e-6)
# Without --model, these take the place of the defaults, which are the paper's.
TOY = dict(out="runs/toy", steps=360, accumulation_steps=1, max_new_tokens=32, lr=3e-4, dtype="float32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared_settings("Train Qwen2-Audio on audio questions with GRPO.", DEFAULTS, TOY)
    add = partial(add_setting, parser.add_argument_group("GRPO"))
    add("group_size", 8, "completions sampled per question")
    add("temperature", 1.0, "of sampling, and of all log-probs")
    add("beta", 0.04, "weight of the KL penalty; 0 holds no reference model")
    add("clip_low", 0.2, "the ratio is clipped below 1 minus this")
    add("clip_high", 0.2, "the ratio is clipped above 1 plus this")
    ratio = "clipped by token, or one by completion: GSPO, which clips at 3e-4"
    add("ratio", "token", ratio, choices=("token", "sequence"))
    averages = "divide a completion's loss by its length, the step's mean length, or --max_new_tokens"
    add("loss_average", "completion", averages, choices=("completion", "token", "constant"))
    add("normalize_std", "on", "divide advantages by their group's deviation", choices=("on", "off"))
    add("updates_per_rollout", 1, "optimizer steps on each rollout")
    add("log_completions_every", 10, "steps from one entry of completions.jsonl to the next")
    parser.add_argument("--explain", action="store_true", help="print one step with all its numbers; trains no further")
    parser.add_argument("--explain_html", metavar="FILE", help="the same, also as a web page")

    return parse_settings(parser, argv, DEFAULTS, TOY)


if __name__ == "__main__":
    args = parse_args()
    if args.explain or args.explain_html:
        from explain import explain  # here, because it imports the algorithm from this file

        sys.exit(explain(args))
    sys.exit(run_training(args, "grpo_aqa.py", "GRPO", train))
