"""One step of GRPO as a story with real numbers: what `python grpo_aqa.py --explain` prints.

The step is explain_step.py's; here it is told, part by part. explain_page.py makes text and a page of that. Nothing is
written to the run folder but the cache of what is known about clips.
"""

import math
import statistics
from pathlib import Path

import torch.distributed as dist

from explain_page import Colored, Table, Verbatim, num, to_html, to_text
from explain_step import Step, Token, Update, completion_loss, take_step
from files import write_text
from runtime import SharedInputError, finish_together, launchers, setup_distributed
from training import load_policy_to_train, prepare

# ---- the story ----


def tell(step: Step, args) -> list[tuple[str, list]]:
    """The step as parts: (title, blocks), a block being a paragraph or one of explain_page's."""
    shown = max(range(args.group_size), key=lambda i: (round(abs(step.advantages[i]), 4), step.advantages[i]))
    parts = [("The prompt", _prompt(step, args)), ("The group", _group(step, args))]
    for update in step.updates:
        which = f" (update {update.number} of {len(step.updates)})" if len(step.updates) > 1 else ""
        parts.append((f"Completion {shown + 1}, token by token{which}", _tokens(step, update, shown, args)))
        parts.append((f"The loss{which}", _loss(step, update, args)))
    parts.append(("What it did", _effect(step)))
    return [(f"{number}. {title}", blocks) for number, (title, blocks) in enumerate(parts, start=1)]


def _prompt(step: Step, args) -> list:
    group, looked_at, equal = step.group, step.looked_at, not any(step.advantages)
    tokens, frames = group.prompt["input_ids"].shape[1], int(group.prompt["feature_attention_mask"].sum())
    why = f"A step of training takes several questions; this one takes one, with id {group.question.id}. It is the "
    if equal:
        why += (
            f"first of {args.data} in the order of training. All completions of each of the first {looked_at} "
            "questions have equal rewards, so every advantage is 0, and no completion is told from another."
        )
    elif looked_at == 1:
        why += f"first of {args.data} in the order of training. Its completions have different rewards: they can teach."
    else:
        why += (
            f"first of {args.data}, in the order of training, whose completions have different rewards. Those before, "
            f"{looked_at - 1}, are passed over: equal rewards give advantages of 0, and nothing to learn."
        )
    counts = f"{tokens} tokens: {step.audio_tokens} of audio and {tokens - step.audio_tokens} of text. "
    clip = f"The clip, {group.question.audio}, has {frames} mel frames of 10 ms, four to an audio token. "
    return [why, Verbatim(step.prompt_text.strip()), f"{counts}{clip}The right answer is: {group.question.answer}"]


def _group(step: Step, args) -> list:
    group, rewards = step.group, step.group.rewards[0].tolist()
    accuracy, format_ = group.accuracy[0].tolist(), group.format_[0].tolist()
    rows: list[tuple[str, ...]] = [("", "completion", "tokens", "accuracy", "format", "reward", "advantage")]
    for i, text in enumerate(group.texts):
        numbers = [f"{value:.0f}" for value in (accuracy[i], format_[i], rewards[i])]
        size = str(len(step.updates[0].tokens[i]))
        rows.append((f"{i + 1}", repr(text), size, *numbers, num(step.advantages[i], signed=True)))
    formula = "advantage = (reward - mean) / (deviation + 0.0001)"
    if args.normalize_std == "off":
        formula = "advantage = reward - mean, without division by the deviation (--normalize_std off, as in Dr. GRPO)"
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    meaning = (
        "A completion that is better than its group's mean has a positive advantage: its tokens are to become "
        "likelier. One that is worse has a negative one. All tokens of a completion have the same."
    )
    return [
        f"{args.group_size} completions, sampled at temperature {args.temperature:g}, and their rewards:",
        Table(rows, left=(1,)),
        Verbatim(f"reward    = accuracy + format\n{formula}"),
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
        "The gradient is that of the loss with respect to the log-prob under the policy: where it is negative, going "
        "down the loss raises the log-prob."
    )
    return [
        f"{which}Log-probs are under {models}.",
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
        f"In all {len(update.tokens)} completions the ratio is from {num(min(ratios))} to {num(max(ratios))}, and "
        f"{clipped} of {len(tokens)} tokens are clipped"
    )
    if update.number > 1:
        return (
            f"{what}. The policy has moved since it sampled. Where the ratio has left the range in the direction that "
            "the advantage asks for, clipping leaves the token no gradient but that of the KL penalty, if there is one."
        )
    if args.lora_dropout:
        what += " (dropout of the adapter is noise in it)"
    what += ". The policy has not changed since it sampled, so the ratio is 1 and clipping idles"
    if args.updates_per_rollout == 1:
        what += "; --updates_per_rollout 2 shows a second update, in which it is not"
    if args.beta != 0:
        what += ". The reference is the policy before its first step, so the KL is 0 as well"
    return what + "."


