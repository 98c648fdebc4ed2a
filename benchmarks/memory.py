"""GPU memory of each part of a step: counted on any machine, measured on a GPU.

The count runs the project's own code on fake tensors, which have shapes but no data, and adds up the bytes in use. The
measurement runs rank 0 of a run on one GPU, with random weights. The other ranks do not exist, so its times include no
communication. 1 GB is 1e9 bytes.
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

from benchmarks.models import (
    GB,
    TEMPERATURE,
    Rank,
    add_bench_lora,
    build_model,
    lone_rank,
    make_prompt,
    make_rank,
    qwen2_audio_7b,
    save_results,
    take_step,
    update,
    versions,
)
from infra.errors import InputError
from model.decoding import GroupDecoder
from model.qwen2_audio import Prompt
from policy import completion_logprobs, prefill, sample_tokens
from training.optimizer import ShardedAdamW, trainable

CARDS = (24, 48, 80)  # GB of memory
FOR_CUDA = 2  # GB of a card that the CUDA context and NCCL need
aten = torch.ops.aten

# ---- counted ----


class LiveBytes(TorchDispatchMode):
    """Inside `with`, on fake tensors: count the bytes of all storages in use, now and at the peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = self.call(function, args, kwargs or {})
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

    def call(self, function, args, kwargs):
        """Call an operation. A result that depends on data, which fake tensors lack, is as if masks were all True."""
        if function is aten.index.Tensor and args[1][0].dtype == torch.bool:  # hidden[mask]
            return args[0].flatten(0, args[1][0].dim() - 1).clone()
        if function is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if function is aten._local_scalar_dense.default:  # .item() of the gradients' norm
            return 1.0
        # The backward pass adds up the gradients of a tensor in place, except under a mode like this one.
        if function is aten.add.Tensor and torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            return args[0].add_(args[1])
        return function(*args, **kwargs)


