"""Rewards, advantages and loss against plain loops and finite differences; variants of the loss; the loop."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from torch.testing import assert_close

from data import Question
from grpo_aqa import (
    Rollout,
    accumulate_gradients,
    group_advantages,
    grpo_loss,
    loss_length,
    make_rollouts,
    score_completions,
)
from model.qwen2_audio import slice_prompt
from policy import data_parallel, encode_prompts, sample_group

# ---- rewards and advantages ----


def test_each_completion_is_scored_with_the_answer_of_its_question():
    questions = [Question(answer, "", "?", ["a", "b"], answer) for answer in "ab"]
    texts = ["<answer>a</answer>", "<answer>b</answer>", "a", "<answer>b</answer>", "<answer>a</answer>", "a"]
    scores = score_completions(texts, questions, "answer", ["accuracy", "format"])
    assert {name: score.tolist() for name, score in scores.items()} == {
        "accuracy": [[1, 0, 1], [1, 0, 0]],
        "format": [[1, 1, 0], [1, 1, 0]],
    }


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


def loss_by_loops(logprobs, old, ref, advantages, mask, clip_low, clip_high, beta, length=None, ratio="token"):
    """Compute the equation one scalar at a time. Returns the loss, the KL and the clipped share."""
    per_completion, kls, clips = [], [], []
    for i in range(len(logprobs)):
        tokens = [t for t in range(len(logprobs[i])) if mask[i][t]]
        terms, kl_terms, clip_terms = [], [], []
        for t in tokens:
            weight = math.exp(logprobs[i][t] - old[i][t])
            if ratio == "sequence":
                weight = math.prod(math.exp(logprobs[i][u] - old[i][u]) for u in tokens) ** (1 / len(tokens))
            unclipped = weight * advantages[i]
            clipped = min(max(weight, 1 - clip_low), 1 + clip_high) * advantages[i]
            kl = math.exp(ref[i][t] - logprobs[i][t]) - (ref[i][t] - logprobs[i][t]) - 1
            terms.append(-(min(unclipped, clipped) - beta * kl))
            kl_terms.append(kl)
            clip_terms.append(float(clipped < unclipped))
        per_completion.append(sum(terms) / (len(tokens) if length is None else length))
        kls.append(sum(kl_terms) / len(tokens))
        clips.append(sum(clip_terms) / len(tokens))
    return tuple(sum(values) / len(values) for values in (per_completion, kls, clips))


def random_case(seed, n=6, t=5):
    g = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(n, t, generator=g)
    old = logprobs + 0.4 * torch.randn(n, t, generator=g)
    ref = logprobs + 0.4 * torch.randn(n, t, generator=g)
    lengths = torch.randint(1, t + 1, (n,), generator=g)
    return logprobs, old, ref, torch.randn(n, generator=g), torch.arange(t) < lengths[:, None]


VARIANTS = [{}, {"length": 2.6}, {"length": 256.0}]
VARIANTS += [variant | {"ratio": "sequence"} for variant in VARIANTS]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_equation(seed, beta, variant):
    """The stats are means over completions of means over their tokens, whatever the loss is divided by.

    With beta 0, the KL is measured if there is a reference.
    """
    logprobs, old, ref, advantages, mask = random_case(seed)
    given = ref if beta or seed % 2 else None
    loss, stats = grpo_loss(logprobs, old, given, advantages, mask, 0.2, 0.3, beta, **variant)
    tolists = [x.tolist() for x in (logprobs, old, ref, advantages, mask)]
    expected = loss_by_loops(*tolists, 0.2, 0.3, beta, **variant)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert stats["clip_fraction"].item() == pytest.approx(expected[2], abs=1e-6)
    assert ("kl" in stats) == (given is not None)
    if given is not None:
        assert stats["kl"].item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gradient_is_that_of_finite_differences(exact, beta, variant):
    logprobs, old, ref, advantages, mask = (x.double() if x.is_floating_point() else x for x in random_case(9))
    logprobs.requires_grad_(True)
    grpo_loss(logprobs, old, ref, advantages, mask, 0.2, 0.3, beta, **variant)[0].backward()
    tolists = [x.tolist() for x in (old, ref, advantages, mask)]
    for i in range(len(logprobs)):
        for t in range(logprobs.shape[1]):
            shifted = []
            for epsilon in (1e-5, -1e-5):
                moved = logprobs.detach().clone()
                moved[i, t] += epsilon
                shifted.append(loss_by_loops(moved.tolist(), *tolists, 0.2, 0.3, beta, **variant)[0])
            assert logprobs.grad[i, t].item() == pytest.approx((shifted[0] - shifted[1]) / 2e-5, rel=1e-6, abs=1e-9)


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


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_masked_values_have_no_effect_even_if_they_are_not_finite(variant):
    logprobs, old, ref, advantages, mask = random_case(4)
    clean = logprobs.clone().requires_grad_(True)
    dirty = logprobs.masked_fill(~mask, float("nan")).requires_grad_(True)
    losses = []
    for x, o, r in ((clean, old, ref), (dirty, old.masked_fill(~mask, 1e30), ref.masked_fill(~mask, -torch.inf))):
        losses.append(grpo_loss(x, o, r, advantages, mask, 0.2, 0.2, 0.04, **variant)[0])
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.equal(clean.grad[~mask], torch.zeros_like(clean.grad[~mask]))


def test_loss_is_float32_for_bfloat16_inputs():
    inputs = [x.bfloat16() if x.is_floating_point() else x for x in random_case(5)]
    loss, _ = grpo_loss(*inputs, 0.2, 0.2, 0.04)
    exact, _ = grpo_loss(*(x.float() for x in inputs), 0.2, 0.2, 0.04)
    assert loss.dtype == torch.float32 and torch.equal(loss, exact)


# ---- variants ----


def test_the_length_that_divides_the_loss_of_a_completion(one_rank):
    """None, the mean number of tokens of a completion, and the largest possible number of tokens."""
    mask = torch.arange(7) < torch.tensor([[3], [7], [1], [6]])
    lengths = [loss_length(mask, average, 16) for average in ("completion", "token", "constant")]
    assert lengths == [None, 17 / 4, 16.0]


class FixedLogprobs:
    """A policy whose log-probs are its parameters. A rollout's first token selects them. Called like a DDP module."""

    def __init__(self, logprobs):
        self.logprobs = [rows.clone().requires_grad_(True) for rows in logprobs]

    def __call__(self, prompt, completions, mask, temperature):
        rows = self.logprobs[completions[0, 0]]
        return rows, torch.zeros_like(rows)

    def no_sync(self):
        return nullcontext()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_token_average_weighs_all_tokens_of_all_ranks_and_parts_equally(exact, ratio):
    """DAPO: two ranks with two parts each give the gradient of one mean over all their tokens, also if the parts have
    unequal numbers of tokens. accumulate_gradients gets the mean length over all ranks and parts. A part's own mean
    length would give another gradient."""
    parts = [[x.double() if x.is_floating_point() else x for x in random_case(seed)] for seed in (1, 2, 3, 4)]
    for longest, part in enumerate(parts, start=2):  # completions of 1 or 2 tokens, of 2 or 3, ...
        part[4] = torch.arange(5) < torch.tensor([longest - 1, longest, longest - 1])[:, None].repeat(2, 1)
    tokens = [int(part[4].sum()) for part in parts]
    assert tokens == [8, 14, 20, 26]
    everything = torch.cat([part[0] for part in parts]).requires_grad_(True)
    old, ref, advantages, mask = (torch.cat(tensors) for tensors in list(zip(*parts))[1:])
    log_ratio = everything - old
    if ratio == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None].expand_as(mask)
    weight, a = log_ratio.exp(), advantages[:, None]
    objective = torch.minimum(weight * a, weight.clip(0.8, 1.28) * a)
    kl = (ref - everything).exp() - (ref - everything) - 1
    mean = -(objective - 0.04 * kl)[mask].sum() / sum(tokens)
    mean.backward()

    length = sum(tokens) / len(everything)  # what loss_length returns on every rank
    limits = dict(temperature=1.0, clip_low=0.2, clip_high=0.28, beta=0.04, length=length, ratio=ratio)
    losses, gradients = [], []
    for rank in (parts[:2], parts[2:]):
        policy = FixedLogprobs([part[0] for part in rank])
        rollouts = [Rollout(None, torch.full((6, 5), i), p[4], p[3], p[2], p[1]) for i, p in enumerate(rank)]
        losses.append(accumulate_gradients(policy, rollouts, **limits)["loss"])
        gradients += [rows.grad / 2 for rows in policy.logprobs]  # averaged over the ranks
    assert sum(losses) / 2 == pytest.approx(mean.item(), rel=1e-12)
    assert_close(torch.cat(gradients), everything.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_sequence_ratio_is_gspo(exact, seed):
    """J = mean_i min(s_i A_i, clip(s_i) A_i) with s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|): arXiv 2507.18071."""
    logprobs, old, _, advantages, mask = (x.double() if x.is_floating_point() else x for x in random_case(seed))
    ours, theirs = logprobs.clone().requires_grad_(True), logprobs.clone().requires_grad_(True)
    likelihoods = [(theirs[i][mask[i]].exp().prod(), old[i][mask[i]].exp().prod()) for i in range(len(mask))]
    s = torch.stack([(new / before) ** (1 / int(mask[i].sum())) for i, (new, before) in enumerate(likelihoods)])
    expected = -torch.minimum(s * advantages, s.clip(0.9, 1.1) * advantages).mean()
    loss, stats = grpo_loss(ours, old, None, advantages, mask, 0.1, 0.1, 0.0, ratio="sequence")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    clipped = (ours.grad == 0).all(dim=1)
    assert stats["clip_fraction"].item() == pytest.approx(clipped.double().mean().item()) and 0 < clipped.sum() < 6


@pytest.mark.parametrize("length", [None, 2.6])
def test_token_and_sequence_ratios_differ_only_after_an_update(exact, length):
    """At pi = pi_old both have the same loss and gradient. After a step, one clips single tokens, the other all."""
    logprobs, old, _, advantages, mask = (x.double() if x.is_floating_point() else x for x in random_case(6))
    found = []
    for ratio in ("token", "sequence"):
        for before in (logprobs, old):
            moved = logprobs.clone().requires_grad_(True)
            loss, _ = grpo_loss(moved, before, None, advantages, mask, 0.2, 0.2, 0.0, length, ratio)
            loss.backward()
            found.append((loss.detach(), moved.grad))
    assert_close(found[0], found[2], rtol=1e-12, atol=1e-14)
    assert (found[1][0] - found[3][0]).abs() > 1e-3

    up_and_down = torch.tensor([[math.log(1.5), -math.log(1.5)]])  # one token is clipped; the mean is not
    inputs = up_and_down, 0 * up_and_down, None, torch.ones(1), torch.ones(1, 2), 0.2, 0.2, 0.0
    for ratio, share in (("token", 0.5), ("sequence", 0.0)):
        _, stats = grpo_loss(*inputs, length, ratio)
        assert stats["clip_fraction"].item() == share


def test_constant_length_without_deviation_is_the_plain_policy_gradient(exact):
    """Dr. GRPO: before the policy moves, each token's weight is r - mean(r), in every group and at every length."""
    logprobs, _, _, _, mask = (x.double() if x.is_floating_point() else x for x in random_case(7))
    rewards = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 2.0]], dtype=torch.float64)
    logprobs.requires_grad_(True)
    advantages = group_advantages(rewards, normalize_std=False).flatten()
    grpo_loss(logprobs, logprobs.detach(), None, advantages, mask, 0.2, 0.2, 0.0, length=16.0)[0].backward()
    for i, weight in enumerate([1, 0, -1, -1 / 3, -1 / 3, 2 / 3]):
        for t in range(mask.shape[1]):
            expected = -weight / (6 * 16) if mask[i, t] else 0.0
            assert logprobs.grad[i, t].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


