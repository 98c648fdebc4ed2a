"""How fast a step is: beside the same step computed the plain way, and beside what the machine could do at best.

Everything is timed as rank 0 of a run, in one process, with random weights; the other ranks don't exist, so no time
holds any communication. What the machine can do is measured too: how fast it multiplies large matrices in the weights'
dtype, and how fast it copies memory. Operations are counted from the shapes, on tensors without data.
"""

import argparse
import os
import time
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

import bench_models
from bench_memory import LiveBytes
from bench_models import (
    GB,
    NO_STOP,
    Rank,
    build_model,
    lone_rank,
    machine_name,
    make_prompt,
    make_rank,
    passes,
    qwen2_audio_7b,
    qwen2_audio_small,
    save_results,
    take_step,
    versions,
)
from decoding import GroupDecoder
from grpo_aqa import grpo_loss
from policy import Prompt, completion_logprobs, sample_group
from runtime import Clock
from training import recomputes_layers

PHASES = ("sample", "reference", "train", "update")

# ---- machine ----


def hardware() -> tuple[Any, torch.dtype, torch.device, int]:
    """What is timed here: model shape, dtype and device, and how many ranks share the optimizer."""
    if torch.cuda.is_available():
        return qwen2_audio_7b(), torch.bfloat16, torch.device("cuda"), 8  # no GPU holds all of its optimizer state
    return qwen2_audio_small(), torch.float32, torch.device("cpu"), 1


def seconds_of(function, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a product of two large matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written ones added up."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)  # float32: 4.3 GB and 0.5 GB
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device) for _ in range(12)]
    return 2 * source.nbytes / median(times[1:])


# ---- counts ----


def count_flops(config: Qwen2AudioConfig, clip_seconds: float, args: argparse.Namespace) -> dict[str, int]:
    """Floating-point operations that a step's phases need, by phase; in `train`, none for recomputing layers.

    Counts matrix products and convolutions, attention as if nothing were masked. Sampling needs what the reference
    pass needs: the prompts once, all completion tokens but the last, the logits of all.
    """
    # The plain formula of attention is made of products that the counter knows, unlike some of its fused kernels.
    with FakeTensorMode(), LiveBytes(), sdpa_kernel(SDPBackend.MATH):
        model = build_model(config, torch.bfloat16, torch.device("cpu"))
        prompt = make_prompt(model, args.prompts_per_rank, clip_seconds)
        tokens = torch.zeros(args.prompts_per_rank * args.group_size, args.max_new_tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            logprobs, _ = completion_logprobs(model, prompt, tokens, torch.ones_like(tokens, dtype=torch.bool), 1.0)
        with FlopCounterMode(display=False) as backward:
            logprobs.sum().backward()
    passed = forward.get_total_flops()
    return {"sample": passed, "reference": passed, "train": passed + backward.get_total_flops()}


def decode_bytes(model, prompt_tokens: int, args: argparse.Namespace) -> tuple[int, int]:
    """Bytes that a decode step must read at least: weights, and keys and values when completions are half a fifth and
    half the whole of args.max_new_tokens long, as they are on average in the steps that bench_sample times."""
    text, config = model.model.language_model, model.config.text_config
    weights = [*text.layers.parameters(), *text.norm.parameters(), *model.lm_head.parameters()]
    head_size = text.layers[0].self_attn.head_dim
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * weights[0].itemsize
    completion_tokens = (shorter(args) + args.max_new_tokens) / 2
    tokens = args.prompts_per_rank * (prompt_tokens + args.group_size * completion_tokens)
    return sum(weight.nbytes for weight in weights), round(per_token * tokens)


def held_bytes(rank: Rank) -> int:
    """Bytes of weights, gradients, reference and optimizer state, which a step finds and leaves."""
    tensors = [*rank.policy.parameters(), *rank.reference.parameters()]
    tensors += [weight.grad for weight in rank.policy.parameters() if weight.grad is not None]
    tensors += [tensor for state in rank.optimizer.state.values() for tensor in state.values()]
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def allocated(function) -> tuple[int, int]:
    """Bytes of CPU memory that a call allocates at its peak, and that are left of it while its result is held."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = function()  # noqa: F841
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


# ---- the plain way ----


def plain_sample(rank: Rank, prompt: Prompt, args: argparse.Namespace) -> Tensor:
    """bench_models.sample by transformers' generate(), one prompt after the other."""
    pieces = []
    for part, _ in passes(prompt, args):
        sequences = rank.policy.generate(
            **part, do_sample=True, top_k=0, top_p=1.0, temperature=rank.settings.temperature, pad_token_id=0,
            num_return_sequences=args.group_size, eos_token_id=None, max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        pieces.append(sequences[:, part["input_ids"].shape[1] :])
    completions = torch.cat(pieces)
    # The forward pass would look for the audio of a sampled <|AUDIO|>.
    return completions.masked_fill(completions == rank.policy.config.audio_token_id, 0)


def plain_logprobs(model, prompt: Prompt, completions: Tensor) -> Tensor:
    """Log-probs [N, T] by transformers' forward over each prompt G times: 30 s of frames, all logits."""
    group_size, length = len(completions) // len(prompt["input_ids"]), completions.shape[1]
    inputs = {name: tensor.repeat_interleave(group_size, dim=0) for name, tensor in prompt.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], dim=1)
    inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, length), value=1)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    # Row by row, as GRPO's usual implementations do to save memory.
    rows = zip(logits, inputs["input_ids"][:, 1:, None])
    return torch.stack([row.log_softmax(dim=-1).gather(-1, tokens)[:, 0] for row, tokens in rows])[:, -length:]


