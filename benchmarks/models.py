"""Shared by the benchmarks: model shapes, random weights, prompts, a lone rank and its training step, results files."""

import argparse
import json
import os
import platform
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from grpo_aqa import accumulate_gradients, group_advantages, make_reference, make_rollouts
from infra.files import write_text
from model.decoding import GroupDecoder
from model.lora import add_lora
from model.qwen2_audio import PAD_FRAMES, Prompt, audio_tokens, freeze_position_table
from policy import data_parallel, sample_group
from training.optimizer import ShardedAdamW, clip_scale, trainable
from training.settings import LORA_TARGETS

GB = 1e9
TEXT_TOKENS = 80  # tokens of a prompt that are not audio
TEMPERATURE = 1.0  # the paper's, like LOSS
LOSS: dict[str, Any] = dict(clip_low=0.2, clip_high=0.2, beta=0.04)
NO_STOP = [-1]  # stop ids: no token ends a completion, so each has max_new_tokens

# ---- model and prompts ----


def qwen2_audio_7b() -> Any:
    """Return the shape of Qwen2-Audio-7B: 8.4 billion weights. Two numbers differ from transformers' defaults."""
    return Qwen2AudioConfig(text_config=dict(model_type="qwen2", vocab_size=156_032, intermediate_size=11_008))


def qwen2_audio_small() -> Any:
    """Return a shape of 48 million weights with about the real proportions: an eighth as wide, a quarter as deep."""
    audio = dict(d_model=160, encoder_layers=8, encoder_attention_heads=5, encoder_ffn_dim=640)
    text = dict(hidden_size=512, intermediate_size=1376, vocab_size=19_456)
    heads = dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    return Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", **audio),
        text_config=dict(model_type="qwen2", **text, **heads),
        audio_token_index=19_455,
    )


def qwen2_audio_tiny() -> Any:
    """Return a shape of 0.2 million weights for clips of up to 2 s, to test the benchmarks."""
    audio = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, max_source_positions=100)
    text = dict(hidden_size=64, intermediate_size=128, vocab_size=500, num_hidden_layers=2)
    return Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", **audio),
        text_config=dict(model_type="qwen2", **text, num_attention_heads=2, num_key_value_heads=2),
        audio_token_index=499,
    )