def _loss(step: Step, update: Update, args) -> list:
    how = {
        "completion": "its own length",
        "token": "the step's mean length, so that all tokens weigh alike (--loss_average token, as in DAPO)",
        "constant": "--max_new_tokens, whatever its length (--loss_average constant, as in Dr. GRPO)",
    }[args.loss_average]
    rows: list[tuple[str, ...]] = [("", "tokens", "sum of loss terms", "divided by", "loss")]
    for i, tokens in enumerate(update.tokens, start=1):
        total, size = sum(token.loss for token in tokens), step.length or len(tokens)
        rows.append((f"{i}", f"{len(tokens)}", num(total), f"{size:g}", num(completion_loss(tokens, step.length))))
    mean = statistics.fmean(completion_loss(tokens, step.length) for tokens in update.tokens)
    result = (
        f"loss = mean over the {args.group_size} completions = {num(mean, 6)}. The training loop's own value, from "
        f"accumulate_gradients, is {num(update.stats['loss'], 6)}: the same, but for rounding."
    )
    blocks = [f"The loss terms of a completion are added up and divided by {how}.", Table(rows, left=()), result]
    if update.number == 1:
        blocks.append(
            "The value itself says little: while every ratio is 1, a loss term is minus the advantage, and the "
            "advantages of a group add up to 0. The policy learns from the gradient."
        )
    scaled = f"below --max_grad_norm {args.max_grad_norm:g}, so it stays as it is"
    if update.grad_norm > args.max_grad_norm:
        scaled = f"scaled down to --max_grad_norm {args.max_grad_norm:g}"
    adam = " AdamW's first step moves each weight by about that much, however large its gradient." * (
        update.number == 1
    )
    blocks.append(
        f"The gradient over all weights that are trained has norm {num(update.grad_norm)}, {scaled}. AdamW takes a "
        f"step at learning rate {args.lr:g}.{adam}"
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
    what = f"{updates} changed the probability of each whole completion, the product over its tokens:"
    counts = (
        f"Of {len(better)} with a positive advantage, {sum(better)} became likelier; of {len(worse)} with a negative "
        f"one, {sum(worse)} became less likely."
    )
    blocks = [what, Table(rows, left=(1,)), counts]
    if not all(better + worse):
        blocks.append(
            "The others went the wrong way. Completions share the weights, so that what moves one moves others, and a "
            "step can be longer than the gradient at its start is good for."
        )
    return blocks


# ---- from the command line of grpo_aqa.py ----


def explain(args) -> int:
    """Take one step, print its story and, with --explain_html, write it as a page. Returns the exit status."""
    device = setup_distributed()[-1]

    def work():
        if dist.get_world_size() > 1:
            raise SharedInputError("--explain is for a single process; start it without torchrun")
        if args.resume:
            raise SharedInputError(
                "--explain starts from --model, which may be a checkpoint of a run; leave out --resume"
            )
        run = prepare(args, "GRPO", launchers())
        policy, processor = load_policy_to_train(args, device)
        parts = tell(take_step(args, policy, processor, run.questions, device), args)
        print(to_text(parts), flush=True)
        if args.explain_html:
            try:
                write_text(Path(args.explain_html), to_html(parts, "One step of GRPO"))
            except (OSError, ValueError) as error:
                raise SharedInputError(f"--explain_html {args.explain_html}: cannot be written ({error})") from None
            print(f"\npage: {args.explain_html}")

    return finish_together("grpo_aqa.py", work, interrupted=lambda: "nothing was written")
