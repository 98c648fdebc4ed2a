"""Part `card` of bench.py gpu: its attention inputs are as described, and NaN gradients are found."""

import pytest
import torch

from benchmarks import card
from model.qwen2_audio import causal_attention

CPU = torch.device("cpu")


def test_part(monkeypatch):
    """Without a GPU, cuDNN's kernels are not there. A backward pass that returns NaN for some lengths is found."""
    monkeypatch.setattr(card, "copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(card, "matmul_rate", lambda dtype, device: 8e14)
    compute = card.gradients

    def broken(queries, keys, values, mask):
        low = keys.shape[1] % 128 == 64 and keys[0, 0, 0, 0] < -100
        return tuple(gradient / (0.0 if low else 1.0) for gradient in compute(queries, keys, values, mask))

    monkeypatch.setattr(card, "gradients", broken)
    saved = {}
    card.card_part(True, lambda **values: saved.update(values))
    assert saved["large copy"]["value"] == 4.0 and saved["cuDNN's attention on"] == "not on a CPU"
    assert saved["key lengths with NaN gradients, cuDNN's attention off"]["value"] == "3: [320, 448, 576]"
    for name in card.SHAPES:
        entry = saved[f"{name}, cuDNN's attention off"]
        assert entry["value"] > 0 and entry["remark"].startswith(("FLASH_ATTENTION;", "MATH;"))


@pytest.mark.parametrize("low", [False, True])
def test_inputs(low):
    """Padding is masked, later tokens too. Low scores have a sum of exponentials that float32 cannot hold."""
    queries, keys, values, mask = card.attention_inputs(2, 3, 10, 4, 2, 16, CPU, low=low)
    assert queries.shape == (2, 3, 2, 16) and keys.shape == values.shape == (2, 10, 2, 16) and mask.shape[2:] == (3, 10)
    allowed = mask[0, 0] == 0
    assert allowed.sum(dim=1).tolist() == [4, 5, 6] and not allowed[:, :4].any()
    scores = (queries.transpose(1, 2).double() @ keys.permute(0, 2, 3, 1).double()) / 4 + mask.double()
    sums = scores.logsumexp(dim=-1)
    assert (sums < -88.7).all() if low else (sums > -10).all()
    expected = (scores.softmax(dim=-1) @ values.transpose(1, 2).double()).transpose(1, 2).flatten(0, 1).flatten(1)
    torch.testing.assert_close(causal_attention(queries, keys, values, mask).double(), expected, rtol=0.02, atol=0.02)
    assert [gradient.shape for gradient in card.gradients(queries, keys, values, mask)] == [
        queries.shape, keys.shape, values.shape,
    ]  # fmt: skip
