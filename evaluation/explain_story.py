"""The story of one step of GRPO, which explain.py takes: what the step computed, in words and tables."""

import math
import statistics
from dataclasses import dataclass

from torch import Tensor

from data import Question
from evaluation.explain_page import Colored, Table, Verbatim, num
from model.qwen2_audio import Prompt

# ---- what the step computed ----


@dataclass
class Group:
    """A question with its G completions of up to T tokens, and their rewards."""

    question: Question
    prompt: Prompt  # of this question alone
    completions: Tensor  # [G, T]
    mask: Tensor  # [G, T]
    texts: list[str]
    scores: dict[str, Tensor]  # each reward by name, [1, G]
    rewards: Tensor  # their weighted sum, [1, G]


@dataclass
class Token:
    """A token of a completion and its part of the loss. Log-probs and KL in nats."""

    text: str
    policy: float  # log-prob under the policy that is updated
    old: float  # log-prob under the policy that sampled it
    reference: float | None  # log-prob under the reference; None without a KL penalty
    ratio: float
    clipped: bool
    kl: float | None
    loss: float
    gradient: float  # of the step's loss with respect to `policy`


@dataclass
class Update:
    """One update of the policy."""

    number: int  # from 1
    tokens: list[list[Token]]  # by completion
    stats: dict[str, float]  # of accumulate_gradients: loss, kl, clip_fraction, entropy
    grad_norm: float  # before clipping


@dataclass
class Step:
    """Everything that a training step on one question computed."""

    group: Group
    looked_at: int  # questions for which a group was sampled
    prompt_text: str
    audio_tokens: int  # of the prompt
    advantages: list[float]  # [G]
    length: float | None  # what a completion's loss is divided by; None: its own length
    updates: list[Update]
    before: list[float]  # log-prob of each whole completion before the first update, [G]
    after: list[float]  # and after the last update


def completion_loss(tokens: list[Token], length: float | None) -> float:
    """Return the loss of one completion. length: what its sum is divided by; None: its own length."""
    return sum(token.loss for token in tokens) / (length or len(tokens))


# ---- the story ----


def tell(step: Step, args) -> list[tuple[str, list]]:
    """Tell the step in parts: (title, blocks). A block is a paragraph (str) or one of explain_page's classes."""
    shown = max(range(args.group_size), key=lambda i: (round(abs(step.advantages[i]), 4), step.advantages[i]))
    parts = [("The prompt", _prompt(step, args)), ("The group", _group(step, args))]
    for update in step.updates:
        which = f" (update {update.number} of {len(step.updates)})" if len(step.updates) > 1 else ""
        parts.append((f"Completion {shown + 1}, token by token{which}", _tokens(step, update, shown, args)))
        parts.append((f"The loss{which}", _loss(step, update, args)))
    parts.append(("What the step did", _effect(step)))
    return [(f"{number}. {title}", blocks) for number, (title, blocks) in enumerate(parts, start=1)]


def _prompt(step: Step, args) -> list:
    group, looked_at, equal = step.group, step.looked_at, not any(step.advantages)
    tokens, frames = group.prompt["input_ids"].shape[1], int(group.prompt["feature_attention_mask"].sum())
    why = f"Training takes several questions per step. This step takes one question, with id {group.question.id}. "
    if equal:
        why += (
            f"It is the first of {args.data} in the data order. In each of the first {looked_at} groups all rewards "
            "are equal, so every advantage is 0: no completion is better than another."
        )
    elif looked_at == 1:
        why += f"It is the first of {args.data} in the data order. The rewards of its completions differ."
    else:
        why += (
            f"It is the first of {args.data}, in the data order, with completions whose rewards differ. The "
            f"{looked_at - 1} questions before it have equal rewards: their advantages are 0 and teach nothing."
        )
    counts = f"{tokens} tokens: {step.audio_tokens} of audio and {tokens - step.audio_tokens} of text. "
    clip = f"The clip, {group.question.audio}, has {frames} mel frames of 10 ms, four per audio token. "
    return [why, Verbatim(step.prompt_text.strip()), f"{counts}{clip}The right answer is: {group.question.answer}"]