def plain_learn(rank: Rank, prompt: Prompt, completions: Tensor, advantages: Tensor, args, phase) -> float:
    """bench_models.learn on repeated prompts: the same gradients and loss."""
    policy, settings, loss = rank.policy, rank.settings, 0.0
    parts = passes(prompt, args)
    with phase("reference"), torch.no_grad():
        references = [plain_logprobs(rank.reference, part, completions[rows]) for part, rows in parts]
    with phase("train"):
        if rank.ddp_policy.module.checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()  # where alone transformers recomputes; nothing is dropped out in this model
        for (part, rows), ref_logprobs in zip(parts, references):
            logprobs = plain_logprobs(policy, part, completions[rows])
            inputs = logprobs, logprobs.detach(), ref_logprobs, advantages[rows], torch.ones_like(completions[rows])
            part_loss, _ = grpo_loss(*inputs, settings.clip_low, settings.clip_high, settings.beta)
            (part_loss / len(parts)).backward()
            loss += part_loss.item() / len(parts)
        policy.eval()
    return loss


def pad_clips(model, prompt: Prompt) -> Prompt:
    """The prompt with 30 s of mel frames (a tiny model: what it was made for), as the processor makes them."""
    frames = prompt["feature_attention_mask"].shape[1]
    missing = 2 * model.config.audio_config.max_source_positions - frames
    names = ("input_features", "feature_attention_mask")
    return prompt | {name: F.pad(prompt[name], (0, missing)) for name in names}


# ---- step ----


def one_prompt_a_pass(args: argparse.Namespace, **changed) -> argparse.Namespace:
    """The settings with some of them changed and, as in the paper, a forward and backward pass for each prompt."""
    changed = vars(args) | changed
    return argparse.Namespace(**changed | {"accumulation_steps": changed["prompts_per_rank"]})


def timed_step(rank: Rank, prompt: Prompt, args: argparse.Namespace, **way) -> dict[str, float]:
    """Seconds of a step, by phase."""
    clock = Clock(rank.generator.device)
    take_step(rank, prompt, args, clock, **way)
    return {phase: clock.phases[phase] for phase in PHASES}


