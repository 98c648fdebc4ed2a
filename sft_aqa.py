"""Supervised fine-tuning for audio question answering: the baseline that GRPO is compared with.

The same questions, prompts, processes, optimizer, checkpoints and metrics as grpo_aqa.py, from training.py. One step:

    take B questions                       data.py        prompts, with audio
    their right answers as completions     data.py        <answer>...</answer> and the end of the turn, [B, T]
    log-probs of the policy                policy.py      [B, T]
    mean of -log-prob over target tokens   here           scalar
    backward, average over ranks           here
    AdamW                                  optimizer.py

    python sft_aqa.py                                  the toy, on a CPU
    torchrun --nproc_per_node 8 sft_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs

Shapes: B questions per rank, T target tokens.
"""

import argparse
import sys
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import target_text
from lora import dropout_on
from policy import Prompt, encode_targets, slice_prompt
from runtime import mean_length
from training import (
    Run,
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


def sft_loss(logprobs: Tensor, mask: Tensor, length: float) -> Tensor:
    """The cross-entropy of target tokens, in nats. logprobs, mask: [N, T].

    `length` is the mean number of target tokens over all that is averaged, of other parts and ranks too: so each token
    counts alike, wherever it is.
    """
    return -(logprobs.masked_fill(~mask, 0).sum(dim=1) / length).mean()


def accumulate_gradients(
    ddp_policy: DistributedDataParallel, parts: list[tuple[Prompt, Tensor, Tensor]], length: float
) -> dict[str, float]:
    """Backward through the loss of equally many questions at a time. Returns the mean loss and entropy.

    parts: prompts, targets and mask as completion_logprobs takes them. Leaves in the parameters the gradient of the
    mean loss over the target tokens of all parts and ranks.
    """
    metrics = {"loss": 0.0, "entropy": 0.0}
    for part in parts:
        with nullcontext() if part is parts[-1] else ddp_policy.no_sync():  # one exchange, with the last part
            logprobs, entropy = ddp_policy(*part, 1.0)
            loss = sft_loss(logprobs, part[-1], length)
            (loss / len(parts)).backward()
        metrics["loss"] += loss.item() / len(parts)
        metrics["entropy"] += entropy.sum().item() / len(entropy) / length / len(parts)
    return metrics


def train(args: argparse.Namespace, run: Run, device: torch.device) -> None:
    """The whole run: load, score, loop over steps, save, score again."""
    policy, processor = load_policy_to_train(args, device)
    learner = start(args, run, policy, processor, device)
    bar = progress_bar(args, learner, "SFT")

    # 1. Questions: this rank's share of the step's batch, B of them.
    for step, lr, batch, prompt, clock in steps_to_take(args, run, learner, device):
        # 2. Their answers, [B, T], in equal parts: one forward and backward each (gradient accumulation).
        texts = [target_text(question.known_answer, args.template) for question in batch]
        targets, mask = (tensor.to(device) for tensor in encode_targets(processor, texts))
        size = args.prompts_per_rank // args.accumulation_steps
        starts = range(0, args.prompts_per_rank, size)
        parts = [(slice_prompt(prompt, i, i + size), targets[i : i + size], mask[i : i + size]) for i in starts]

        # 3. The gradient of the mean over all target tokens of the step, and the update.
        length = mean_length(mask)
        with clock("train"), dropout_on(policy):
            metrics = accumulate_gradients(learner.ddp_policy, parts, length)
        with clock("update"):
            metrics["grad_norm"] = update(args, learner, step, lr, metrics["loss"])  # clips the gradient first

        # 4. Metrics, checkpoint, resume state.
        metrics["completion_tokens"] = length
        metrics, stopping = record_step(args, learner, step, lr, metrics, clock)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", **{"s/step": f"{metrics['seconds']:.2f}"})
        bar.update()
        save_if_due(args, learner, step, stopping)
        if stopping:
            break

    bar.close()
    finish(args, run, learner, "SFT")


# ---- command line ----

DEFAULTS = dict(out="runs/<model's name>_sft", lr=1e-5)
# Without --model, these take their place. The toy's base model and questions are GRPO's.
TOY = dict(out="runs/toy_sft", steps=360, accumulation_steps=1, max_new_tokens=32, lr=1e-3, dtype="float32")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = shared_settings("Train Qwen2-Audio on audio questions by supervised fine-tuning.", DEFAULTS, TOY)
    args = parse_settings(parser, argv, DEFAULTS, TOY)
    if args.template == "think":
        parser.error("--template think has no targets: question files hold answers without thoughts")
    return args


if __name__ == "__main__":
    sys.exit(run_training(parse_args(), "sft_aqa.py", "SFT", train))