# ---- the sampler's log-probs ----


def test_the_sampler_gap_is_only_rounding(one_rank, tiny, questions):
    """In two parts, with completions of different lengths, at the temperature of sampling and no other."""
    model, prompt = copy.deepcopy(tiny[0]), encode_prompts(tiny[1], questions, "answer")
    stops = list(range(0, model.config.text_config.vocab_size, 3))
    completions, mask, sampled = sample_group(model, prompt, 4, 6, 0.7, stops, torch.Generator().manual_seed(0))
    assert not mask.all() and (sampled[~mask] == 0).all() and (sampled[mask] < 0).all()
    ddp_policy, gaps = data_parallel(model, slice_prompt(prompt, 0, 1), False), []
    for temperature in (0.7, 1.0):
        rollouts = make_rollouts(
            model, None, prompt, completions, mask, torch.ones(16),
            parts=2, temperature=temperature, keep_old=False, sampled_logprobs=sampled,
        )  # fmt: skip
        stats = accumulate_gradients(
            ddp_policy, rollouts, temperature=temperature, clip_low=0.2, clip_high=0.2, beta=0.0
        )
        gaps.append(stats["sampler_gap"])
    assert gaps[0] < 1e-5 < 0.01 < gaps[1]


# ---- groups of equal rewards ----