def build_model(config: Qwen2AudioConfig, dtype: torch.dtype, device: torch.device):
    """Build a model with random weights on the device. Apart from the weights, it is as load_policy returns it."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = Qwen2AudioForConditionalGeneration(config)
    torch.set_default_dtype(default)
    freeze_position_table(model)
    return model.eval()


def make_prompt(model, prompts: int, clip_seconds: float) -> Prompt:
    """Make prompts in the form of encode_prompts. Text and spectrogram are zeros, all clips are equally long."""
    audio, frames = model.config.audio_config, round(100 * clip_seconds)  # a mel frame is 10 ms
    tokens = audio_tokens(frames)
    with model.device:
        input_ids = torch.zeros(prompts, TEXT_TOKENS + tokens, dtype=torch.long)
        input_ids[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + tokens] = model.config.audio_token_id
        mel_mask = torch.arange(min(frames + PAD_FRAMES, 2 * audio.max_source_positions)) < frames
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "input_features": torch.zeros(prompts, audio.num_mel_bins, len(mel_mask)),
            "feature_attention_mask": mel_mask.long().repeat(prompts, 1),
        }


def add_bench_lora(model, rank: int) -> None:
    """Add LoRA with the default settings of the training scripts, audio tower included."""
    targets = LORA_TARGETS.split(",")
    add_lora(model, "random", rank=rank, alpha=32, dropout=0.0, targets=targets, freeze_audio_tower=False, seed=0)


# ---- a rank and its training step ----


class LoneRank(dist.ProcessGroup):
    """Rank 0 of a process group whose other ranks do not exist: each collective ends at once.

    (torch's own "fake" backend is made for this, but DistributedDataParallel gets no gradients back from it.)
    """

    def allreduce(self, tensors, options):  # type: ignore[override]
        done = Future(devices=[tensors[0].device] if tensors[0].is_cuda else None)
        done.set_result(tensors)
        return _create_work_from_future(done)

    def broadcast(self, tensors, options):  # type: ignore[override]
        return self.allreduce(tensors, options)

    def allgather(self, outputs, inputs, options):  # type: ignore[override]
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self.allreduce(inputs, options)


dist.Backend.register_backend("lone", lambda store, rank, size, timeout: LoneRank(rank, size), devices=["cpu", "cuda"])  # type: ignore[call-arg]


@contextmanager
def lone_rank(ranks: int):
    """Inside `with`, be rank 0 of a process group of that many ranks."""
    dist.init_process_group("lone", store=dist.HashStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class Rank:
    """The objects that a rank of grpo_aqa.train keeps from step to step."""

    policy: Any  # a Qwen2-Audio model
    reference: Any  # see grpo_aqa.make_reference
    ddp_policy: DistributedDataParallel
    optimizer: ShardedAdamW
    generator: torch.Generator
    loss: dict[str, Any]  # keywords of grpo_loss
    cuda_graph: bool
    decoder: GroupDecoder | None = None  # None before the first sampling


def make_rank(
    config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    checkpointing: bool | None,
    cuda_graph: bool = True,
    beta: float = LOSS["beta"],
    lora_rank: int = 0,
) -> Rank:
    """Make a policy with random weights, its reference, gradients and optimizer. Call it inside `with lone_rank(...)`.

    checkpointing: see policy.data_parallel.
    """
    policy = build_model(config, dtype, device)
    if lora_rank:
        add_bench_lora(policy, lora_rank)
    reference = make_reference(policy, beta, lora_rank, freeze_audio_tower=False)
    ddp_policy = data_parallel(policy, make_prompt(policy, 1, 1.0), checkpointing)
    generator = torch.Generator(device).manual_seed(0)
    optimizer = ShardedAdamW(trainable(policy))
    return Rank(policy, reference, ddp_policy, optimizer, generator, LOSS | {"beta": beta}, cuda_graph)


def sample(rank: Rank, prompt: Prompt, group_size: int, max_new_tokens: int) -> Tensor:
    """Sample `group_size` completions of each prompt, all of max_new_tokens tokens, [N, T]."""
    kept = rank.decoder and (rank.decoder.group_size, rank.decoder.max_new_tokens)
    if kept != (group_size, max_new_tokens):
        rank.decoder = None  # free its memory first
        rank.decoder = GroupDecoder(rank.policy, group_size, max_new_tokens, rank.cuda_graph)
    completions, _, _ = sample_group(
        rank.policy, prompt, group_size, max_new_tokens, TEMPERATURE, NO_STOP, rank.generator, rank.decoder
    )
    return completions


def learn(rank: Rank, prompt: Prompt, completions: Tensor, advantages: Tensor, parts: int, phase) -> float:
    """Run the reference pass and the training pass of a step, in `parts` parts. Return the loss.

    Both passes run inside `with phase(name)`, which measures them.
    """
    mask = torch.ones_like(completions, dtype=torch.bool)
    with phase("reference"):
        rollouts = make_rollouts(
            rank.policy, rank.reference, prompt, completions, mask, advantages,
            parts=parts, temperature=TEMPERATURE, keep_old=False,
        )  # fmt: skip
    with phase("train"):
        return accumulate_gradients(rank.ddp_policy, rollouts, temperature=TEMPERATURE, **rank.loss)["loss"]


def update(optimizer: ShardedAdamW) -> None:
    """Clip the gradient and take an optimizer step."""
    optimizer.step(lr=1e-6, grad_scale=clip_scale(optimizer.grad_norm(), max_grad_norm=1.0))


def take_step(
    rank: Rank, prompt: Prompt, *, group_size: int, max_new_tokens: int, parts: int, phase, sample=sample, learn=learn
) -> None:
    """Take a whole step as in grpo_aqa.train, without data and rewards. See `learn` for `parts` and `phase`."""
    with phase("sample"):
        completions = sample(rank, prompt, group_size, max_new_tokens)
    shape, device = (len(prompt["input_ids"]), group_size), completions.device
    rewards = torch.randn(shape, generator=rank.generator, device=device)
    learn(rank, prompt, completions, group_advantages(rewards).flatten(), parts, phase)
    with phase("update"):
        update(rank.optimizer)


# ---- results ----


def machine_name() -> str:
    """Return the name of the GPU, or of the CPU and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # on Linux, platform knows only the architecture
    models = re.findall(r"^model name\s*: (.+)$", info.read_text(errors="replace"), re.M) if info.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Return the versions of torch and transformers, and today's date."""
    today = date.today().isoformat()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "date": today}


def start_result(args: argparse.Namespace, ranks: int) -> dict:
    """Print machine and versions. Return them with the settings, as the beginning of a result."""
    machine, where, threads = machine_name(), versions(), torch.get_num_threads()
    print(f"{machine}, {', '.join(f'{name} {value}' for name, value in where.items())}, threads {threads}", flush=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "out")}
    result = {"machine": machine, "threads": threads, **where, "ranks": ranks}
    return result | {"settings": settings}


def describe(args: argparse.Namespace, clip_seconds: float) -> str:
    return (
        f"{args.prompts_per_rank} prompts with clips of {clip_seconds:g} s, {args.group_size} completions of "
        f"{args.max_new_tokens} tokens each"
    )


def save_line(save, name: str, value, unit: str = "", remark: str = "") -> None:
    """Save a line of the table of `python bench.py gpu`. remark: a note, for example a goal. See one_gpu for `save`."""
    save(**{name: {"value": value, "unit": unit, "remark": remark}})


def results_path(bench: str, machine: str) -> Path:
    """Return the path of a result without its ending: bench_results/<bench>_<machine>."""
    name = re.sub(r"[^\w.-]+", "_", machine).strip("_")
    return Path("bench_results", f"{bench}_{name}")


def save_results(result: dict, bench: str, machine: str, out: str | None) -> None:
    """Write a result as JSON to `out`, by default bench_results/<bench>_<machine>.json, and print the path."""
    path = Path(out or f"{results_path(bench, machine)}.json")
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"\nresults: {path}")
