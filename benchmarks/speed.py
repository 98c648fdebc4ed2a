"""Time of a step, compared with the same step computed the plain way and with the limits of the machine.

All times are of rank 0 of a run, in one process, with random weights. The other ranks do not exist, so no time includes
communication. The limits are measured, too: the rate of a product of large matrices, in the weights' dtype, and the
rate of a large copy. Operations are counted from the shapes, on tensors without data.

All prompts of a step share a forward and backward pass, the default of training. The plain way takes one prompt after
the other, as the paper's code does.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2AudioConfig

from benchmarks.memory import LiveBytes
from benchmarks.models import (
    GB,
    NO_STOP,
    TEMPERATURE,
    Rank,
    build_model,
    describe,
    learn,
    lone_rank,
    make_prompt,
    make_rank,
    qwen2_audio_7b,
    qwen2_audio_small,
    qwen2_audio_tiny,
    save_results,
    start_result,
    take_step,
)
from grpo_aqa import grpo_loss
from infra.processes import Clock
from model.decoding import GroupDecoder
from model.qwen2_audio import Prompt, language_model
from policy import completion_logprobs, sample_group

PHASES = ("sample", "reference", "train", "update")

# ---- the machine ----


def hardware(tiny: bool = False) -> tuple[Any, torch.dtype, torch.device, int]:
    """Choose model shape, dtype, device, and the number of ranks that share the optimizer state."""
    if tiny:
        return qwen2_audio_tiny(), torch.float32, torch.device("cpu"), 1
    if torch.cuda.is_available():
        return qwen2_audio_7b(), torch.bfloat16, torch.device("cuda"), 8  # no single GPU holds the optimizer state
    return qwen2_audio_small(), torch.float32, torch.device("cpu"), 1


def seconds_of(function, device: torch.device) -> float:
    """Measure the seconds of a call, including what it leaves running on the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the floating-point operations per second of a product of two large matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second of a large copy: bytes read plus bytes written."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)  # float32: 4.3 GB and 0.5 GB
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.nbytes / median(times[1:])


# ---- counts ----


def count_flops(
    config: Qwen2AudioConfig, clip_seconds: float, prompts: int, group_size: int, max_new_tokens: int
) -> dict[str, int]:
    """Count the floating-point operations that a step needs, by phase. Recomputing layers does not count.

    Counts matrix products and convolutions; attention counts as if nothing were masked. Sampling needs the same
    operations as the reference pass: each prompt once, all completion tokens but the last, the logits of all tokens.
    """
    # LiveBytes answers for operations that need data. SDPBackend.MATH computes attention with matrix products: the
    # counter does not know all fused kernels.
    with FakeTensorMode(), LiveBytes(), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config, torch.bfloat16, torch.device("cpu"))
        prompt = make_prompt(model, prompts, clip_seconds)
        tokens = torch.zeros(prompts * group_size, max_new_tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            logprobs, _ = completion_logprobs(model, prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), 1.0)
        with FlopCounterMode(display=False) as backward:
            logprobs.sum().backward()
    passed = forward.get_total_flops()
    return {"sample": passed, "reference": passed, "train": passed + backward.get_total_flops()}


def decode_bytes(
    model, *, prompts: int, prompt_tokens: int, completions: int, completion_tokens: float
) -> tuple[int, int]:
    """Count the bytes that a decode step must read: of the weights, and of keys and values.

    completion_tokens: how long each completion already is, on average over the steps.
    """
    text, config = language_model(model), model.config.text_config
    weights = [*text.layers.parameters(), *text.norm.parameters(), *model.lm_head.parameters()]
    head_size = text.layers[0].self_attn.head_dim
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * weights[0].itemsize
    tokens = prompts * prompt_tokens + completions * completion_tokens
    return sum(weight.nbytes for weight in weights), round(per_token * tokens)


