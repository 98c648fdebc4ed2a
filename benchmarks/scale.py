"""How the time of a step grows with four sizes, varied one at a time: a table and a picture."""

import argparse
import time
from pathlib import Path
from statistics import median

from benchmarks.models import Rank, describe, lone_rank, make_prompt, make_rank, save_results, start_result
from benchmarks.speed import PHASES, hardware, timed_step
from infra.pictures import save_picture

SIZES = {
    "group_size": (2, 4, 8, 16, 32),
    "clip_seconds": (1, 5, 10, 20, 30),
    "max_new_tokens": (16, 64, 128, 256, 512),
    "prompts_per_rank": (1, 2, 4, 8),
}
LABELS = {
    "group_size": "completions per prompt",
    "clip_seconds": "clip length (s)",
    "max_new_tokens": "completion length (tokens)",
    "prompts_per_rank": "prompts per rank",
}


def bench_scale(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, measured = start_result(args, ranks), {}
    print(f"\nscale: around {describe(args, args.clip_seconds)}")
    around = {name: getattr(args, name) for name in SIZES}
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, checkpointing=args.gradient_checkpointing, cuda_graph=args.cuda_graph)
        curves = {}
        for name, values in SIZES.items():
            print(f"\n  {LABELS[name]:<28}" + "".join(f"{phase:>11}" for phase in (*PHASES, "step")))
            curves[name] = []
            for value in sorted({*values, around[name]}):
                sizes = around | {name: value}
                key = tuple(sizes.values())
                if key not in measured:  # the four curves share a point
                    measured[key] = time_point(rank, **sizes, rounds=args.rounds, max_seconds=args.seconds_per_point)
                curves[name].append({"size": value} | measured[key])
                shown = [*measured[key]["seconds"].values(), step_seconds(measured[key])]
                print(f"  {value:<28g}" + "".join(f"{seconds:11.3f}" for seconds in shown), flush=True)
    draw(curves, result["machine"], Path(args.picture))
    save_results(result | {"curves": curves}, "scale", result["machine"], args.out)
    print(f"picture: {args.picture}")


def time_point(
    rank: Rank,
    *,
    group_size: int,
    clip_seconds: float,
    max_new_tokens: int,
    prompts_per_rank: int,
    rounds: int,
    max_seconds: float,
) -> dict:
    """Measure the median seconds of a step by phase, and the number of rounds that the medians are of.

    One more round comes first, to warm up. No round starts after max_seconds. If only the first round ran, it counts.
    """
    prompt, times = make_prompt(rank.policy, prompts_per_rank, clip_seconds), []
    started = time.perf_counter()
    while not times or len(times) <= rounds and time.perf_counter() - started < max_seconds:
        times.append(timed_step(rank, prompt, parts=1, group_size=group_size, max_new_tokens=max_new_tokens))
    times = times[1:] or times
    return {"rounds": len(times), "seconds": {phase: median(step[phase] for step in times) for phase in PHASES}}


def step_seconds(point: dict) -> float:
    return sum(point["seconds"].values())


def draw(curves: dict[str, list[dict]], machine: str, path: Path) -> None:
    """Draw a panel for each size: the seconds of a step and of its phases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for axis, (name, curve) in zip(axes.flat, curves.items()):
        sizes = [point["size"] for point in curve]
        total = [step_seconds(point) for point in curve]
        axis.plot(sizes, total, color="black", linewidth=2.2, marker="o", label="step")
        for phase in PHASES:
            axis.plot(sizes, [point["seconds"][phase] for point in curve], marker=".", linewidth=1.2, label=phase)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(LABELS[name])
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds of a step")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(machine, fontsize=10)
    save_picture(figure, path, dpi=80)