@pytest.mark.parametrize("length, updates", [(None, 1), (2.6, 2)])
def test_without_a_reference_groups_of_equal_rewards_are_left_out(exact, one_rank, tiny, questions, length, updates):
    """The gradient and the loss are the ones of all completions. In the second part, all groups have equal rewards."""
    model, prompt = copy.deepcopy(tiny[0]), encode_prompts(tiny[1], questions, "answer")
    sampled = sample_group(model, prompt, 4, 6, 1.0, list(range(0, 99, 3)), torch.Generator().manual_seed(0))
    completions, mask, logprobs = sampled
    rewards = torch.tensor([[1.0] * 4, [0.0, 1.0, 1.0, 2.0], [0.0] * 4, [2.0] * 4])
    advantages, found = group_advantages(rewards).flatten(), []
    ddp_policy = data_parallel(model, slice_prompt(prompt, 0, 1), False)
    for reference in (None, model):
        rollouts = make_rollouts(
            model, reference, prompt, completions, mask, advantages,
            parts=2, temperature=1.0, keep_old=updates > 1, sampled_logprobs=logprobs,
        )  # fmt: skip
        for rollout in rollouts if updates > 1 else ():
            rollout.old_logprobs -= 0.3  # as if an update had moved the policy: some tokens are clipped
        model.zero_grad()
        stats = accumulate_gradients(
            ddp_policy, rollouts, temperature=1.0, clip_low=0.2, clip_high=0.2, beta=0.0, length=length
        )
        assert (stats["clip_fraction"] > 0) == (updates > 1)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((stats["loss"], stats["clip_fraction"], gradients))
        sizes = [len(rollout.completions) for rollout in rollouts]
        assert sizes == ([4, 4] if reference is None else [8, 8]) and stats["sampler_gap"] < 1e-9
    (loss, clipped, gradients), (expected_loss, expected_clipped, expected) = found
    assert (loss, clipped) == pytest.approx((expected_loss, expected_clipped), rel=1e-9, abs=1e-12)
    assert max(gradient.abs().max() for gradient in expected) > 0.01
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-10)


