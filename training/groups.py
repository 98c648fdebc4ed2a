"""Groups of completions with their rewards, and DAPO's dynamic sampling: replace groups whose rewards are equal.

Shapes: B questions per rank, G completions per question, N = B * G, T completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import Question
from infra.processes import mean_over_ranks
from model.qwen2_audio import Prompt, join_prompts, pick_prompts


@dataclass
class Groups:
    """B questions with their prompts, completions and rewards."""

    questions: list[Question]  # B
    prompt: Prompt  # of B questions
    completions: Tensor  # [N, T]
    mask: Tensor  # [N, T]: True up to and including the end of turn
    sampled_logprobs: Tensor  # [N, T]: the sampler's
    texts: list[str]  # N
    scores: dict[str, Tensor]  # each reward by name, [B, G] on the CPU
    rewards: Tensor  # their weighted sum, [B, G] on the CPU


def equal_rewards(rewards: Tensor) -> Tensor:
    """Tell for each group whether all its rewards are equal, [B, G] -> [B]. If they are, its advantages are 0."""
    return (rewards == rewards[:, :1]).all(dim=1)


def needs_sampling(sampled: list[Groups], more: int) -> bool:
    """Tell whether a step needs a round of sampling: the first one, or one of `more` that replace equal groups.

    sampled: the groups of each round so far. Rounds end when no rank has a group of equal rewards left. All ranks get
    the same answer, because they share the stream of questions.
    """
    if not sampled or len(sampled) > more:
        return not sampled
    rewards = torch.cat([groups.rewards for groups in sampled])
    left = equal_rewards(rewards[choose_groups(sampled)]).any()
    return mean_over_ranks({"left": float(left)}, sampled[0].mask.device)["left"] > 0


def choose_groups(sampled: list[Groups]) -> list[int]:
    """Choose B groups to train on. Return their indices: group b of round r has the index r * B + b.

    A group of the first round stays if its rewards differ. Otherwise the next group of a later round whose rewards
    differ replaces it. If there is none left, the group stays.
    """
    equal = torch.cat([equal_rewards(groups.rewards) for groups in sampled]).tolist()
    first = range(len(sampled[0].questions))
    unequal = (i for i in range(len(first), len(equal)) if not equal[i])
    return [next(unequal, i) if equal[i] else i for i in first]


def replace_equal(sampled: list[Groups]) -> Groups:
    """Return the groups of choose_groups: DAPO's dynamic sampling (arXiv 2503.14476, section 3.2)."""
    chosen = choose_groups(sampled)
    if chosen == list(range(len(chosen))):
        return sampled[0]
    group_size = sampled[0].rewards.shape[1]
    rows = [i * group_size + g for i in chosen for g in range(group_size)]  # N

    def through_rounds(name: str) -> list:
        return [item for groups in sampled for item in getattr(groups, name)]

    def pick_tokens(name: str) -> Tensor:  # [N, longest T]
        tokens = through_rounds(name)
        return pad_sequence([tokens[i] for i in rows], batch_first=True)

    questions, texts = through_rounds("questions"), through_rounds("texts")
    return Groups(
        questions=[questions[i] for i in chosen],
        prompt=pick_prompts(join_prompts([groups.prompt for groups in sampled]), chosen),
        completions=pick_tokens("completions"),
        mask=pick_tokens("mask"),
        sampled_logprobs=pick_tokens("sampled_logprobs"),
        texts=[texts[i] for i in rows],
        scores={name: torch.cat([own.scores[name] for own in sampled])[chosen] for name in sampled[0].scores},
        rewards=torch.cat([groups.rewards for groups in sampled])[chosen],
    )
