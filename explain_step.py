"""One training step of GRPO on one question, with all that it computes on the way, for explain.py to tell.

Every number comes from the functions that training uses. The loss is then taken apart into its tokens a second time,
one scalar after the other, and compared with the training loop's: a difference raises.
"""

import math
import re
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from data import AUDIO_TOKEN, Question, step_indices
from errors import InputError
from grpo_aqa import (
    Rollout,
    accumulate_gradients,
    group_advantages,
    loss_length,
    make_reference,
    score_completions,
)
from lora import adapter_off, dropout_on
from optimizer import ShardedAdamW
from policy import (
    Prompt,
    completion_logprobs,
    decode_text,
    listen,
    sample_group,
    stop_token_ids,
    to_device,
)
from runtime import data_parallel
from training import encode_batches, recomputes_layers

LOOK_THROUGH = 16  # questions, for one whose completions have different rewards


@dataclass
class Group:
    """A question with its G completions, T tokens long, and their rewards."""

    question: Question
    prompt: Prompt  # of this question alone
    completions: Tensor  # [G, T]
    mask: Tensor  # [G, T]
    texts: list[str]
    accuracy: Tensor  # rewards, [1, G]
    format_: Tensor  # rewards, [1, G]

    @property
    def rewards(self) -> Tensor:
        return self.accuracy + self.format_


@dataclass
class Token:
    """A completion's token and what it adds to the loss. Log-probs and KL in nats."""

    text: str
    policy: float  # log-prob under the policy that is updated
    old: float  # under the policy that sampled it
    reference: float | None  # under the reference; None without a KL penalty
    ratio: float
    clipped: bool
    kl: float | None
    loss: float
    gradient: float  # of the step's loss with respect to `policy`


@dataclass
class Update:
    number: int  # 1 for the first
    tokens: list[list[Token]]  # of each completion
    stats: dict[str, float]  # what accumulate_gradients returns: loss, kl, clip_fraction, entropy
    grad_norm: float  # before clipping


@dataclass
class Step:
    group: Group
    looked_at: int  # questions for which a group was sampled
    prompt_text: str
    audio_tokens: int  # of the prompt's
    advantages: list[float]  # [G]
    length: float | None  # what a completion's loss is divided by; None for its own length
    updates: list[Update]
    before: list[float]  # log-prob of each whole completion before the first update, [G]
    after: list[float]  # and after the last one


def choose_group(args, policy, processor, questions: list[Question], device) -> tuple[Group, int]:
    """Sample a group for each of the first questions that training takes, up to one whose rewards differ.

    Returns that group, or the first where there is none, and for how many questions one was sampled.
    """
    seed = args.seed * 100_003  # the run's on rank 0
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    stop_ids, first, bad_clips = stop_token_ids(policy, processor), None, dict[str, str]()
    count = min(LOOK_THROUGH, len(questions))
    for number, i in enumerate(step_indices(len(questions), 0, count, 0, args.seed), start=1):
        [question], prompt = next(encode_batches(args, processor, questions, iter([[questions[i]]]), bad_clips))
        if question is not questions[i]:
            print(f"{questions[i].place}: {bad_clips[questions[i].place]}; another question takes its place")
        prompt = to_device(prompt, device)
        if args.freeze_audio_tower:
            prompt = listen(policy, prompt)
        sampling = args.group_size, args.max_new_tokens, args.temperature, stop_ids, generator
        completions, mask = sample_group(policy, prompt, *sampling)
        texts = decode_text(processor, completions, mask)
        rewards = score_completions(texts, [question], args.template)
        group = Group(question, prompt, completions, mask, texts, *rewards)
        if (group.rewards != group.rewards[0, 0]).any():
            return group, number
        first = first or group
    assert first is not None, "there are no questions"
    return first, count


def take_step(args, policy, processor, questions: list[Question], device: torch.device) -> Step:
    """A training step on one question, as grpo_aqa.train takes it, with all that it computed on the way.

    Changes the policy. Raises RuntimeError if the tokens' terms do not add up to the loss that trained it.
    """
    reference = make_reference(args, policy)
    group, looked_at = choose_group(args, policy, processor, questions, device)
    inputs = group.prompt, group.completions, group.mask
    ddp_policy = data_parallel(policy, group.prompt, recomputes_layers(args, device))
    optimizer = ShardedAdamW({name: p for name, p in policy.named_parameters() if p.requires_grad})

    advantages = group_advantages(group.rewards, args.normalize_std == "on")[0]
    ref_logprobs = None
    with torch.no_grad():
        if reference is not None:
            with adapter_off(policy):
                ref_logprobs, _ = completion_logprobs(reference, *inputs, args.temperature)
        before, _ = completion_logprobs(policy, *inputs, args.temperature)
    old_logprobs = before if args.updates_per_rollout > 1 else None
    rollout = Rollout(*inputs, advantages.to(device), ref_logprobs, old_logprobs)
    length = loss_length(group.mask, args.loss_average, args.max_new_tokens)

    seen, updates = [], []  # seen: the log-probs that the training loop's own forward pass returns, dropout and all
    hook = ddp_policy.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].detach()))
    words = [[_word(processor, i) for i in row[valid]] for row, valid in zip(group.completions, group.mask)]
    for number in range(1, args.updates_per_rollout + 1):
        with dropout_on(policy):
            stats = accumulate_gradients(ddp_policy, [rollout], args, length)
        old = seen[-1] if old_logprobs is None else old_logprobs
        tokens = take_apart(args, words, seen[-1], old, ref_logprobs, advantages, length)
        check_sums(tokens, stats, length)
        try:
            grad_norm = optimizer.step(args.lr, args.max_grad_norm)
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
    """grpo_loss written out for each token of each completion, as in its docstring.

    words: the texts of each completion's tokens; logprobs, old_logprobs, ref_logprobs: [G, T]; advantages: [G].
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


def completion_loss(tokens: list[Token], length: float | None) -> float:
    return sum(token.loss for token in tokens) / (length or len(tokens))


def check_sums(completions: list[list[Token]], stats: dict[str, float], length: float | None) -> None:
    """Raise RuntimeError unless tokens that were taken apart add up to what accumulate_gradients returned."""
    mine = {"loss": [completion_loss(tokens, length) for tokens in completions]}
    mine["clip_fraction"] = [statistics.fmean(token.clipped for token in tokens) for tokens in completions]
    if "kl" in stats:
        mine["kl"] = [statistics.fmean(token.kl for token in tokens) for tokens in completions]  # type: ignore[misc]
    for name, values in mine.items():
        mean, largest = statistics.fmean(values), max(map(abs, values))
        if not abs(mean - stats[name]) <= 1e-5 * (1 + largest):  # float32 rounds; NaN is no match
            raise RuntimeError(f"{name}: the tokens add up to {mean}, and the training loop has {stats[name]}")