def _group(step: Step, args) -> list:
    group, rewards = step.group, step.group.rewards[0].tolist()
    rows: list[tuple[str, ...]] = [("", "completion", "tokens", *group.scores, "reward", "advantage")]
    for i, text in enumerate(group.texts):
        numbers = [f"{score[0, i].item():g}" for score in group.scores.values()] + [f"{rewards[i]:g}"]
        size = str(len(step.updates[0].tokens[i]))
        rows.append((f"{i + 1}", repr(text), size, *numbers, num(step.advantages[i], signed=True)))
    weighted = [name if weight == 1 else f"{weight:g} * {name}" for name, weight in args.reward_weights.items()]
    formula = "advantage = (reward - mean) / (deviation + 0.0001)"
    if not args.normalize_std:
        formula = "advantage = reward - mean, without division by the deviation (--normalize_std off, as in Dr. GRPO)"
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    meaning = (
        "A completion above the mean has a positive advantage: training makes its tokens likelier. A completion below "
        "the mean has a negative advantage. All tokens of a completion share its advantage."
    )
    return [
        f"{args.group_size} completions, sampled at temperature {args.temperature:g}, and their rewards:",
        Table(rows, left=(1,)),
        Verbatim(f"reward    = {' + '.join(weighted)}\n{formula}"),
        f"The group's mean reward is {num(mean)}, its deviation {num(deviation)}. {meaning}",
    ]


def _tokens(step: Step, update: Update, shown: int, args) -> list:
    low, high = f"{1 - args.clip_low:g}", f"{1 + args.clip_high:g}"
    kl = args.beta != 0
    if args.ratio == "sequence":
        formulas = ["ratio     = exp(mean of policy - old over the completion), the same for all its tokens (GSPO)"]
    else:
        formulas = ["ratio     = exp(policy - old)"]
    formulas += ["KL        = exp(reference - policy) - (reference - policy) - 1"] * kl
    formulas += [f"loss term = -min(ratio * A, clip(ratio, {low}, {high}) * A)" + f" + {args.beta:g} * KL" * kl]
    if not kl:
        formulas += ["            without a KL term, and without a reference (--beta 0)"]
    columns = ("token", "policy", "old", *["reference"] * kl, "ratio", "clipped", *["KL"] * kl)
    columns += ("loss term", "gradient")
    tokens, advantage = update.tokens[shown], step.advantages[shown]
    colored = [[(token.text, token.clipped, _cells(token, 6)) for token in completion] for completion in update.tokens]
    which = f"No advantage is further from 0 than this completion's, A = {num(advantage, signed=True)}. "
    models = "the policy, the policy when it sampled (old)"
    models += " and the frozen starting model (reference)" if kl else ""
    gradient = (
        "The gradient is that of the loss with respect to the policy's log-prob. If it is negative, a step down the "
        "loss raises the log-prob."
    )
    return [
        f"{which}The table has log-probs under {models}.",
        Verbatim("\n".join(formulas)),
        Table([columns, *(_cells(token, 4) for token in tokens)], left=(0,), cut=True),
        gradient,
        _about_ratios(update, args),
        Colored(columns, colored, step.advantages),
    ]


def _cells(token: Token, digits: int) -> tuple[str, ...]:
    reference = [] if token.reference is None else [num(token.reference, digits)]
    kl = [] if token.kl is None else [num(token.kl, digits)]
    return (
        repr(token.text),
        num(token.policy, digits),
        num(token.old, digits),
        *reference,
        num(token.ratio, digits),
        "yes" if token.clipped else "no",
        *kl,
        num(token.loss, digits),
        num(token.gradient, digits + 1),
    )


