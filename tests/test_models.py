"""The shapes of the models that the benchmarks build."""

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