def time_both_ways(rank: Rank, clip_seconds: float, args: argparse.Namespace) -> dict:
    """Alternate steps of both ways. Returns of each its seconds by round and phase, and its peak beside held_bytes."""
    args, device = one_prompt_a_pass(args), rank.generator.device
    prompt = make_prompt(rank.policy, args.prompts_per_rank, clip_seconds)
    padded = pad_clips(rank.policy, prompt)
    ways = {
        "plain": partial(timed_step, rank, padded, args, sample=plain_sample, learn=plain_learn),
        "ours": partial(timed_step, rank, prompt, args),
    }
    rounds, beside = {way: [] for way in ways}, {}
    for i in range(args.rounds + 1):
        for way, step in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = step()
            if device.type == "cuda":
                beside[way] = torch.cuda.max_memory_allocated() - held_bytes(rank)
            if i > 0:  # the first round warms up
                rounds[way].append(seconds)
    if device.type == "cpu":
        beside = {way: allocated(step)[0] for way, step in ways.items()}  # too slow to be timed as well
    return {"rounds": rounds, "beside_gb": {way: nbytes / GB for way, nbytes in beside.items()}}


def bench_step(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, rate = start_result(args, ranks) | {"clips": []}, matmul_rate(dtype, device)
    result["matmul_flops_per_s"] = rate
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, recomputes_layers(args, device))
        result["held_gb"] = held_bytes(rank) / GB
        for clip_seconds in args.clip_seconds:
            found = time_both_ways(rank, clip_seconds, args) | {"flops": count_flops(config, clip_seconds, args)}
            result["clips"].append({"clip_seconds": clip_seconds} | found)
            print(f"\nstep: {describe(args, clip_seconds)}")
            print(step_report(found, result["held_gb"], rate), flush=True)
    save_results(result, "step", result["machine"], args.out)


def step_report(found: dict, held_gb: float, rate: float) -> str:
    rounds, beside = found["rounds"], found["beside_gb"]
    title = f"seconds, median of {len(rounds['ours'])}"
    lines = [f"  {title:<24}" + "".join(f"{name:>11}" for name in (*PHASES, "step", "GB beside"))]
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
        f"  The floor is {sum(found['flops'].values()) / 1e12:.3f} TFLOP at {rate / 1e12:.3f} TFLOP/s, as measured for "
        f"large matrices; ours takes {medians['ours'][-1] / floors['step']:.2f} times that.",
        f"  GB beside are what a step takes at its peak beside {held_gb:.2f} GB of weights, gradients, reference and\n"
        f"  optimizer state; with these, the plain step's peak is {plain_peak:.2f} GB and ours {our_peak:.2f} GB.",
    ])  # fmt: skip


# ---- sample ----


def shorter(args: argparse.Namespace) -> int:
    return args.max_new_tokens // 5


