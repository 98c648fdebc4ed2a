"""What the benchmarks share: model shapes, random weights, prompts, rank 0 of a run with its step, results files."""

import argparse
import copy
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
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from decoding import GroupDecoder
from files import write_text
from grpo_aqa import Rollout, accumulate_gradients, group_advantages
from lora import adapter_off, add_lora
from optimizer import ShardedAdamW
from policy import Prompt, completion_logprobs, sample_group
from runtime import data_parallel
from training import LORA_TARGETS

GB = 1e9
TEXT_TOKENS = 80  # of a prompt, beside its clip's
SETTINGS: dict[str, Any] = dict(temperature=1.0, clip_low=0.2, clip_high=0.2, beta=0.04, ratio="token")  # the paper's
NO_STOP = [-1]  # no token ends a completion: all of them get max_new_tokens

# ---- model and prompts ----


def qwen2_audio_7b() -> Any:
    """The shape of Qwen2-Audio-7B, 8.4 billion weights with its audio tower: two numbers differ from the defaults."""
    return Qwen2AudioConfig(text_config=dict(model_type="qwen2", vocab_size=156_032, intermediate_size=11_008))


def qwen2_audio_small() -> Any:
    """48 million weights in about the proportions of the real 8.4 billion: an eighth as wide, a quarter as deep."""
    audio = dict(d_model=160, encoder_layers=8, encoder_attention_heads=5, encoder_ffn_dim=640)
    text = dict(hidden_size=512, intermediate_size=1376, vocab_size=19_456)
    heads = dict(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    return Qwen2AudioConfig(
        audio_config=dict(model_type="qwen2_audio_encoder", **audio),
        text_config=dict(model_type="qwen2", **text, **heads),
        audio_token_index=19_455,
    )


def build_model(config: Qwen2AudioConfig, dtype: torch.dtype, device: torch.device):
    """A model with random weights, made on the device, and otherwise as load_policy returns one."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = Qwen2AudioForConditionalGeneration(config)
    torch.set_default_dtype(default)
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model.eval()


def make_prompt(model, prompts: int, clip_seconds: float) -> Prompt:
    """What encode_prompts returns for clips of that length, with zeros as words and sound."""
    audio, frames = model.config.audio_config, round(100 * clip_seconds)  # 10 ms each
    _, audio_tokens = model.model.audio_tower._get_feat_extract_output_lengths(frames)
    with model.device:
        input_ids = torch.zeros(prompts, TEXT_TOKENS + audio_tokens, dtype=torch.long)
        input_ids[:, TEXT_TOKENS // 2 : TEXT_TOKENS // 2 + audio_tokens] = model.config.audio_token_id
        heard = torch.arange(min(frames + 2, 2 * audio.max_source_positions)) < frames
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "input_features": torch.zeros(prompts, audio.num_mel_bins, len(heard)),
            "feature_attention_mask": heard.long().repeat(prompts, 1),
        }


def add_bench_lora(model, rank: int) -> None:
    """LoRA of that rank as the training scripts add it by default, audio tower included."""
    add_lora(model, "random", rank, 32, 0.0, LORA_TARGETS.split(","), freeze_audio_tower=False, seed=0)


def trainable(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- rank 0 and its step ----


class LoneRank(dist.ProcessGroup):
    """Rank 0 of a process group whose other ranks don't exist: each collective is over at once.

    (torch's own "fake" backend, made for this, gives DistributedDataParallel no gradients back.)
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
def lone_rank(gpus: int):
    """Inside `with`, be rank 0 of that many."""
    dist.init_process_group("lone", store=dist.HashStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass
class Rank:
    """What a rank of grpo_aqa.train holds from step to step."""

    policy: Any  # a Qwen2-Audio model
    reference: Any  # another; None without a KL penalty; with LoRA the policy itself, whose adapter is then off
    ddp_policy: DistributedDataParallel
    optimizer: ShardedAdamW
    generator: torch.Generator
    settings: argparse.Namespace  # SETTINGS
    decoder: GroupDecoder | None = None  # once it has sampled


def make_rank(
    config, dtype: torch.dtype, device: torch.device, checkpointing: bool, beta=SETTINGS["beta"], lora_rank: int = 0
) -> Rank:
    """Inside `with lone_rank(...)`: a policy with random weights, its reference, gradients and optimizer."""
    policy = build_model(config, dtype, device)
    reference = None
    if lora_rank:
        add_bench_lora(policy, lora_rank)
        reference = policy if beta else None
    elif beta:
        reference = copy.deepcopy(policy).requires_grad_(False)
    ddp_policy = data_parallel(policy, make_prompt(policy, 1, 1.0), checkpointing)
    generator = torch.Generator(device).manual_seed(0)
    settings = argparse.Namespace(**SETTINGS | {"beta": beta})
    return Rank(policy, reference, ddp_policy, ShardedAdamW(trainable(policy)), generator, settings)


def sample(rank: Rank, prompt: Prompt, args: argparse.Namespace) -> Tensor:
    """Completions of args.max_new_tokens tokens, args.group_size of each prompt, [N, T]."""
    sizes = args.group_size, args.max_new_tokens
    if rank.decoder is None or sizes != (rank.decoder.group_size, rank.decoder.room):
        rank.decoder = None  # its memory goes first
        rank.decoder = GroupDecoder(rank.policy, *sizes, args.cuda_graph == "on")
    temperature = rank.settings.temperature
    return sample_group(rank.policy, prompt, *sizes, temperature, NO_STOP, rank.generator, rank.decoder)[0]


def learn(rank: Rank, prompt: Prompt, completions: Tensor, advantages: Tensor, args, phase) -> float:
    """Reference pass and training pass of a step, timed as such by `phase`. Returns the loss."""
    mask, rollouts = torch.ones_like(completions, dtype=torch.bool), []
    with phase("reference"), torch.no_grad():
        for part, rows in passes(prompt, args):
            inputs, ref_logprobs = (part, completions[rows], mask[rows]), None
            if rank.reference is not None:
                with adapter_off(rank.reference):
                    ref_logprobs, _ = completion_logprobs(rank.reference, *inputs, rank.settings.temperature)
            rollouts.append(Rollout(*inputs, advantages[rows], ref_logprobs, None))
    with phase("train"):
        return accumulate_gradients(rank.ddp_policy, rollouts, rank.settings)["loss"]


def passes(prompt: Prompt, args: argparse.Namespace) -> list[tuple[Prompt, slice]]:
    """The prompts of each of args.accumulation_steps forward and backward passes, and the rows of their completions."""
    prompts, group_size = len(prompt["input_ids"]), args.group_size
    size, parts = prompts // args.accumulation_steps, []
    for i in range(0, prompts, size):  # not slice_prompt: the plain way's 30 s of frames are to stay
        part = {name: tensor[i : i + size] for name, tensor in prompt.items()}
        parts.append((part, slice(i * group_size, (i + size) * group_size)))
    return parts


def take_step(rank: Rank, prompt: Prompt, args: argparse.Namespace, phase, sample=sample, learn=learn) -> None:
    """A whole step as grpo_aqa.train takes it, but for data and rewards, under phase("sample") and so on."""
    with phase("sample"):
        completions = sample(rank, prompt, args)
    shape, device = (len(prompt["input_ids"]), args.group_size), completions.device
    rewards = torch.randn(shape, generator=rank.generator, device=device)
    learn(rank, prompt, completions, group_advantages(rewards).flatten(), args, phase)
    with phase("update"):
        rank.optimizer.step(lr=1e-6, max_grad_norm=1.0)


# ---- results ----


def machine_name() -> str:
    """The GPU, or the CPU and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # where platform finds no more than the architecture
    models = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else []
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """What a result depends on beside the machine."""
    today = date.today().isoformat()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "date": today}


def save_results(result: dict, what: str, machine: str, out: str | None) -> None:
    """Write a result as JSON to `out`, by default bench_results/<what>_<machine>.json, and say so."""
    name = re.sub(r"[^\w.-]+", "_", machine).strip("_")
    path = Path(out or f"bench_results/{what}_{name}.json")
    write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"\nresults: {path}")
