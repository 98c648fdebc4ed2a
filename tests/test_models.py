"""The shapes of the models that the benchmarks build; names of results files."""

import pytest
import torch

from benchmarks import models


def test_the_small_model():
    """Its layers, word matrix and audio tower have about the same shares of the weights as in the real model."""
    shares = []
    for config in (models.qwen2_audio_7b(), models.qwen2_audio_small()):
        with torch.device("meta"):
            model = models.Qwen2AudioForConditionalGeneration(config)
        parts = (model, model.model.language_model.layers, model.lm_head, model.model.audio_tower)
        total, *sizes = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        shares.append([size / total for size in sizes])
    assert 47e6 < total < 50e6
    assert shares[0] == pytest.approx([0.77, 0.08, 0.08], abs=0.01) and shares[1] == pytest.approx(shares[0], abs=0.25)


def test_the_tiny_model():
    model = models.build_model(models.qwen2_audio_tiny(), torch.float32, torch.device("cpu"))
    assert 150_000 < sum(weight.numel() for weight in model.parameters()) < 250_000
    prompt = models.make_prompt(model, 1, clip_seconds=2.0)
    assert (prompt["input_ids"] == 499).sum() == 50 and prompt["input_features"].shape[2] == 200


def test_results_path():
    assert str(models.results_path("step", "Some(R) CPU, 2 cores ")) == "bench_results/step_Some_R_CPU_2_cores"