def _about_ratios(update: Update, args) -> str:
    tokens = [token for completion in update.tokens for token in completion]
    ratios, clipped = [token.ratio for token in tokens], sum(token.clipped for token in tokens)
    what = (
        f"Over all {len(update.tokens)} completions the ratio is between {num(min(ratios))} and {num(max(ratios))}. "
        f"{clipped} of {len(tokens)} tokens are clipped. "
    )
    if update.number > 1:
        what += "LoRA's dropout adds noise to the ratio. " if args.lora_dropout else ""
        return (
            f"{what}The policy has moved since it sampled. A token whose ratio has left the range in the direction of "
            "its advantage is clipped: it gets no gradient except that of the KL penalty."
        )
    what += "The policy has not changed since it sampled, so the ratio is 1 and nothing is clipped."
    if args.updates_per_rollout == 1:
        what += " --updates_per_rollout 2 shows a second update, with other ratios."
    if args.beta != 0:
        what += " The reference is the policy before its first step, so the KL is 0 as well."
    return what


def _loss(step: Step, update: Update, args) -> list:
    divisor = {
        "completion": "its own length",
        "token": "the step's mean length, so that all tokens weigh the same (--loss_average token, as in DAPO)",
        "constant": "--max_new_tokens, whatever its length (--loss_average constant, as in Dr. GRPO)",
    }[args.loss_average]
    rows: list[tuple[str, ...]] = [("", "tokens", "sum of loss terms", "divided by", "loss")]
    for i, tokens in enumerate(update.tokens, start=1):
        total, size = sum(token.loss for token in tokens), step.length or len(tokens)
        rows.append((f"{i}", f"{len(tokens)}", num(total), f"{size:g}", num(completion_loss(tokens, step.length))))
    mean = statistics.fmean(completion_loss(tokens, step.length) for tokens in update.tokens)
    result = (
        f"loss = mean over the {args.group_size} completions = {num(mean, 6)}. The training loop's own value, from "
        f"accumulate_gradients, is {num(update.stats['loss'], 6)}: equal up to rounding."
    )
    blocks = [f"The sum of a completion's loss terms is divided by {divisor}.", Table(rows, left=()), result]
    if update.number == 1:
        blocks.append(
            "The value says little: while every ratio is 1, a loss term is minus the advantage, and the advantages of "
            "a group add up to 0. The policy learns from the gradient."
        )
    scaled = f"below --max_grad_norm {args.max_grad_norm:g}, so it is not clipped"
    if update.grad_norm > args.max_grad_norm:
        scaled = f"clipped to --max_grad_norm {args.max_grad_norm:g}"
    adam = " AdamW's first step moves each weight by about the learning rate, whatever its gradient."
    blocks.append(
        f"The gradient over all trained weights has norm {num(update.grad_norm)}, {scaled}. AdamW takes a step at "
        f"learning rate {args.lr:g}." + adam * (update.number == 1)
    )
    return blocks


def _effect(step: Step) -> list:
    headings = ("", "completion", "advantage", "log-prob before", "after", "probability before", "after", "factor")
    rows: list[tuple[str, ...]] = [headings]
    for i, (old, new, advantage) in enumerate(zip(step.before, step.after, step.advantages)):
        numbers = [f"{x:.4g}" for x in (math.exp(old), math.exp(new), math.exp(new - old))]
        text = repr(step.group.texts[i])
        rows.append((f"{i + 1}", text, num(advantage, signed=True), num(old), num(new), *numbers))
    changes = [new - old for old, new in zip(step.before, step.after)]
    better = [change > 0 for change, advantage in zip(changes, step.advantages) if advantage > 0]
    worse = [change < 0 for change, advantage in zip(changes, step.advantages) if advantage < 0]
    updates = "The update" if len(step.updates) == 1 else f"The {len(step.updates)} updates"
    what = f"{updates} changed the probability of each whole completion (the product over its tokens):"
    counts = (
        f"{sum(better)} of {len(better)} completions with a positive advantage became likelier. {sum(worse)} of "
        f"{len(worse)} with a negative advantage became less likely."
    )
    blocks = [what, Table(rows, left=(1,)), counts]
    if not all(better + worse):
        blocks.append(
            "The others went the wrong way. Completions share the weights, so one completion's gradient moves the "
            "others as well. And the gradient holds at the start of a step, not all along it."
        )
    return blocks