def held_bytes(rank: Rank) -> int:
    """Count the bytes of weights, gradients, reference and optimizer state, which stay from step to step."""
    tensors = [*rank.policy.parameters(), *rank.reference.parameters()]
    tensors += [weight.grad for weight in rank.policy.parameters() if weight.grad is not None]
    tensors += [tensor for state in rank.optimizer.state.values() for tensor in state.values()]
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def allocated(function) -> tuple[int, int]:
    """Measure the bytes of CPU memory that a call allocates: at its peak, and at its end with its result still held."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = function()  # noqa: F841
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


# ---- the plain way ----


def split_prompt(prompt: Prompt, parts: int) -> list[Prompt]:
    """Split a batch into equal parts. Unlike slice_prompt, keep the padding: the plain way computes with it."""
    return [dict(zip(prompt, tensors)) for tensors in zip(*(tensor.chunk(parts) for tensor in prompt.values()))]


def plain_sample(rank: Rank, prompt: Prompt, group_size: int, max_new_tokens: int) -> Tensor:
    """Sample like models.sample, with transformers' generate(), one prompt after the other."""
    pieces = []
    for part in split_prompt(prompt, len(prompt["input_ids"])):
        sequences = rank.policy.generate(
            **part, do_sample=True, top_k=0, top_p=1.0, temperature=TEMPERATURE, pad_token_id=0,
            num_return_sequences=group_size, eos_token_id=None, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        pieces.append(sequences[:, part["input_ids"].shape[1] :])
    completions = torch.cat(pieces)
    # For a sampled <|AUDIO|>, transformers' forward would look for a clip.
    return completions.masked_fill(completions == rank.policy.config.audio_token_id, 0)


def plain_logprobs(model, prompt: Prompt, completions: Tensor) -> Tensor:
    """Compute log-probs [N, T] with transformers' forward: each prompt G times, clips of 30 s, logits of all tokens."""
    group_size, length = len(completions) // len(prompt["input_ids"]), completions.shape[1]
    inputs = {name: tensor.repeat_interleave(group_size, dim=0) for name, tensor in prompt.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], dim=1)
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, length), value=1)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    # Row by row, as the usual implementations of GRPO do to save memory.
    rows = zip(logits, inputs["input_ids"][:, 1:, None])
    return torch.stack([row.log_softmax(dim=-1).gather(-1, tokens)[:, 0] for row, tokens in rows])[:, -length:]


def plain_learn(rank: Rank, prompt: Prompt, completions: Tensor, advantages: Tensor, parts: int, phase) -> float:
    """Learn like models.learn, with plain_logprobs: the same gradients and loss."""
    policy, loss = rank.policy, 0.0
    batches = list(zip(split_prompt(prompt, parts), completions.chunk(parts), advantages.chunk(parts)))
    with phase("reference"), torch.no_grad():
        references = [plain_logprobs(rank.reference, part, tokens) for part, tokens, _ in batches]
    with phase("train"):
        if rank.ddp_policy.module.checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()  # transformers recomputes only in training mode; this model has no dropout
        for (part, tokens, part_advantages), ref_logprobs in zip(batches, references):
            logprobs, mask = plain_logprobs(policy, part, tokens), torch.ones_like(tokens)
            part_loss, _ = grpo_loss(logprobs, logprobs.detach(), ref_logprobs, part_advantages, mask, **rank.loss)
            (part_loss / parts).backward()
            loss += part_loss.item() / parts
        policy.eval()
    return loss


def pad_clips(model, prompt: Prompt) -> Prompt:
    """Pad the spectrograms to 30 s, as the processor does. (A tiny model: to the length that it was made for.)"""
    frames = prompt["feature_attention_mask"].shape[1]
    missing = 2 * model.config.audio_config.max_source_positions - frames
    names = ("input_features", "feature_attention_mask")
    return prompt | {name: F.pad(prompt[name], (0, missing)) for name in names}


# ---- step ----


def timed_step(rank: Rank, prompt: Prompt, **how) -> dict[str, float]:
    """Take a step and return its seconds by phase. how: other keywords of take_step."""
    clock = Clock(rank.generator.device)
    take_step(rank, prompt, phase=clock, **how)
    return {phase: clock.phases[phase] for phase in PHASES}


