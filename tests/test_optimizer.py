"""MasterAdamW: AdamW itself in float32, and its shadow in bfloat16 where plain AdamW stands still."""

import pytest
import torch
from torch import nn

from optimizer import MasterAdamW

LR, STEPS = 1e-6, 200


def gradients():
    """The same gradients each time: mostly of one sign per weight, as in training towards something."""
    generator = torch.Generator().manual_seed(0)
    lean = torch.randn(1000, generator=generator)
    return [lean + 0.5 * torch.randn(1000, generator=generator) for _ in range(STEPS)]


def start(dtype):
    """1,000 weights of the size that large models have, exact in bfloat16."""
    weights = 0.02 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(weights.bfloat16().to(dtype))


def with_torch(dtype):
    parameter = start(dtype)
    adamw = torch.optim.AdamW([parameter], lr=LR, weight_decay=0.0)
    for gradient in gradients():
        parameter.grad = gradient.to(dtype)
        adamw.step()
    return parameter.detach()


def with_masters(dtype):
    parameter = start(dtype)
    optimizer = MasterAdamW([parameter])
    for gradient in gradients():
        parameter.grad = gradient.to(dtype)
        optimizer.step(LR, max_grad_norm=1e9)
        assert parameter.grad is None
    return parameter.detach(), optimizer.masters[0].detach()


def test_gradients_are_clipped_to_a_global_norm_in_float32():
    """AdamW's first step has the size of the learning rate whatever the gradient's; its memory shows the clipping."""
    parameters = [start(torch.bfloat16), start(torch.bfloat16)]
    optimizer = MasterAdamW(parameters)
    for parameter, gradient in zip(parameters, gradients()):
        parameter.grad = gradient.bfloat16()
    exact = torch.cat([parameter.grad.float() for parameter in parameters]).norm().item()
    assert optimizer.step(LR, max_grad_norm=1.0) == pytest.approx(exact, rel=1e-6)
    kept = torch.cat([optimizer.adamw.state[master]["exp_avg"] for master in optimizer.masters]) / 0.1
    assert kept.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_float32_is_adamw():
    parameter, master = with_masters(torch.float32)
    assert torch.equal(parameter, with_torch(torch.float32)) and parameter.data_ptr() == master.data_ptr()


def test_bfloat16_follows_float32_and_plain_bfloat16_does_not():
    exact, initial = with_torch(torch.float32), start(torch.float32).detach()
    weights, masters = with_masters(torch.bfloat16)
    moved = (exact - initial).abs().mean()
    assert weights.dtype == torch.bfloat16 and torch.equal(weights, masters.bfloat16())
    assert (masters - exact).abs().mean() < 0.01 * moved  # what is left is the gradients' own rounding
    plain = with_torch(torch.bfloat16).float()
    assert (plain - exact).abs().mean() > 0.3 * moved