def bench_sample(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, bandwidth = start_result(args, ranks) | {"clips": []}, copy_bandwidth(device)
    result["copy_bytes_per_s"] = bandwidth
    model = build_model(config, dtype, device)
    for clip_seconds in args.clip_seconds:
        found = time_sampling(model, clip_seconds, args)
        result["clips"].append({"clip_seconds": clip_seconds} | found)
        print(f"\nsample: {describe(args, clip_seconds)}\n{sample_report(found, bandwidth, args)}", flush=True)
    save_results(result, "sample", result["machine"], args.out)


def time_sampling(model, clip_seconds: float, args: argparse.Namespace) -> dict:
    """Seconds of sampling one token (the prefill), a few, and all of them, by round; and the bytes of a decode step."""
    prompt = make_prompt(model, args.prompts_per_rank, clip_seconds)
    decoder = GroupDecoder(model, args.group_size, args.max_new_tokens, args.cuda_graph == "on")
    lengths, rounds = (1, shorter(args), args.max_new_tokens), []
    for _ in range(args.rounds + 1):
        calls = [partial(sample_group, model, prompt, args.group_size, n, 1.0, NO_STOP, None, decoder) for n in lengths]
        rounds.append([seconds_of(call, model.device) for call in calls])
    weights, cache = decode_bytes(model, prompt["input_ids"].shape[1], args)
    return {"lengths": lengths, "rounds": rounds[1:], "weight_bytes": weights, "cache_bytes": cache}


def sample_report(found: dict, bandwidth: float, args: argparse.Namespace) -> str:
    sequences, decoded = args.prompts_per_rank * args.group_size, args.max_new_tokens - shorter(args)
    step = median((whole - part) / decoded for _, part, whole in found["rounds"])
    prefill, whole = (median(seconds[i] for seconds in found["rounds"]) for i in (0, 2))
    weights, cache = found["weight_bytes"], found["cache_bytes"]
    floor = (weights + cache) / bandwidth
    return "\n".join([
        f"  prefill, and the first token of each        {prefill:9.4f} s",
        f"  decode step, a token of each of {sequences:<4}        {1e3 * step:9.3f} ms   "
        f"{sequences / step:9.0f} tokens/s",
        f"  its floor                                   {1e3 * floor:9.3f} ms   {floor / step:9.0%} of a step's time",
        f"  all {args.max_new_tokens:<4} tokens of each                     {whole:9.4f} s    "
        f"{sequences * args.max_new_tokens / whole:9.0f} tokens/s",
        f"  The floor is reading {weights / GB:.3f} GB of weights and {cache / GB:.3f} GB of keys and values at "
        f"{bandwidth / GB:.1f} GB/s, as measured for a large copy.",
    ])  # fmt: skip


# ---- train ----


def bench_train(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, rate = start_result(args, ranks) | {"clips": []}, matmul_rate(dtype, device)
    result["matmul_flops_per_s"] = rate
    checkpointing = recomputes_layers(args, device)
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing)
        for clip_seconds in args.clip_seconds:
            found = time_learning(rank, clip_seconds, args) | {"flops": count_flops(config, clip_seconds, args)}
            result["clips"].append({"clip_seconds": clip_seconds} | found)
            print(f"\ntrain: {describe(args, clip_seconds)}, recomputing layers: {'yes' if checkpointing else 'no'}")
            print(train_report(found, rate), flush=True)
    save_results(result, "train", result["machine"], args.out)


def time_learning(rank: Rank, clip_seconds: float, args: argparse.Namespace) -> dict:
    """Seconds of the reference pass and of the policy's forward and backward, by round."""
    args, device = one_prompt_a_pass(args), rank.generator.device
    prompt = make_prompt(rank.policy, args.prompts_per_rank, clip_seconds)
    rows, words = args.prompts_per_rank * args.group_size, rank.policy.config.text_config.vocab_size
    completions = torch.randint(words, (rows, args.max_new_tokens), generator=rank.generator, device=device)
    rounds = []
    for _ in range(args.rounds + 1):
        clock, advantages = Clock(device), torch.randn(rows, generator=rank.generator, device=device)
        bench_models.learn(rank, prompt, completions, advantages, args, clock)
        rounds.append({phase: clock.phases[phase] for phase in ("reference", "train")})
        rank.policy.zero_grad(set_to_none=False)
    return {"rounds": rounds[1:]}


def train_report(found: dict, rate: float) -> str:
    names = {"train": "policy, forward and backward", "reference": "reference, forward"}
    lines = [f"  {'':<30}{'seconds':>10}{'TFLOP':>10}{'TFLOP/s':>10}{'utilization':>14}"]
    for phase, name in names.items():
        seconds, flops = median(times[phase] for times in found["rounds"]), found["flops"][phase]
        reached = flops / seconds
        lines.append(f"  {name:<30}{seconds:10.3f}{flops / 1e12:10.3f}{reached / 1e12:10.3f}{reached / rate:14.1%}")
    lines.append(f"  Of {rate / 1e12:.3f} TFLOP/s, as measured for large matrices; recomputing is not counted.")
    return "\n".join(lines)


# ---- reports ----


def start_result(args: argparse.Namespace, ranks: int) -> dict:
    """What every result begins with; prints where it is measured."""
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
