"""Measure what training Qwen2-Audio-7B takes.

    python bench.py --memory             GPU memory of each part of a step: counted anywhere, measured where a GPU is
    python bench.py --memory --table     which cards that fits, as a Markdown table

The count runs the project's own code on fake tensors, which have shapes and no data, and adds up the bytes that are
alive. The measurement plays rank 0 of a run on one GPU, with random weights and nothing downloaded; the other ranks
don't exist, so its times hold no communication. GB are 1e9 bytes.
"""

import argparse
import copy
import json
import sys
import time
import weakref
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from data import InputError
from decoding import GroupDecoder
from grpo_aqa import Rollout, accumulate_gradients
from optimizer import ShardedAdamW
from policy import Prompt, completion_logprobs, prefill, sample_group, sample_tokens, slice_prompt
from runtime import data_parallel

GB = 1e9
CARDS, FOR_CUDA = (24, 48, 80), 2  # GB of a card's memory, and what of it is left for the CUDA context and NCCL
TEXT_TOKENS = 80  # of a prompt, beside its clip's
SETTINGS = dict(temperature=1.0, clip_low=0.2, clip_high=0.2)
NO_STOP = [-1]  # no token ends a completion: all of them get max_new_tokens
aten = torch.ops.aten

# ---- model and prompts ----


def qwen2_audio_7b() -> Qwen2AudioConfig:
    """The shape of Qwen2-Audio-7B, 8.4 billion weights with its audio tower: two numbers differ from the defaults."""
    return Qwen2AudioConfig(text_config=dict(model_type="qwen2", vocab_size=156_032, intermediate_size=11_008))


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


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class LoneRank(dist.ProcessGroup):
    """Rank 0 of a process group whose other ranks don't exist: each collective is over at once.

    (torch's own "fake" backend, made for this, gives DistributedDataParallel no gradients back.)
    """

    def allreduce(self, tensors, options):
        done = Future(devices=[tensors[0].device] if tensors[0].is_cuda else None)
        done.set_result(tensors)
        return _create_work_from_future(done)

    def broadcast(self, tensors, options):
        return self.allreduce(tensors, options)

    def allgather(self, outputs, inputs, options):
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self.allreduce(inputs, options)


dist.Backend.register_backend("lone", lambda store, rank, size, timeout: LoneRank(rank, size), devices=["cpu", "cuda"])


