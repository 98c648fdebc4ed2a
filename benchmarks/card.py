"""Part `card` of `python bench.py gpu`: versions, rates, and attention kernels."""

import re
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.models import save_line
from benchmarks.speed import copy_bandwidth, hardware, matmul_rate, seconds_of
from infra.processes import choose_kernels
from model.qwen2_audio import causal_attention, positions_and_mask

# name -> rows, new tokens, all tokens of a row, padding on the left
SHAPES = {
    "prompts, no mask": (2, 330, 330, 0),
    "prompts, mask": (2, 330, 330, 47),
    "completions": (16, 15, 345, 49),
    "completions, 448 keys": (16, 15, 448, 64),
}
KEY_LENGTHS = (320, 384, 448, 512, 576)


def card_part(tiny: bool, save) -> None:
    """Measure the card. Attention has the real model's heads, or small ones if `tiny`."""
    _, dtype, device, _ = hardware(tiny)
    heads, size = (2, 16) if tiny else (32, 128)
    save(CUDA=torch.version.cuda, cuDNN=torch.backends.cudnn.version(), driver=driver())
    save_line(save, "large copy", copy_bandwidth(device) / 1e12, "TB/s")
    name = f"product of large matrices, {str(dtype).removeprefix('torch.')}"
    save_line(save, name, matmul_rate(dtype, device) / 1e12, "TFLOP/s")
    for cudnn in (True, False):
        label = f"cuDNN's attention {'on' if cudnn else 'off'}"
        if cudnn and device.type == "cpu":
            save(**{label: "not on a CPU"})
            continue
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for name, shape in SHAPES.items():
            inputs = attention_inputs(*shape, heads, size, device)
            first, *again = [seconds_of(partial(gradients, *inputs), device) for _ in range(11)]
            remark = f"{kernel(*inputs)}; the first time {1e3 * first:.0f} ms"
            save_line(save, f"{name}, {label}", 1e3 * median(again), "ms", remark)
        new = [attention_inputs(16, 15 + n % 5, 340 + n, 49, heads, size, device) for n in range(12)]
        seconds = [seconds_of(partial(gradients, *inputs), device) for inputs in new]
        save_line(save, f"12 new shapes, {label}", sum(seconds), "s")
        low = {n: attention_inputs(16, 15, n, n // 7, heads, size, device, low=True) for n in KEY_LENGTHS}
        wrong = [n for n, inputs in low.items() if not all(g.isfinite().all() for g in gradients(*inputs))]
        remark = f"should be 0, of {[*KEY_LENGTHS]}"
        save_line(save, f"key lengths with NaN gradients, {label}", f"{len(wrong)}: {wrong}", remark=remark)
    choose_kernels()


def driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text(encoding="utf-8")) if file.exists() else None
    return found[0] if found else None


def attention_inputs(
    rows: int, new: int, tokens: int, padding: int, heads: int, size: int, device: torch.device, low: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Make random inputs of causal_attention in bfloat16, with gradients.

    low: all scores are about -120, so that a row's sum of exponentials underflows in float32 (github.com/pytorch/
    pytorch/issues/196678).
    """
    shapes = [(rows, count, heads, size) for count in (new, tokens, tokens)]
    queries, keys, values = (torch.randn(shape, device=device) for shape in shapes)
    if low:
        queries[..., 0], keys[..., 0] = 1.0, -120 * size**0.5
    attention_mask = torch.ones(rows, tokens, dtype=torch.long, device=device)
    attention_mask[:, :padding] = 0
    _, mask = positions_and_mask(attention_mask, new, torch.bfloat16)
    queries, keys, values = (tensor.bfloat16().requires_grad_() for tensor in (queries, keys, values))
    return queries, keys, values, mask


def gradients(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Run attention forward and backward. Return the gradients of queries, keys and values."""
    attended = causal_attention(queries, keys, values, mask).float()
    return torch.autograd.grad(attended.sum(), (queries, keys, values))


def kernel(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> str:
    """Return the name of the kernel that torch chooses for these inputs of causal_attention."""
    queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
    return SDPBackend(torch._fused_sdp_choice(queries, keys, values, mask, is_causal=mask is None)).name
