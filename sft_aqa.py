"""Supervised fine-tuning for audio question answering: the baseline that GRPO is compared with.

Questions, prompts, ranks, optimizer, checkpoints and metrics are those of grpo_aqa.py. One step:

    1. take B questions with their clips               data.py         ids [B, P], mel [B, mels, F]
    2. their right answers as completions              data.py         <answer>...</answer>, end of turn: [B, T]
    3. log-probs of the policy                         policy.py       [B, T]
    4. mean of -log-prob over target tokens, backward  here            scalar
    5. clip the gradient, AdamW                        training/       weights

    python sft_aqa.py                     the toy, on a CPU
    torchrun --nproc_per_node 8 sft_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs --skip_bad_audio

Shapes: B questions per rank, P prompt tokens, T target tokens, F mel frames.
"""

import argparse
import sys
from contextlib import nullcontext
from functools import partial

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import step_indices, target_text
from infra.processes import mean_length
from model.lora import dropout_on
from model.qwen2_audio import Prompt, slice_prompt
from policy import data_parallel, encode_targets
from training.optimizer import ShardedAdamW, clip_scale, trainable
from training.run import Run, run_training
from training.settings import LR, TOY, TOY_LR, parse_settings, shared_settings

# ---- the algorithm ----


def sft_loss(logprobs: Tensor, mask: Tensor, length: float) -> Tensor:
    """Compute the cross-entropy of target tokens in nats. logprobs, mask: [N, T].

    length: mean number of target tokens over all parts and ranks of the step, so that every token weighs the same.
    """
    return -(logprobs.masked_fill(~mask, 0).sum(dim=1) / length).mean()  # [N, T] -> [N] -> scalar


def accumulate_gradients(
    ddp_policy: DistributedDataParallel, parts: list[tuple[Prompt, Tensor, Tensor]], length: float
) -> dict[str, float]:
    """Run log-probs, loss and backward for parts of equal size, one after the other. Return mean loss and entropy.

    parts: prompts, targets and mask, as completion_logprobs takes them. Leaves the gradient of the mean loss over the
    target tokens of all parts and ranks in the parameters.
    """
    metrics = {"loss": 0.0, "entropy": 0.0}
    for part in parts:
        with nullcontext() if part is parts[-1] else ddp_policy.no_sync():  # ranks average once, in the last backward
            logprobs, entropy = ddp_policy(*part, 1.0)
            loss = sft_loss(logprobs, part[-1], length)
            (loss / len(parts)).backward()
        metrics["loss"] += loss.item() / len(parts)
        metrics["entropy"] += entropy.sum().item() / len(entropy) / length / len(parts)
    return metrics


# ---- the loop ----


def train(args: argparse.Namespace, run: Run) -> None:
    """Fine-tune the policy on the right answers. `run` does what is not the algorithm, as in grpo_aqa.train."""
    # Policy, gradients averaged over the ranks, optimizer.
    policy, processor = run.load_policy()
    ddp_policy = data_parallel(policy, run.first_prompt(), args.gradient_checkpointing)
    optimizer = ShardedAdamW(trainable(policy))

    # The data order: GRPO's.
    order = partial(step_indices, len(run.questions), prompts_per_rank=args.prompts_per_rank, rank=dist.get_rank(),
                    seed=args.seed)  # fmt: skip
    run.start(optimizer, order)

    for step in run.steps():
        lr = args.lr * (1 - (step - 1) / args.steps)  # linear decay to 0

        # 1. Questions: B of them, this rank's share of the step.
        questions, prompt = run.next_batch()

        # 2. Their right answers, [B, T], split into equal parts (gradient accumulation).
        texts = [target_text(question.known_answer, args.template) for question in questions]
        targets, mask = (tensor.to(run.device) for tensor in encode_targets(processor, texts))
        size = args.prompts_per_rank // args.accumulation_steps
        starts = range(0, args.prompts_per_rank, size)
        parts = [(slice_prompt(prompt, i, i + size), targets[i : i + size], mask[i : i + size]) for i in starts]

        # 3. and 4. Log-probs, loss, backward.
        length = mean_length(mask)
        with run.clock("train"), dropout_on(policy):
            metrics = accumulate_gradients(ddp_policy, parts, length)

        # 5. Clip the gradient to a global norm, and take a step of AdamW.
        with run.clock("update"):
            grad_norm = optimizer.grad_norm()
            run.require_finite(metrics["loss"], grad_norm, questions)
            optimizer.step(lr, clip_scale(grad_norm, args.max_grad_norm))

        # Metrics, checkpoint, resume state.
        metrics |= {"grad_norm": grad_norm, "completion_tokens": length}
        run.record(lr, metrics, shown=["loss", "seconds"])
        run.save_if_due()
    run.finish()


# ---- command line ----

DEFAULTS = dict(out="runs/<model's name>_sft", lr=LR["sft_aqa.py"])
TOY_DEFAULTS = TOY | dict(out="runs/toy_sft", lr=TOY_LR["sft_aqa.py"])  # in their place without --model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared_settings("Fine-tune Qwen2-Audio on the right answers to audio questions.", DEFAULTS, TOY_DEFAULTS)
    args = parse_settings(parser, argv, DEFAULTS, TOY_DEFAULTS)
    if args.template == "think":
        parser.error("--template think has no targets: question files hold answers without thoughts")
    return args


if __name__ == "__main__":
    sys.exit(run_training(parse_args(), "sft_aqa.py", "SFT", train))
