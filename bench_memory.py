"""GPU memory of each part of a step: counted on fake tensors anywhere, measured where there is a GPU.

The count runs the project's own code on fake tensors, which have shapes and no data, and adds up the bytes that are
alive. The measurement plays rank 0 of a run on one GPU, with random weights and nothing downloaded; the other ranks
don't exist, so its times hold no communication. GB are 1e9 bytes.
"""

import argparse
import time
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2AudioConfig

from bench_models import (
    GB,
    SETTINGS,
    add_bench_lora,
    build_model,
    lone_rank,
    make_prompt,
    make_rank,
    qwen2_audio_7b,
    save_results,
    take_step,
    trainable,
    versions,
)
from decoding import GroupDecoder
from errors import InputError
from optimizer import ShardedAdamW
from policy import Prompt, completion_logprobs, prefill, sample_tokens

CARDS, FOR_CUDA = (24, 48, 80), 2  # GB of a card's memory, and what of it is left for the CUDA context and NCCL
aten = torch.ops.aten

# ---- counted ----


class LiveBytes(TorchDispatchMode):
    """Inside `with`, on fake tensors: the bytes of all storages that are alive now, and the most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = self.answer(function, args, kwargs or {})
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, nbytes: int) -> None:
        self.storages.remove(key)
        self.now -= nbytes

    def answer(self, function, args, kwargs):
        """An operation's result. What depends on data, which fake tensors lack, is as it would be for full masks."""
        if function is aten.index.Tensor and args[1][0].dtype == torch.bool:  # hidden[mask]
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if function is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if function is aten._local_scalar_dense.default:  # .item() of the gradients' norm
            return 1.0
        # The backward pass adds up a tensor's gradients in place, but not while a mode such as this one looks on.
        if function is aten.add.Tensor and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            return args[0].add_(args[1])
        return function(*args, **kwargs)