def count(config: Qwen2AudioConfig, dtype: torch.dtype, gpus: int, args: argparse.Namespace) -> dict[str, float]:
    """Count the GB that each part of a step takes on the first of `gpus` GPUs, by name as in PARTS.

    Allocates nothing. Counts tensors only: not the memory that kernels use inside, nor gaps between tensors that
    torch's allocator cannot use.
    """
    live, held = LiveBytes(), {}

    @contextmanager
    def part(name):
        before = live.peak = live.now
        yield
        held[name] = live.peak - before

    with lone_rank(gpus), FakeTensorMode(), live:
        with part("weights"):
            model = build_model(config, dtype, torch.device("cpu"))
            if args.lora_rank:
                add_bench_lora(model, args.lora_rank)
        with part("gradients"):  # only once: a gradient is a view into DistributedDataParallel's buckets
            for parameter in trainable(model).values():
                parameter.grad = torch.zeros_like(parameter)
        with part("optimizer"):
            optimizer = ShardedAdamW(trainable(model))

        prompt = make_prompt(model, args.prompts_per_rank, args.clip_seconds)
        completions = torch.zeros(args.prompts_per_rank * args.group_size, args.max_new_tokens, dtype=torch.long)
        decoder = GroupDecoder(model, args.group_size, args.max_new_tokens)
        with part("sample"):
            for _ in range(2):  # the first call allocates the decoder's memory, the second one finds it
                count_sampling(model, prompt, completions, decoder)
        cache = decoder.prompt_cache + decoder.completion_cache
        held["decoder"] = sum(keys.nbytes + values.nbytes for keys, values in cache)
        held["sample"] -= held["decoder"]

        prompt = make_prompt(model, args.prompts_per_rank // args.accumulation_steps, args.clip_seconds)
        completions = completions[: len(prompt["input_ids"]) * args.group_size]
        with part("train"):
            mask, before = torch.ones_like(completions, dtype=torch.bool), live.now
            logprobs, _ = completion_logprobs(
                model, prompt, completions, mask, TEMPERATURE, checkpointing=args.gradient_checkpointing
            )
            held["saved"] = live.now - before
            logprobs.sum().backward()
            del logprobs, _
        with part("update"):
            update(optimizer)

    held["reference"] = held["weights"] if args.beta and not args.lora_rank else 0
    fixed = sum(held[name] for name in ("weights", "gradients", "reference", "optimizer", "decoder"))
    held["peak"] = fixed + max(held[name] for name in ("sample", "train", "update"))
    return {name: nbytes / GB for name, nbytes in held.items()}


@torch.no_grad()
def count_sampling(model, prompt: Prompt, completions: Tensor, decoder: GroupDecoder) -> None:
    """Do what sample_group does, but decode only the last token."""
    hidden, cache = prefill(model, prompt)
    decoder.start(cache, prompt["attention_mask"])
    del cache
    hidden = hidden.repeat_interleave(decoder.group_size, dim=0)
    if completions.shape[1] > 1:
        decoder.decoded = completions.shape[1] - 2  # tokens before the one that goes through the model now
        hidden = decoder.step(completions[:, -2])
    sample_tokens(model.lm_head(hidden), TEMPERATURE, generator=None)


# ---- measured ----


class Peaks:
    """Measures phases: `with peaks("sample"): ...`. Raises InputError if memory runs out.

    peak_gb: the most memory allocated in any run of a phase, by phase. reserved_gb: the most that torch's allocator
    took from the GPU. Both are empty on a CPU. seconds: of the last run of each phase.
    """

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self.peak_gb: dict[str, float] = {}
        self.reserved_gb: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        started = time.perf_counter()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        except torch.OutOfMemoryError:
            raise InputError(f"these settings need more memory than this GPU has: phase {phase} ran out") from None
        if self.gpu:
            torch.cuda.synchronize()
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.peak_gb[phase] = max(self.peak_gb.get(phase, 0.0), allocated / GB)
            self.reserved_gb[phase] = max(self.reserved_gb.get(phase, 0.0), reserved / GB)
        self.seconds[phase] = time.perf_counter() - started


def set_up(config: Qwen2AudioConfig, dtype: torch.dtype, args: argparse.Namespace, device: torch.device) -> Rank:
    """Make the rank that the settings describe. Call it inside `with lone_rank(args.gpus)`."""
    return make_rank(
        config, dtype, device, checkpointing=args.gradient_checkpointing, cuda_graph=args.cuda_graph,
        beta=args.beta, lora_rank=args.lora_rank,
    )  # fmt: skip


def take_two_steps(rank: Rank, args: argparse.Namespace, peaks: Peaks) -> None:
    """Take two whole steps: the second one finds the memory that the first one allocated."""
    prompt = make_prompt(rank.policy, args.prompts_per_rank, args.clip_seconds)
    sizes = dict(group_size=args.group_size, max_new_tokens=args.max_new_tokens, parts=args.accumulation_steps)
    for _ in range(2):
        take_step(rank, prompt, **sizes, phase=peaks)


def measure(config: Qwen2AudioConfig, dtype: torch.dtype, args: argparse.Namespace, device: torch.device) -> Peaks:
    """Take two whole steps as rank 0 of args.gpus ranks. Raises InputError if memory runs out."""
    peaks = Peaks(device)
    with lone_rank(args.gpus):
        with peaks("setup"):
            rank = set_up(config, dtype, args, device)
        take_two_steps(rank, args, peaks)
    return peaks


# ---- reports ----

PARTS = {
    "weights": "policy weights, with the adapter",
    "gradients": "gradients",
    "reference": "reference weights",
    "optimizer": "optimizer state, this GPU's share",
    "decoder": "keys and values for sampling",
    "sample": "more while sampling",
    "train": "more during a training pass",
    "saved": "    part of it: saved for the backward pass",
    "update": "more during the update",
    "peak": 'peak: the first five and the largest "more"',
}


def describe_run(args: argparse.Namespace) -> str:
    trained = f"LoRA of rank {args.lora_rank}" if args.lora_rank else "full fine-tuning"
    return (
        f"{trained}, {args.clip_seconds:g} s clips, "
        f"groups of {args.group_size} completions of {args.max_new_tokens} tokens, "
        f"{args.prompts_per_rank} prompts per GPU in {args.accumulation_steps} accumulation steps, "
        f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    )


def memory_table(args: argparse.Namespace) -> str:
    """Make a Markdown table of the cards that a run fits, by GPUs, with and without a reference.

    LoRA has one row per number of GPUs: its reference is the policy with the adapter off, which takes no memory.
    """
    lines = [
        f"Qwen2-Audio-7B in bfloat16: {describe_run(args)}.",
        f"1 GB is 1e9 bytes; {FOR_CUDA} GB of each card are left for the CUDA context and NCCL.",
        "",
        f"| beta | GPUs | peak per GPU | {' | '.join(f'{card} GB card' for card in CARDS)} |",
        f"| --- | --- | --- |{' --- |' * len(CARDS)}",
    ]
    counts = {gpus: count(qwen2_audio_7b(), torch.bfloat16, gpus, args) for gpus in (1, 2, 4, 8)}
    for beta in (args.beta, 0) if args.beta and not args.lora_rank else (args.beta,):
        for gpus, counted in counts.items():
            peak = counted["peak"] if beta else counted["peak"] - counted["reference"]
            verdicts = ["fits" if peak + FOR_CUDA <= card else "does not fit" for card in CARDS]
            lines.append(f"| {beta:g} | {gpus} | {peak:.1f} GB | {' | '.join(verdicts)} |")
    return "\n".join(lines)


def bench_memory(args: argparse.Namespace) -> None:
    """Count, measure if there is a GPU, print both and write both to a file. With --table, print which cards fit."""
    if args.table:
        print(memory_table(args))
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "table", "out")}
    result: dict = {"gpu": gpu, **versions(), "settings": settings}
    result["counted_gb"] = count(qwen2_audio_7b(), torch.bfloat16, args.gpus, args)
    print(f"Qwen2-Audio-7B in bfloat16 on {args.gpus} GPUs: {describe_run(args)}\n\ncounted GB per GPU")
    print(*(f"  {label:<45}{result['counted_gb'][name]:8.2f}" for name, label in PARTS.items()), sep="\n", flush=True)
    if gpu:
        peaks = measure(qwen2_audio_7b(), torch.bfloat16, args, torch.device("cuda"))
        result |= {"peak_gb": peaks.peak_gb, "reserved_gb": peaks.reserved_gb, "seconds": peaks.seconds}
        print(f"\nmeasured on {gpu}, torch {result['torch']}, transformers {result['transformers']}, {result['date']}")
        print(f"  {'phase':<12}{'peak GB':>10}{'seconds':>10}")
        for name, peak in result["peak_gb"].items():
            print(f"  {name:<12}{peak:10.2f}{result['seconds'][name]:10.2f}")
        allocated, reserved = (max(result[name].values()) for name in ("peak_gb", "reserved_gb"))
        print(f"  {'overall':<12}{allocated:10.2f}, reserved {reserved:.2f}")
    save_results(result, "memory", gpu or "counted", args.out)