# ---- the loop ----


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_sampler_gap_in_the_metrics_is_that_before_any_update(runs, forker):
    flags = ["--model=base", "--data=questions.jsonl", "--steps=2", "--prompts_per_rank=4", "--max_new_tokens=8",
             "--lr=1e-2", "--updates_per_rollout=2", "--out=gap"]  # fmt: skip
    done = forker.run(runs, ["grpo_aqa.py", *flags])
    assert done.returncode == 0, done.stderr
    assert all(0 < m["sampler_gap"] < 1e-5 < abs(m["kl"]) for m in metrics(runs / "gap")[1:])


def test_the_kl_is_measured_with_beta_0_and_changes_nothing(runs, forker):
    """With --log_kl, no group is left out of the training pass. Loss, gradient and weights differ by rounding alone."""
    flags = ["--model=base", "--data=questions.jsonl", "--steps=2", "--prompts_per_rank=4", "--max_new_tokens=8",
             "--lr=1e-2", "--beta=0", "--lora_rank=2", "--group_size=3"]  # fmt: skip
    for name, switches in (("unmeasured", []), ("measured", ["--log_kl"])):
        done = forker.run(runs, ["grpo_aqa.py", *flags, *switches, f"--out={name}"])
        assert done.returncode == 0, done.stderr
    measured, unmeasured = (training_runs.metrics(runs / name) for name in ("measured", "unmeasured"))
    assert 0 < sum(record["equal_reward_groups"] for record in measured) < 2
    kl = [record.pop("kl") for record in measured]
    assert kl[0] == 0 < 1e-4 < kl[1] and [record.pop("kl") for record in unmeasured] == [None, None]
    for record, other in zip(measured, unmeasured, strict=True):
        for name in ("entropy", "sampler_gap"):  # means over the completions in the training pass
            del record[name], other[name]
        assert record == pytest.approx(other, rel=1e-3, abs=1e-5)
    saved = (runs / name / "step_000002" / "adapter_model.safetensors" for name in ("measured", "unmeasured"))
    one, two = map(load_file, saved)
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one | two)


def test_the_learning_rate_decays_linearly_to_zero(runs):
    assert [m["lr"] for m in metrics(runs / "reference")] == pytest.approx([1e-3 * (8 - i) / 8 for i in range(8)])


def test_the_gradient_is_clipped(runs, forker):
    """AdamW's step is as large as the learning rate, unless the gradient is as small as AdamW's epsilon, 1e-8."""
    flags = ["--model=base", "--data=questions.jsonl", "--steps=1", "--prompts_per_rank=4", "--max_new_tokens=8",
             "--lr=1e-3", "--beta=0", "--seed=1"]  # fmt: skip
    base, moved = load_file(runs / "base" / "model.safetensors"), {}
    for norm in ("1", "1e-11"):
        done = forker.run(runs, ["grpo_aqa.py", *flags, f"--max_grad_norm={norm}", f"--out=clipped_{norm}"])
        assert done.returncode == 0, done.stderr
        weights = load_file(runs / f"clipped_{norm}" / "step_000001" / "model.safetensors")
        moved[norm] = max((weights[name] - weight).abs().max().item() for name, weight in base.items())
        assert metrics(runs / f"clipped_{norm}")[0]["grad_norm"] > 1e-3  # before clipping
    assert moved["1"] == pytest.approx(1e-3, rel=0.01) and 0 < moved["1e-11"] < 1e-5
