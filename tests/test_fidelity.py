"""benchmarks/fidelity.py: comparisons find differences, an error stops no other item, the whole part on the CPU."""

import copy
import json
import sys

import pytest
import torch
from torch.testing import assert_close

from benchmarks import fidelity
from benchmarks.fidelity import logprobs_and_gradient, random_completions
from model.qwen2_audio import slice_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(config):
    return fidelity.random_model(config)


@pytest.fixture(scope="module")
def prompt(model):
    return fidelity.random_prompt(model, [0.4, 1.0, 1.6])


def test_prompts_of_different_lengths(model, prompt):
    """Each prompt has the same log-probs in the batch and alone. The log-probs are far from uniform."""
    assert prompt["attention_mask"].sum(dim=1).tolist() == [90, 105, 120]
    completions, mask = random_completions(model, 24, 20)
    together, _ = logprobs_and_gradient(model, prompt, completions, mask, False)
    parts = zip(completions.split(8), mask.split(8))
    alone = [
        logprobs_and_gradient(model, slice_prompt(prompt, i, i + 1), *part, False)[0] for i, part in enumerate(parts)
    ]
    assert_close(torch.cat(alone), together)
    assert len(together) > 100 and together.std() > 2


def test_relative_errors(model, prompt):
    """bfloat16 has an error, float32 on the same device has none. The gradient is that of backward()."""
    errors = dict(fidelity.relative_errors(model, CPU, prompt, group_size=2, tokens=6))
    assert len(errors) == 4  # on the CPU, both comparisons of bfloat16 have the same names
    for name, error in errors.items():
        low, high = (1e-3, 0.2) if "bfloat16" in name else (-1, 1e-6)
        assert low < error["logprobs"] < high and low < error["gradient"] < high

    completions, mask = random_completions(model, 6, 6)
    _, gradient = logprobs_and_gradient(model, prompt, completions, mask, False)
    learning = copy.deepcopy(model)
    fidelity.completion_logprobs(learning, prompt, completions, mask, 1.0)[0].sum().backward()
    backward = torch.cat([weight.grad.flatten() for weight in learning.parameters() if weight.requires_grad])
    assert fidelity.relative_error(gradient, backward) < 1e-6
    assert fidelity.relative_error(1.1 * backward, backward) == pytest.approx(0.1, rel=1e-3)


def test_sampler_gaps(model, prompt, monkeypatch):
    """In float32 the sampler and the training pass agree. A difference of half a nat is found."""
    gaps = dict(fidelity.sampler_gaps(model, prompt, group_size=2, max_new_tokens=5))
    assert [*gaps] == ["sampler gap, plain loop", "sampler gap, CUDA graphs"]
    assert all(gap["mean"] < 1e-5 and gap["max"] < 1e-4 for gap in gaps.values())
    draw = fidelity.draw

    def draw_with_an_offset(*inputs):
        completions, mask, logprobs = draw(*inputs)
        return completions, mask, logprobs + 0.5

    monkeypatch.setattr(fidelity, "draw", draw_with_an_offset)
    gaps = dict(fidelity.sampler_gaps(model, prompt, group_size=2, max_new_tokens=5))
    assert gaps["sampler gap, plain loop"] == pytest.approx({"mean": 0.5, "max": 0.5}, abs=1e-4)


def test_different_tokens_are_counted(model, prompt):
    decoders = fidelity.make_decoders(model, prompt, 4, 8)
    assert fidelity.count_differing(decoders, prompt, 1.0) == 0
    decoders[1].model = copy.deepcopy(model)
    decoders[1].model.lm_head.weight.data *= 2
    assert 0 < fidelity.count_differing(decoders, prompt, 1.0) <= 12


def test_an_error_stops_no_other_item(monkeypatch):
    """Figures before the error stay. Without soundfile, the resumed run is left out."""

    def fail(*args, **kwargs):
        yield "a gap", 1
        raise ValueError("no luck")

    monkeypatch.setattr(fidelity, "ROLLOUTS", ((0, 1),))
    monkeypatch.setattr(fidelity, "relative_errors", lambda *args: [])
    monkeypatch.setattr(fidelity, "sampler_gaps", fail)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    result = {}
    fidelity.bench_fidelity(True, lambda **values: result.update(values))
    assert result["errors"] == {"sampler_gaps": "ValueError: no luck"} and result["a gap"] == 1
    assert result["rollout 1, 1 prompts of 90 tokens, differing"] == {"greedy": 0, "sampled": 0}
    assert result["resumed run"].startswith("left out: clips need the package soundfile")


@pytest.mark.slow
def test_the_whole_part_on_the_cpu():
    result = {}
    fidelity.bench_fidelity(True, lambda **values: result.update(json.loads(json.dumps(values))))
    assert result["device"] == "cpu" and "errors" not in result
    rollouts = {name: differing for name, differing in result.items() if name.startswith("rollout")}
    assert len(rollouts) == 5 and all(differing == {"greedy": 0, "sampled": 0} for differing in rollouts.values())
    assert result["resumed run is equal"] and [step["step"] for step in result["resumed run"]] == [4, 5]
    assert all(step["kl"] > 0 for step in result["undisturbed run"])
