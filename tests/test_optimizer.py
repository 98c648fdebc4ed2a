"""ShardedAdamW equals AdamW in float32. In bfloat16 it learns, while plain AdamW stands still."""

import pytest
import torch
from torch import nn

from training.optimizer import ShardedAdamW, assign_owners, clip_scale, global_norm

pytestmark = pytest.mark.usefixtures("one_rank")
LR, STEPS = 1e-6, 200


def gradients():
    """Return the same gradients each time. Those of one weight have mostly one sign, as in real training."""
    generator = torch.Generator().manual_seed(0)
    lean = torch.randn(1000, generator=generator)
    return [lean + 0.5 * torch.randn(1000, generator=generator) for _ in range(STEPS)]


def start(dtype):
    """Return 1,000 weights of the size that large models have, exact in bfloat16."""
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
    optimizer = ShardedAdamW({"weight": parameter})
    for gradient in gradients():
        parameter.grad = gradient.to(dtype)
        optimizer.step(LR, grad_scale=1.0)
        assert (parameter.grad == 0).all()
    return parameter.detach(), optimizer.state["weight"]["master"]


def test_gradients_are_clipped_to_a_global_norm_in_float32():
    """AdamW's first step is as large as the learning rate for any gradient, so only its first moment shows clipping."""
    parameters = {"a": start(torch.bfloat16), "b": start(torch.bfloat16)}
    optimizer = ShardedAdamW(parameters)
    for parameter, gradient in zip(parameters.values(), gradients()):
        parameter.grad = gradient.bfloat16()
    exact = torch.cat([parameter.grad.double() for parameter in parameters.values()]).norm().item()
    norm = optimizer.grad_norm()
    assert norm == pytest.approx(exact, rel=1e-6)
    optimizer.step(LR, clip_scale(norm, max_grad_norm=1.0))
    kept = torch.cat([state["exp_avg"] for state in optimizer.state.values()]) / 0.1
    assert kept.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(bad):
    parameter = start(torch.bfloat16)
    optimizer = ShardedAdamW({"weight": parameter})
    parameter.grad = gradients()[0].bfloat16()
    parameter.grad[3] = bad
    with pytest.raises(FloatingPointError, match="norm of the gradient"):
        clip_scale(optimizer.grad_norm(), max_grad_norm=1.0)


def test_a_norm_below_the_limit_changes_nothing():
    parameter = start(torch.float32)
    optimizer = ShardedAdamW({"weight": parameter})
    parameter.grad = gradients()[0] / 1000
    assert clip_scale(optimizer.grad_norm(), max_grad_norm=1.0) == 1.0
    optimizer.step(LR, 1.0)
    torch.testing.assert_close(optimizer.state["weight"]["exp_avg"], gradients()[0] / 1e4)


def test_global_norm_of_many_bfloat16_values():
    """A bfloat16 sum of squares would stop growing at 256 ones."""
    assert global_norm([torch.ones(10_000, dtype=torch.bfloat16)] * 4) == 200


def test_float32_is_adamw():
    parameter, master = with_masters(torch.float32)
    torch.testing.assert_close(parameter, with_torch(torch.float32), rtol=1e-6, atol=1e-9)
    assert parameter.data_ptr() == master.data_ptr()


def test_a_loaded_state_continues_exactly():
    """A second optimizer loads the state after half of the steps and takes the rest. The weights do not differ."""
    whole, _ = with_masters(torch.bfloat16)
    parameter, other = start(torch.bfloat16), nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    first, second = ShardedAdamW({"weight": parameter}), ShardedAdamW({"weight": other})
    for step, gradient in enumerate(gradients()):
        if step == STEPS // 2:
            second.load_state(first.state)
            second.send_weights()
            assert torch.equal(other, parameter) and second.state["weight"]["master"].dtype == torch.float32
        current, optimizer = (parameter, first) if step < STEPS // 2 else (other, second)
        current.grad = gradient.bfloat16()
        optimizer.step(LR, grad_scale=1.0)
    assert torch.equal(other, whole)


@pytest.mark.parametrize("shape", [(1,), (3, 1000), (999,), (1000, 1)])
def test_a_state_of_another_shape_is_refused(shape):
    """Also a shape that could be broadcast to the weight's shape."""
    optimizer = ShardedAdamW({"weight": start(torch.float32)})
    state = {key: torch.zeros(shape) if tensor.dim() else tensor for key, tensor in optimizer.state["weight"].items()}
    with pytest.raises(ValueError, match="weight: .*not"):
        optimizer.load_state({"weight": state})


def test_ranks_own_about_the_same_size():
    """Up to 8 ranks, sizes like those of Qwen2-Audio: two huge matrices, hundreds of large ones, many small ones."""
    sizes = {"embed": 640, "head": 640} | {f"w{i}": 45 for i in range(96)} | {f"a{i}": 17 for i in range(128)}
    sizes |= {f"b{i}": 1 for i in range(300)}
    for world_size in (1, 2, 4, 8):
        owners = assign_owners(sizes, world_size)
        held = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(world_size)]
        assert owners.keys() == sizes.keys() and max(held) <= 1.02 * sum(sizes.values()) / world_size


def test_bfloat16_follows_float32_and_plain_bfloat16_does_not():
    exact, initial = with_torch(torch.float32), start(torch.float32).detach()
    weights, masters = with_masters(torch.bfloat16)
    moved = (exact - initial).abs().mean()
    assert weights.dtype == torch.bfloat16 and torch.equal(weights, masters.bfloat16())
    assert (masters - exact).abs().mean() < 0.01 * moved  # the gradients' own rounding
    plain = with_torch(torch.bfloat16).float()
    assert (plain - exact).abs().mean() > 0.3 * moved