def both_ways(rank: Rank, clip_seconds: float, args: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    """Return for each way a function that takes a step and returns its seconds by phase."""
    prompt = make_prompt(rank.policy, args.prompts_per_rank, clip_seconds)
    take = partial(timed_step, rank, group_size=args.group_size, max_new_tokens=args.max_new_tokens)
    return {
        "plain": partial(
            take, pad_clips(rank.policy, prompt), parts=args.prompts_per_rank, sample=plain_sample, learn=plain_learn
        ),
        "ours": partial(take, prompt, parts=1),
    }


def measured_step(rank: Rank, step: Callable[[], dict[str, float]]) -> tuple[dict[str, float], int]:
    """Take a step. Return its seconds by phase and the peak memory that comes on top of held_bytes; 0 on a CPU."""
    if rank.generator.device.type == "cpu":
        return step(), 0
    torch.cuda.reset_peak_memory_stats()
    seconds = step()
    return seconds, torch.cuda.max_memory_allocated() - held_bytes(rank)


def time_both_ways(rank: Rank, clip_seconds: float, args: argparse.Namespace) -> dict:
    """Take steps of both ways in turn.

    Returns for each way the seconds of each round by phase, and the peak memory that comes on top of held_bytes.
    """
    ways = both_ways(rank, clip_seconds, args)
    rounds, beside = {way: [] for way in ways}, dict.fromkeys(ways, 0)
    for i in range(args.rounds + 1):
        for way, step in ways.items():
            seconds, beside[way] = measured_step(rank, step)
            if i > 0:  # the first round warms up
                rounds[way].append(seconds)
    if rank.generator.device.type == "cpu":  # in a step of its own, because the profiler slows it down
        beside = {way: allocated(step)[0] for way, step in ways.items()}
    return {"rounds": rounds, "beside_gb": {way: nbytes / GB for way, nbytes in beside.items()}}


def bench_step(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, rate = start_result(args, ranks) | {"clips": []}, matmul_rate(dtype, device)
    result["matmul_flops_per_s"] = rate
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing=args.gradient_checkpointing, cuda_graph=args.cuda_graph)
        result["held_gb"] = held_bytes(rank) / GB
        for clip_seconds in args.clip_seconds:
            found = time_both_ways(rank, clip_seconds, args)
            found["flops"] = count_flops(
                config, clip_seconds, args.prompts_per_rank, args.group_size, args.max_new_tokens
            )
            result["clips"].append({"clip_seconds": clip_seconds} | found)
            print(f"\nstep: {describe(args, clip_seconds)}")
            print(step_report(found, result["held_gb"], rate), flush=True)
    save_results(result, "step", result["machine"], args.out)


def step_report(found: dict, held_gb: float, rate: float) -> str:
    """Make the table of both ways. found: what time_both_ways returns, and flops. rate: operations per second."""
    rounds, beside = found["rounds"], found["beside_gb"]
    title = f"seconds, median of {len(rounds['ours'])}"
    lines = [f"  {title:<24}" + "".join(f"{name:>11}" for name in (*PHASES, "step", "more GB"))]
    totals = {way: [sum(seconds.values()) for seconds in steps] for way, steps in rounds.items()}
    medians = {
        way: [median(seconds[phase] for seconds in rounds[way]) for phase in PHASES] + [median(totals[way])]
        for way in ("plain", "ours")
    }
    for way, values in medians.items():
        lines.append(f"  {way:<24}" + "".join(f"{value:11.3f}" for value in values) + f"{beside[way]:11.3f}")
    ratios = [plain / ours for plain, ours in zip(medians["plain"], medians["ours"])]
    ratios[-1] = median(plain / ours for plain, ours in zip(totals["plain"], totals["ours"]))  # of the rounds' ratios
    ratios.append(beside["plain"] / beside["ours"])
    lines.append(f"  {'plain / ours':<24}" + "".join(f"{ratio:11.2f}" for ratio in ratios))
    floors = {phase: flops / rate for phase, flops in found["flops"].items()}
    floors["step"] = sum(floors.values())
    shown = (f"{floors[name]:.3f}" if name in floors else "" for name in (*PHASES, "step"))
    lines.append(f"  {'floor':<24}" + "".join(f"{floor:>11}" for floor in shown))
    plain_peak, our_peak = held_gb + beside["plain"], held_gb + beside["ours"]
    return "\n".join([
        *lines,
        f"  The floor is {sum(found['flops'].values()) / 1e12:.3f} TFLOP at {rate / 1e12:.3f} TFLOP/s, the measured "
        f"rate of large matrices; ours takes {medians['ours'][-1] / floors['step']:.2f} times as long.",
        f"  \"more GB\" is the peak memory of a step on top of {held_gb:.2f} GB of weights, gradients, reference and\n"
        f"  optimizer state; both together are {plain_peak:.2f} GB for the plain step and {our_peak:.2f} GB for ours.",
    ])  # fmt: skip


# ---- sample ----


def bench_sample(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, bandwidth = start_result(args, ranks) | {"clips": []}, copy_bandwidth(device)
    result["copy_bytes_per_s"] = bandwidth
    model = build_model(config, dtype, device)
    for clip_seconds in args.clip_seconds:
        found = time_sampling(model, clip_seconds, args)
        result["clips"].append({"clip_seconds": clip_seconds} | found)
        sequences = args.prompts_per_rank * args.group_size
        print(f"\nsample: {describe(args, clip_seconds)}\n{sample_report(found, bandwidth, sequences)}", flush=True)
    save_results(result, "sample", result["machine"], args.out)


def time_sampling(
    model, clip_seconds: float, args: argparse.Namespace, decoder: GroupDecoder | None = None
) -> dict[str, Any]:
    """Measure the seconds of sampling one token (the prefill), a fifth of the tokens, and all of them, by round.

    Also returns the bytes that a decode step reads, on average over the steps between the fifth and the end.
    """
    prompt = make_prompt(model, args.prompts_per_rank, clip_seconds)
    decoder = decoder or GroupDecoder(model, args.group_size, args.max_new_tokens, args.cuda_graph)
    lengths, rounds = (1, args.max_new_tokens // 5, args.max_new_tokens), []
    for _ in range(args.rounds + 1):
        calls = [partial(sample_group, model, prompt, args.group_size, n, 1.0, NO_STOP, None, decoder) for n in lengths]
        rounds.append([seconds_of(call, model.device) for call in calls])
    weights, cache = decode_bytes(
        model, prompts=args.prompts_per_rank, prompt_tokens=prompt["input_ids"].shape[1],
        completions=args.prompts_per_rank * args.group_size, completion_tokens=(lengths[1] + lengths[2]) / 2,
    )  # fmt: skip
    return {"lengths": lengths, "rounds": rounds[1:], "weight_bytes": weights, "cache_bytes": cache}


def decode_step(found: dict, bandwidth: float) -> tuple[float, float]:
    """Return the seconds of a decode step, and its floor. found, bandwidth: see sample_report."""
    _, few, tokens = found["lengths"]
    step = median((whole - part) / (tokens - few) for _, part, whole in found["rounds"])
    return step, (found["weight_bytes"] + found["cache_bytes"]) / bandwidth


def sample_report(found: dict, bandwidth: float, sequences: int) -> str:
    """Make the table of sampling. found: what time_sampling returns. bandwidth: bytes per second."""
    (step, floor), tokens = decode_step(found, bandwidth), found["lengths"][-1]
    prefill, whole = (median(seconds[i] for seconds in found["rounds"]) for i in (0, 2))
    weights, cache = found["weight_bytes"], found["cache_bytes"]
    return "\n".join([
        f"  prefill, and the first token of each        {prefill:9.4f} s",
        f"  decode step, a token of each of {sequences:<4}        {1e3 * step:9.3f} ms   "
        f"{sequences / step:9.0f} tokens/s",
        f"  its floor                                   {1e3 * floor:9.3f} ms   {floor / step:9.0%} of a step's time",
        f"  all {tokens:<4} tokens of each                     {whole:9.4f} s    "
        f"{sequences * tokens / whole:9.0f} tokens/s",
        f"  The floor is to read {weights / GB:.3f} GB of weights and {cache / GB:.3f} GB of keys and values at "
        f"{bandwidth / GB:.1f} GB/s, the measured rate of a large copy.",
    ])  # fmt: skip


# ---- train ----


def bench_train(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, rate = start_result(args, ranks) | {"clips": []}, matmul_rate(dtype, device)
    result["matmul_flops_per_s"] = rate
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing=args.gradient_checkpointing)
        recomputing = "yes" if rank.ddp_policy.module.checkpointing else "no"
        for clip_seconds in args.clip_seconds:
            found = time_learning(rank, clip_seconds, args)
            found["flops"] = count_flops(
                config, clip_seconds, args.prompts_per_rank, args.group_size, args.max_new_tokens
            )
            result["clips"].append({"clip_seconds": clip_seconds} | found)
            print(f"\ntrain: {describe(args, clip_seconds)}, recomputing layers: {recomputing}")
            print(train_report(found, rate), flush=True)
    save_results(result, "train", result["machine"], args.out)


def time_learning(rank: Rank, clip_seconds: float, args: argparse.Namespace, parts: int = 1) -> dict:
    """Measure the seconds of the reference pass and of the policy's forward and backward pass, by round.

    parts: accumulation steps.
    """
    device, prompts = rank.generator.device, args.prompts_per_rank
    prompt = make_prompt(rank.policy, prompts, clip_seconds)
    rows, words = prompts * args.group_size, rank.policy.config.text_config.vocab_size
    completions = torch.randint(words, (rows, args.max_new_tokens), generator=rank.generator, device=device)
    rounds = []
    for _ in range(args.rounds + 1):
        clock, advantages = Clock(device), torch.randn(rows, generator=rank.generator, device=device)
        learn(rank, prompt, completions, advantages, parts=parts, phase=clock)
        rounds.append({phase: clock.phases[phase] for phase in ("reference", "train")})
        rank.policy.zero_grad(set_to_none=False)
    return {"rounds": rounds[1:]}


def train_report(found: dict, rate: float) -> str:
    """Make the table of both passes. found: what time_learning returns, and flops. rate: operations per second."""
    names = {"train": "policy, forward and backward", "reference": "reference, forward"}
    lines = [f"  {'':<30}{'seconds':>10}{'TFLOP':>10}{'TFLOP/s':>10}{'utilization':>14}"]
    for phase, name in names.items():
        seconds, flops = median(times[phase] for times in found["rounds"]), found["flops"][phase]
        reached = flops / seconds
        lines.append(f"  {name:<30}{seconds:10.3f}{flops / 1e12:10.3f}{reached / 1e12:10.3f}{reached / rate:14.1%}")
    lines.append(f"  100% is {rate / 1e12:.3f} TFLOP/s, as measured for large matrices. Recomputing does not count.")
    return "\n".join(lines)