@contextmanager
def lone_rank(gpus: int):
    """Inside `with`, be rank 0 of that many."""
    dist.init_process_group("lone", store=dist.HashStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- memory: counted ----


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
        with part("gradients"):  # held once, as DistributedDataParallel's buckets
            for parameter in trainable(model).values():
                parameter.grad = torch.zeros_like(parameter)
        with part("optimizer"):
            optimizer = ShardedAdamW(trainable(model))

        prompt = make_prompt(model, args.prompts_per_rank, args.clip_seconds)
        completions = torch.zeros(args.prompts_per_rank * args.group_size, args.max_new_tokens, dtype=torch.long)
        with part("sample"):
            held["cache"] = count_sampling(model, prompt, completions)

        prompt = slice_prompt(prompt, 0, args.prompts_per_rank // args.accumulation_steps)
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

    held["reference"] = held["weights"] if args.beta else 0
    fixed = sum(held[name] for name in ("weights", "gradients", "reference", "optimizer"))
    held["peak"] = fixed + max(held[name] for name in ("sample", "train", "update"))
    return {name: nbytes / GB for name, nbytes in held.items()}


@torch.no_grad()
def count_sampling(model, prompt: Prompt, completions: Tensor) -> int:
    """What sample_group does, with the last of its turns alone. Returns the bytes of its keys and values."""
    group_size, length = len(completions) // len(prompt["input_ids"]), completions.shape[1]
    hidden, cache = prefill(model, prompt)
    decoder = GroupDecoder(model, cache, prompt["attention_mask"], group_size, room=length - 1)
    hidden = hidden.repeat_interleave(group_size, dim=0)
    if length > 1:
        decoder.length = length - 2  # tokens before the last one that is decoded
        hidden = decoder.step(completions[:, -2])
    sample_tokens(model.lm_head(hidden), SETTINGS["temperature"], generator=None)
    return sum(keys.nbytes + values.nbytes for keys, values in decoder.prompt_cache + decoder.completion_cache)


# ---- memory: measured ----


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

    settings = argparse.Namespace(**SETTINGS, beta=args.beta)
    generator = torch.Generator(device).manual_seed(0)
    with lone_rank(args.gpus):
        with phase("setup"):
            policy = build_model(config, dtype, device)
            reference = copy.deepcopy(policy).requires_grad_(False) if args.beta else None
            prompt = make_prompt(policy, args.prompts_per_rank, args.clip_seconds)
            ddp_policy = data_parallel(policy, slice_prompt(prompt, 0, 1), args.gradient_checkpointing == "on")
            optimizer = ShardedAdamW(trainable(policy))
        for _ in range(2):
            with phase("sample"):
                completions, mask = sample_group(
                    policy, prompt, args.group_size, args.max_new_tokens, settings.temperature, NO_STOP, generator
                )
            advantages = torch.randn(len(completions), generator=generator, device=device)
            with phase("reference"), torch.no_grad():
                rollouts, size = [], args.prompts_per_rank // args.accumulation_steps
                for i in range(0, args.prompts_per_rank, size):
                    rows = slice(i * args.group_size, (i + size) * args.group_size)
                    inputs = slice_prompt(prompt, i, i + size), completions[rows], mask[rows]
                    ref_logprobs = None
                    if reference is not None:
                        ref_logprobs, _ = completion_logprobs(reference, *inputs, settings.temperature)
                    rollouts.append(Rollout(*inputs, advantages[rows], ref_logprobs, None))
            with phase("train"):
                accumulate_gradients(ddp_policy, rollouts, settings)
            with phase("update"):
                optimizer.step(lr=1e-6, max_grad_norm=1.0)
    return {"peak_gb": peaks or None, "reserved_gb": reserved or None, "seconds": seconds}


# ---- memory: reports ----

PARTS = {
    "weights": "policy weights",
    "gradients": "gradients",
    "reference": "reference",
    "optimizer": "optimizer state, this GPU's share",
    "sample": "beside these, in sampling",
    "cache": "    of this, keys and values at its end",
    "train": "beside these, in a training pass",
    "saved": "    of this, kept for the backward pass",
    "update": "beside these, in the update",
    "peak": "peak: the four, and the largest beside them",
}


def describe(args: argparse.Namespace) -> str:
    return (
        f"{args.clip_seconds:g} s clips, groups of {args.group_size} completions of {args.max_new_tokens} tokens, "
        f"{args.prompts_per_rank} prompts per GPU in {args.accumulation_steps} accumulation steps, "
        f"gradient checkpointing {args.gradient_checkpointing}"
    )


def memory_table(args: argparse.Namespace) -> str:
    """Which cards a run on 1, 4 or 8 GPUs fits, with and without a reference: counted, as Markdown."""
    lines = [
        f"Full fine-tuning of Qwen2-Audio-7B in bfloat16: {describe(args)}.",
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
    """Count, measure if there is a GPU, print both and write them to a file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("memory", "table", "out")},
        "counted_gb": count(qwen2_audio_7b(), torch.bfloat16, args),
    }
    print(f"Qwen2-Audio-7B in bfloat16 on {args.gpus} GPUs: {describe(args)}\n\ncounted GB per GPU")
    print(*(f"  {label:<45}{result['counted_gb'][name]:8.2f}" for name, label in PARTS.items()), sep="\n", flush=True)
    if gpu:
        result |= measure(qwen2_audio_7b(), torch.bfloat16, args, torch.device("cuda"))
        print(f"\nmeasured on {gpu}, torch {result['torch']}, transformers {result['transformers']}, {result['date']}")
        print(f"  {'phase':<12}{'peak GB':>10}{'seconds':>10}")
        for name, peak in result["peak_gb"].items():
            print(f"  {name:<12}{peak:10.2f}{result['seconds'][name]:10.2f}")
        print(f"  {'overall':<12}{max(result['peak_gb'].values()):10.2f}, reserved {result['reserved_gb']:.2f}")
    out = Path(args.out or f"bench_results/memory_{(gpu or 'counted').replace(' ', '_')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nresults: {out}")


# ---- command line ----


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what training Qwen2-Audio-7B takes. Nothing is downloaded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--memory", action="store_true", required=True, help="GPU memory of a step: counted, and measured on a GPU")
    add("--table", action="store_true", help="only count, for 1, 4 and 8 GPUs: which cards it fits")
    add("--gpus", type=int, default=8, help="processes, each with a GPU of its own")
    add("--clip_seconds", type=float, default=30.0, help="length of every clip, up to 30 s")
    add("--max_new_tokens", type=int, default=256, help="length of every completion, in tokens")
    add("--group_size", type=int, default=8, help="completions of each prompt")
    add("--prompts_per_rank", type=int, default=2, help="prompts per GPU and step")
    add("--accumulation_steps", type=int, default=2, help="forward and backward passes that these are split into")
    add("--beta", type=float, default=0.04, help="weight of the KL penalty; 0 holds no reference model")
    add("--gradient_checkpointing", choices=("on", "off"), default="on", help="recompute layers to save memory")
    add("--out", help="results; default: bench_results/memory_<gpu>.json, memory_counted.json without a GPU")
    args = parser.parse_args(argv)
    for name in ("gpus", "max_new_tokens", "group_size", "prompts_per_rank", "accumulation_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.prompts_per_rank % args.accumulation_steps:
        parser.error("--prompts_per_rank must be a multiple of --accumulation_steps")
    if not 0.1 <= args.clip_seconds <= 30:
        parser.error("--clip_seconds must be from 0.1 to 30")
    return args


def main() -> None:
    args = parse_args()
    if args.table:
        print(memory_table(args))
    else:
        memory(args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench.py: error: {error}")
