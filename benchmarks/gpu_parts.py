"""Parts `memory`, `decode`, `train` and `step` of `python bench.py gpu`. See one_gpu for how a part works.

All run the 7B shape with 2 prompts and 8 completions each. If `tiny`, the model and all sizes are small.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import Peaks, count, set_up, take_two_steps
from benchmarks.models import GB, NO_STOP, TEMPERATURE, build_model, lone_rank, make_prompt, make_rank, save_line
from benchmarks.speed import (
    PHASES,
    both_ways,
    copy_bandwidth,
    count_flops,
    decode_step,
    hardware,
    held_bytes,
    matmul_rate,
    measured_step,
    seconds_of,
    time_learning,
    time_sampling,
)
from infra.errors import InputError
from model.decoding import GroupDecoder
from policy import prefill, sample_group, sample_tokens

TOP = 12  # kernels that are listed by name

# ---- shared ----


def settings(tiny: bool, clip_seconds: float, max_new_tokens: int, **others) -> argparse.Namespace:
    """Return settings with the names of bench.py's flags."""
    sizes = dict(prompts_per_rank=2, group_size=8, clip_seconds=clip_seconds, max_new_tokens=max_new_tokens, rounds=2)
    if tiny:
        sizes |= dict(group_size=2, clip_seconds=clip_seconds / 15, max_new_tokens=min(max_new_tokens, 10), rounds=1)
    return argparse.Namespace(**sizes, **others)


@contextmanager
def noting_full_memory(save, name: str):
    """Inside `with`, save an out-of-memory error as the value `name`. The code after the block then runs."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError) as error:
        if "memory" not in str(error):
            raise
        save_line(save, name, "out of memory", remark=" ".join(str(error).split())[:200])


def median_ms(function: Callable[[], Any], device: torch.device) -> float:
    """Measure the milliseconds of a call: the median of five, after one to warm up."""
    return 1e3 * median([seconds_of(function, device) for _ in range(6)][1:])


def save_kernels(save, name: str, function: Callable[[], Any], device: torch.device, passes: int = 1) -> None:
    """Run a function under torch's profiler. Save number and times of its kernels, per pass.

    Saves the number of kernels, the sum of their times, the number of launches of kernels and graphs, and the TOP names
    with the most time. On a CPU, operations count as kernels.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints lines
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        function()
    times, numbers, launches = defaultdict(float), defaultdict(int), 0
    for event in profiler.profiler.kineto_results.events():  # key_averages() takes 25 s for 40,000 kernels
        kernel = event.name()[:150]
        if (event.device_type() == torch.autograd.DeviceType.CPU) == on_gpu:
            launches += kernel.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))
        elif not event.is_user_annotation():  # such as DistributedDataParallel.forward: a range of time, no kernel
            times[kernel] += event.duration_ns() / 1e6 / passes
            numbers[kernel] += 1
    save_line(save, f"{name}: kernels", sum(numbers.values()) / passes, "", f"{launches / passes:g} launches")
    save_line(save, f"{name}: sum of kernels", sum(times.values()), "ms")
    top = sorted(times, key=lambda kernel: times[kernel], reverse=True)[:TOP]
    save(**{f"{name}: kernel": [f"{times[kernel]:9.3f} ms {numbers[kernel] / passes:7g} x {kernel}" for kernel in top]})


# ---- the parts ----


def memory_part(tiny: bool, save) -> None:
    """Count and measure the memory of rank 0 of 8, with clips of 30 s and completions of 256 tokens."""
    (config, dtype, device, _), line = hardware(tiny), partial(save_line, save)
    fixed = dict(gpus=8, beta=0.04, lora_rank=0, gradient_checkpointing=True, cuda_graph=True)
    runs = {steps: settings(tiny, 30.0, 256, accumulation_steps=steps, **fixed) for steps in (2, 1)}
    counted = {steps: count(config, dtype, args.gpus, args) for steps, args in runs.items()}
    save(settings=[vars(args) for args in runs.values()], counted_gb=[*counted.values()])
    with lone_rank(8):
        peaks = Peaks(device)
        with peaks("setup"):
            rank = set_up(config, dtype, runs[2], device)
        for steps, args in runs.items():
            label = f"accumulation steps {steps}"
            with noting_full_memory(save, label):
                take_two_steps(rank, args, peaks)
            more = {phase: counted[steps][phase] for phase in ("sample", "train", "update")}
            line(f"peak, {label}", counted[steps]["peak"], "GB", "counted")
            for phase, allocated in peaks.peak_gb.items():
                remark = f"reserved {peaks.reserved_gb[phase]:.2f} GB"
                if phase in more:
                    remark += f", counted {counted[steps]['peak'] - max(more.values()) + more[phase]:.2f} GB"
                line(f"{phase}, {label}", allocated, "GB", remark)
            peaks = Peaks(device)
            torch.cuda.empty_cache()


