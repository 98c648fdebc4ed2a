"""group_advantages and grpo_loss against loop-by-loop transcriptions and finite differences."""

import math

import pytest
import torch

from grpo_aqa import group_advantages, grpo_loss

# ---- advantages ----


def test_advantages_are_per_group_with_the_unbiased_deviation():
    rewards = torch.tensor([[2.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 0.0]])
    advantages = group_advantages(rewards)
    for row, group in zip(advantages.tolist(), rewards.tolist()):
        mean = sum(group) / len(group)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        assert row == pytest.approx([(r - mean) / (deviation + 1e-4) for r in group], rel=1e-6)


def test_advantages_without_deviation():
    rewards = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    assert group_advantages(rewards, normalize_std=False).tolist() == [[1.0, 0.0, -1.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 1.0, 2.0, 0.1, 1 / 3, 1e6 / 7])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_have_advantage_exactly_zero(value, size):
    assert torch.equal(group_advantages(torch.full((2, size), value)), torch.zeros(2, size))


# ---- loss ----


def loss_by_loops(logprobs, old, ref, advantages, mask, clip_low, clip_high, beta):
    """The equation, one scalar at a time."""
    per_completion, kls, clips = [], [], []
    for i in range(len(logprobs)):
        terms, kl_terms, clip_terms = [], [], []
        for t in range(len(logprobs[i])):
            if not mask[i][t]:
                continue
            ratio = math.exp(logprobs[i][t] - old[i][t])
            unclipped = ratio * advantages[i]
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high) * advantages[i]
            kl = math.exp(ref[i][t] - logprobs[i][t]) - (ref[i][t] - logprobs[i][t]) - 1 if beta else 0.0
            terms.append(-(min(unclipped, clipped) - beta * kl))
            kl_terms.append(kl)
            clip_terms.append(float(clipped < unclipped))
        per_completion.append(sum(terms) / len(terms))
        kls.append(sum(kl_terms) / len(kl_terms))
        clips.append(sum(clip_terms) / len(clip_terms))
    return tuple(sum(values) / len(values) for values in (per_completion, kls, clips))


def random_case(seed, n=6, t=5):
    g = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, t, generator=g)
    old = logprobs + 0.4 * torch.randn(n, t, generator=g)
    ref = logprobs + 0.4 * torch.randn(n, t, generator=g)
    lengths = torch.randint(1, t + 1, (n,), generator=g)
    return logprobs, old, ref, torch.randn(n, generator=g), torch.arange(t) < lengths[:, None]


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_equation(seed, beta):
    logprobs, old, ref, advantages, mask = random_case(seed)
    loss, stats = grpo_loss(logprobs, old, ref if beta else None, advantages, mask, 0.2, 0.3, beta)
    expected = loss_by_loops(*(x.tolist() for x in (logprobs, old, ref, advantages, mask)), 0.2, 0.3, beta)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(expected[2], abs=1e-6)
    assert ("kl" in stats) == (beta != 0)
    if beta:
        assert stats["kl"].item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gradient_is_that_of_finite_differences(beta):
    logprobs, old, ref, advantages, mask = (x.double() if x.is_floating_point() else x for x in random_case(9))
    logprobs.requires_grad_(True)
    grpo_loss(logprobs, old, ref, advantages, mask, 0.2, 0.3, beta)[0].backward()
    tolists = [x.tolist() for x in (old, ref, advantages, mask)]
    for i in range(len(logprobs)):
        for t in range(logprobs.shape[1]):
            shifted = []
            for epsilon in (1e-5, -1e-5):
                moved = logprobs.detach().clone()
                moved[i, t] += epsilon
                shifted.append(loss_by_loops(moved.tolist(), *tolists, 0.2, 0.3, beta)[0])
            assert logprobs.grad[i, t].item() == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, gradient",
    [
        (1.5, 1.0, 0.0),  # raised enough already: clipped
        (1.5, -1.0, 1.5),  # a bad token made likelier: pushed back, unclipped
        (0.5, 1.0, -0.5),  # a good token made rarer: pushed back, unclipped
        (0.5, -1.0, 0.0),  # lowered enough already: clipped
        (1.0, 1.0, -1.0),
        (1.25, 1.0, -1.25),  # inside the wider upper bound
        (0.75, -1.0, 0.0),  # outside the narrower lower bound
    ],
)
def test_clipping_on_either_side_for_either_sign(ratio, advantage, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, stats = grpo_loss(
        logprobs, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1), 0.2, 0.3, 0.0
    )
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert stats["clip_fraction"].item() == float(gradient == 0.0)


def test_equal_rewards_leave_only_the_kl_gradient():
    logprobs, old, ref, _, mask = random_case(3)
    advantages = group_advantages(torch.full((1, 6), 0.1)).flatten()
    logprobs.requires_grad_(True)
    grpo_loss(logprobs, old, None, advantages, mask, 0.2, 0.2, 0.0)[0].backward()
    assert torch.equal(logprobs.grad, torch.zeros_like(logprobs))


def test_what_the_mask_excludes_has_no_effect_even_if_it_is_not_finite():
    logprobs, old, ref, advantages, mask = random_case(4)
    clean = logprobs.clone().requires_grad_(True)
    dirty = logprobs.masked_fill(~mask, float("nan")).requires_grad_(True)
    losses = []
    for x, o, r in ((clean, old, ref), (dirty, old.masked_fill(~mask, 1e30), ref.masked_fill(~mask, -torch.inf))):
        losses.append(grpo_loss(x, o, r, advantages, mask, 0.2, 0.2, 0.04)[0])
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.equal(clean.grad[~mask], torch.zeros_like(clean.grad[~mask]))


def test_loss_is_float32_for_bfloat16_inputs():
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in random_case(5)]
    loss, _ = grpo_loss(*inputs, 0.2, 0.2, 0.04)
    exact, _ = grpo_loss(*(x.float() for x in inputs), 0.2, 0.2, 0.04)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)