def count(config: Qwen2AudioConfig, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, float]:
    """GB that each part of a step takes on the GPU of rank 0, by name as in PARTS; allocates none.

    Counts tensors: neither what a kernel needs inside, nor what torch's allocator cannot use between them.
    """
    live, held = LiveBytes(), {}

    @contextmanager
    def part(name):
        before = live.peak = live.now
        yield
        held[name] = live.peak - before

    with lone_rank(args.gpus), FakeTensorMode(), live:
        with part("weights"):
            model = build_model(config, dtype, torch.device("cpu"))
            if args.lora_rank:
                add_bench_lora(model, args.lora_rank)
        with part("gradients"):  # held once, as DistributedDataParallel's buckets
            for parameter in trainable(model).values():
                parameter.grad = torch.zeros_like(parameter)
        with part("optimizer"):
            optimizer = ShardedAdamW(trainable(model))

        prompt = make_prompt(model, args.prompts_per_rank, args.clip_seconds)
        completions = torch.zeros(args.prompts_per_rank * args.group_size, args.max_new_tokens, dtype=torch.long)
        decoder = GroupDecoder(model, args.group_size, args.max_new_tokens)
        with part("sample"):
            for _ in range(2):  # the second call finds the decoder's memory allocated
                count_sampling(model, prompt, completions, decoder)
        cache = decoder.prompt_cache + decoder.completion_cache
        held["decoder"] = sum(keys.nbytes + values.nbytes for keys, values in cache)
        held["sample"] -= held["decoder"]

        prompt = make_prompt(model, args.prompts_per_rank // args.accumulation_steps, args.clip_seconds)
        completions = completions[: len(prompt["input_ids"]) * args.group_size]
        with part("train"):
            inputs, before = (prompt, completions, torch.ones_like(completions, dtype=torch.bool)), live.now
            checkpointing = args.gradient_checkpointing == "on"
            logprobs, _ = completion_logprobs(model, *inputs, SETTINGS["temperature"], checkpointing)
            held["saved"] = live.now - before
            logprobs.sum().backward()
            del logprobs, _
        with part("update"):
            optimizer.step(lr=1e-6, max_grad_norm=1.0)

    held["reference"] = held["weights"] if args.beta and not args.lora_rank else 0
    fixed = sum(held[name] for name in ("weights", "gradients", "reference", "optimizer", "decoder"))
    held["peak"] = fixed + max(held[name] for name in ("sample", "train", "update"))
    return {name: nbytes / GB for name, nbytes in held.items()}


@torch.no_grad()
def count_sampling(model, prompt: Prompt, completions: Tensor, decoder: GroupDecoder) -> None:
    """What sample_group does, with the last of its turns alone."""
    hidden, cache = prefill(model, prompt)
    decoder.start(cache, prompt["attention_mask"])
    del cache
    hidden = hidden.repeat_interleave(decoder.group_size, dim=0)
    if completions.shape[1] > 1:
        decoder.decoded = completions.shape[1] - 2  # tokens before the last one that is decoded
        hidden = decoder.step(completions[:, -2])
    sample_tokens(model.lm_head(hidden), SETTINGS["temperature"], generator=None)


# ---- measured ----


def measure(config: Qwen2AudioConfig, dtype: torch.dtype, args: argparse.Namespace, device: torch.device) -> dict:
    """Two whole steps as rank 0 of args.gpus takes them in grpo_aqa.train. Raises InputError if memory runs out.

    Returns, by phase, peak_gb, the most that was allocated in either step, and seconds, those of the second step; and
    reserved_gb, the most that torch's allocator took from the GPU. Without a GPU, the GB are None.
    """
    peaks, reserved, seconds = {}, 0.0, {}

    @contextmanager
    def phase(name):
        nonlocal reserved
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError:
            raise InputError(f"these settings need more memory than this GPU has: phase {name} ran out") from None
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[name] = max(peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / GB)
            reserved = max(reserved, torch.cuda.max_memory_reserved() / GB)
        seconds[name] = time.perf_counter() - started

    with lone_rank(args.gpus):
        with phase("setup"):
            checkpointing = args.gradient_checkpointing == "on"
            rank = make_rank(config, dtype, device, checkpointing, args.beta, args.lora_rank)
            prompt = make_prompt(rank.policy, args.prompts_per_rank, args.clip_seconds)
        for _ in range(2):
            take_step(rank, prompt, args, phase)
    return {"peak_gb": peaks or None, "reserved_gb": reserved or None, "seconds": seconds}


# ---- reports ----

PARTS = {
    "weights": "policy weights, adapter included",
    "gradients": "gradients",
    "reference": "reference",
    "optimizer": "optimizer state, this GPU's share",
    "decoder": "keys and values of the sampler",
    "sample": "beside these, in sampling",
    "train": "beside these, in a training pass",
    "saved": "    of this, kept for the backward pass",
    "update": "beside these, in the update",
    "peak": "peak: the five, and the largest beside them",
}


def describe(args: argparse.Namespace) -> str:
    trained = f"LoRA of rank {args.lora_rank}" if args.lora_rank else "full fine-tuning"
    return (
        f"{trained}, {args.clip_seconds:g} s clips, "
        f"groups of {args.group_size} completions of {args.max_new_tokens} tokens, "
        f"{args.prompts_per_rank} prompts per GPU in {args.accumulation_steps} accumulation steps, "
        f"gradient checkpointing {args.gradient_checkpointing}"
    )


def memory_table(args: argparse.Namespace) -> str:
    """Which cards a run on 1, 4 or 8 GPUs fits, with and without a reference: counted, as Markdown."""
    lines = [
        f"Qwen2-Audio-7B in bfloat16: {describe(args)}.",
        f"GB are 1e9 bytes; {FOR_CUDA} GB of each card are left for the CUDA context and NCCL.",
        "",
        f"| beta | GPUs | peak per GPU | {' | '.join(f'{card} GB card' for card in CARDS)} | |",
        f"| --- | --- | --- |{' --- |' * len(CARDS)} --- |",
    ]
    counts = {}
    for gpus in (1, 4, 8):
        counts[gpus] = count(qwen2_audio_7b(), torch.bfloat16, argparse.Namespace(**vars(args) | {"gpus": gpus}))
    for beta in (args.beta, 0) if args.beta else (0,):
        for gpus, counted in counts.items():
            peak = counted["peak"] if beta else counted["peak"] - counted["reference"]
            verdicts = ["fits" if peak + FOR_CUDA <= card else "does not fit" for card in CARDS]
            lines.append(f"| {beta:g} | {gpus} | {peak:.1f} GB | {' | '.join(verdicts)} | computed |")
    return "\n".join(lines)


def memory(args: argparse.Namespace) -> None:
    """Count, measure if there is a GPU, print both and write them to a file; with --table, say which cards fit."""
    if args.table:
        print(memory_table(args))
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "table", "out")}
    result: dict = {"gpu": gpu, **versions(), "settings": settings}
    result["counted_gb"] = count(qwen2_audio_7b(), torch.bfloat16, args)
    print(f"Qwen2-Audio-7B in bfloat16 on {args.gpus} GPUs: {describe(args)}\n\ncounted GB per GPU")
    print(*(f"  {label:<45}{result['counted_gb'][name]:8.2f}" for name, label in PARTS.items()), sep="\n", flush=True)
    if gpu:
        result |= measure(qwen2_audio_7b(), torch.bfloat16, args, torch.device("cuda"))
        print(f"\nmeasured on {gpu}, torch {result['torch']}, transformers {result['transformers']}, {result['date']}")
        print(f"  {'phase':<12}{'peak GB':>10}{'seconds':>10}")
        for name, peak in result["peak_gb"].items():
            print(f"  {name:<12}{peak:10.2f}{result['seconds'][name]:10.2f}")
        print(f"  {'overall':<12}{max(result['peak_gb'].values()):10.2f}, reserved {result['reserved_gb']:.2f}")
    save_results(result, "memory", gpu or "counted", args.out)