@torch.no_grad()
def decode_part(tiny: bool, save) -> None:
    """Measure sampling with clips of 10 s, with and without CUDA graphs, and look at a decode step's kernels."""
    (config, dtype, device, _), line = hardware(tiny), partial(save_line, save)
    bandwidth = copy_bandwidth(device)
    save(settings=[vars(settings(tiny, 10.0, 64))])
    model = build_model(config, dtype, device)
    for graph, tokens in ((False, 20), (True, 64)):
        args, label = settings(tiny, 10.0, tokens, cuda_graph=graph), f"graphs {'on' if graph else 'off'}"
        prompt = make_prompt(model, args.prompts_per_rank, args.clip_seconds)
        prompts, prompt_tokens = prompt["input_ids"].shape
        decoder = GroupDecoder(model, args.group_size, args.max_new_tokens, graph, prompts, prompt_tokens)
        rollout = partial(sample_group, model, prompt, args.group_size, args.max_new_tokens, TEMPERATURE, NO_STOP)
        first = seconds_of(partial(rollout, decoder=decoder), device)
        line(f"first rollout, {label}", first, "s", f"{args.max_new_tokens} tokens")
        step, floor = decode_step(time_sampling(model, args.clip_seconds, args, decoder), bandwidth)
        line(f"decode step, {label}", 1e3 * step, "ms", f"floor {1e3 * floor:.2f} ms at {bandwidth / 1e12:.2f} TB/s")
        line(f"floor / decode step, {label}", 100 * floor / step, "%", "goal 60" if graph else "")

    line("prefill", median_ms(partial(prefill, model, prompt), device), "ms")
    _, cache = prefill(model, prompt)
    decoder.start(cache, prompt["attention_mask"])
    ids = torch.zeros(prompts * args.group_size, dtype=torch.long, device=device)
    save_kernels(save, "decode step", lambda: [decoder.step(ids) for _ in range(8)], device, passes=8)
    logits = model.lm_head(hidden := decoder.step(ids))
    line("lm_head of a token", median_ms(lambda: model.lm_head(hidden), device), "ms")
    line("drawing a token", median_ms(lambda: sample_tokens(logits, TEMPERATURE, None), device), "ms")


def train_part(tiny: bool, save) -> None:
    """Measure reference pass and training pass with clips of 10 s and completions of 256 tokens."""
    config, dtype, device, ranks = hardware(tiny)
    args, rate = settings(tiny, 10.0, 256), matmul_rate(dtype, device)
    flops = count_flops(config, args.clip_seconds, args.prompts_per_rank, args.group_size, args.max_new_tokens)
    save(settings=[vars(args)], flops=[flops])
    save_line(save, "large matrices", rate / 1e12, "TFLOP/s")
    few = argparse.Namespace(**vars(args) | {"max_new_tokens": 2, "rounds": 1})
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing=True)
        # The last two need the most memory, and may find too little.
        for parts, checkpointing in ((2, True), (1, True), (2, False), (1, False)):
            rank.ddp_policy.module.checkpointing = checkpointing
            label = f"accumulation steps {parts}, checkpointing {'on' if checkpointing else 'off'}"
            with noting_full_memory(save, label):
                rounds = time_learning(rank, args.clip_seconds, args, parts)["rounds"]
                # With so few tokens, the GPU is done as soon as the CPU has launched the last kernel.
                (launching,) = time_learning(rank, 0.5, few, parts)["rounds"]
                for phase in ("reference", "train") if checkpointing else ("train",):
                    seconds = median(times[phase] for times in rounds)
                    share = f"MFU {flops[phase] / seconds / rate:.1%}, goal 40%; "
                    share += f"{1e3 * launching[phase]:.0f} ms if tokens are few: the CPU's time"
                    save_line(save, f"{phase}, {label}", 1e3 * seconds, "ms", share)
            if (parts, checkpointing) == (1, True):
                once = argparse.Namespace(**vars(args) | {"rounds": 0})
                both = partial(time_learning, rank, args.clip_seconds, once, parts)
                save_kernels(save, f"both passes, {label}", both, device)


def step_part(tiny: bool, save) -> None:
    """Measure whole steps with 16 tokens: ours, then the plain way, each with clips of 10 s and of 30 s."""
    (config, dtype, device, ranks), line = hardware(tiny), partial(save_line, save)
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing=None)
        held, totals = held_bytes(rank) / GB, {}
        save(settings=[vars(settings(tiny, 30.0, 16))])
        line("weights, gradients, reference, optimizer state", held, "GB")
        for way, clip_seconds in (("ours", 10), ("ours", 30), ("plain", 10), ("plain", 30)):  # most memory last
            args, label = settings(tiny, clip_seconds, 16), f"{way}, clips of {clip_seconds} s"
            step = both_ways(rank, args.clip_seconds, args)[way]
            if way == "plain":
                rank.decoder = None  # frees the memory of our way
                torch.cuda.empty_cache()
            with noting_full_memory(save, label):
                steps = [measured_step(rank, step) for _ in range(args.rounds + 1)][1:]
                totals[way, clip_seconds] = total = median(sum(seconds.values()) for seconds, _ in steps)
                more = steps[-1][1]
                line(f"step, {label}", total, "s", f"peak {held + more / GB:.2f} GB" if more else "")
                for phase in PHASES:
                    line(f"    {phase}, {label}", median(seconds[phase] for seconds, _ in steps), "s")
                if ours := totals.get(("ours", clip_seconds)) if way == "plain" else None:
                    line(f"plain / ours, clips of {clip_seconds} s", total / ours)
        optimizer = rank.optimizer
        norm, send = (median_ms(call, device) for call in (optimizer.grad_norm, optimizer.send_weights))
        whole = median_ms(partial(optimizer.step, lr=1e-6, grad_scale=1.0), device)
        for name, ms in {"norm": norm, "AdamW": whole - send, "sending, but to no one": send}.items():
            line(f"update: {name}", ms, "ms")
