"""The models that benchmarks make of nothing but their shapes."""

import pytest
import torch

import bench_models


def test_the_small_model():
    """Made in the proportions of the real one: layers, words and audio tower have about the same shares."""
    shares = []
    for config in (bench_models.qwen2_audio_7b(), bench_models.qwen2_audio_small()):
        with torch.device("meta"):
            model = bench_models.Qwen2AudioForConditionalGeneration(config)
        parts = (model, model.model.language_model.layers, model.lm_head, model.model.audio_tower)
        total, *sizes = (sum(weight.numel() for weight in part.parameters()) for part in parts)
        shares.append([size / total for size in sizes])
    assert 47e6 < total < 50e6
    assert shares[0] == pytest.approx([0.77, 0.08, 0.08], abs=0.01) and shares[1] == pytest.approx(shares[0], abs=0.25)
