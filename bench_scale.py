"""How a step's seconds grow with four sizes, one varied at a time: a table, where each curve bends, and a picture."""

import argparse
import math
import time
from pathlib import Path
from statistics import median

from bench_models import Rank, lone_rank, make_prompt, make_rank, save_results
from bench_speed import PHASES, describe, hardware, one_prompt_a_pass, start_result, timed_step
from files import replacing
from training import recomputes_layers

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
STEEP = 1.5  # a curve bends where doubling the size begins to cost this many times as much


def bench_scale(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result, measured = start_result(args, ranks), {}
    print(f"\nscale: around {describe(args, args.clip_seconds)}")
    with lone_rank(ranks):
        rank = make_rank(config, dtype, device, recomputes_layers(args, device))
        curves = {}
        for name, values in SIZES.items():
            print(f"\n  {LABELS[name]:<28}" + "".join(f"{phase:>11}" for phase in (*PHASES, "step")))
            curves[name] = []
            for value in sorted({*values, getattr(args, name)}):
                point = one_prompt_a_pass(args, **{name: value})
                key = tuple(getattr(point, size) for size in SIZES)
                if key not in measured:  # the four curves meet in a point
                    measured[key] = time_point(rank, point)
                curves[name].append({"size": value} | measured[key])
                shown = [*measured[key]["seconds"].values(), cost(measured[key])]
                print(f"  {value:<28g}" + "".join(f"{seconds:11.3f}" for seconds in shown), flush=True)
            print(f"  {bend_sentence(name, curves[name])}", flush=True)
    draw(curves, result["machine"], Path(args.picture))
    save_results(result | {"curves": curves}, "scale", result["machine"], args.out)
    print(f"picture: {args.picture}")


def time_point(rank: Rank, args: argparse.Namespace) -> dict:
    """Medians of a step's seconds, by phase, and of how many rounds. The first round counts only where it is alone."""
    prompt, rounds = make_prompt(rank.policy, args.prompts_per_rank, args.clip_seconds), []
    started = time.perf_counter()
    while not rounds or len(rounds) <= args.rounds and time.perf_counter() - started < args.seconds_per_point:
        rounds.append(timed_step(rank, prompt, args))
    rounds = rounds[1:] or rounds
    return {"rounds": len(rounds), "seconds": {phase: median(times[phase] for times in rounds) for phase in PHASES}}


def cost(point: dict) -> float:
    return sum(point["seconds"].values())


def doublings(curve: list[dict]) -> list[float]:
    """What doubling the size costs between neighbours of a curve: the factor by which a step's seconds grow."""
    return [2 ** (math.log(cost(b) / cost(a)) / math.log(b["size"] / a["size"])) for a, b in zip(curve, curve[1:])]


def bend(curve: list[dict]) -> int | None:
    """The first point from which on doubling the size costs STEEP times as much or more, if there is one."""
    factors = doublings(curve)
    return next((i for i in range(len(factors)) if min(factors[i:]) >= STEEP), None)


def bend_sentence(name: str, curve: list[dict]) -> str:
    """Where a curve bends, what doubling costs there, and which phase is to blame."""
    factors, i = doublings(curve), bend(curve)
    verdict = f"no bend up to {curve[-1]['size']:g}: doubling costs less than {STEEP} times there"
    if i is not None:
        verdict = f"bends at {curve[i]['size']:g}: from there on doubling costs {STEEP} times and more"
    i = len(factors) - 1 if i is None else i
    a, b = curve[i : i + 2]
    added = {phase: b["seconds"][phase] - a["seconds"][phase] for phase in PHASES}
    most = max(added, key=lambda phase: added[phase])
    return (
        f"{LABELS[name]}: {verdict} ({factors[i]:.2f} from {a['size']:g} to {b['size']:g}); "
        f"{added[most] / (cost(b) - cost(a)):.0%} of what is added there is the phase {most}."
    )


def draw(curves: dict[str, list[dict]], machine: str, path: Path) -> None:
    """A panel for each size: a step's seconds and its phases' over it, and a dotted line where the curve bends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for axis, (name, curve) in zip(axes.flat, curves.items()):
        sizes = [point["size"] for point in curve]
        axis.plot(sizes, [cost(point) for point in curve], color="black", linewidth=2.2, marker="o", label="step")
        for phase in PHASES:
            axis.plot(sizes, [point["seconds"][phase] for point in curve], marker=".", linewidth=1.2, label=phase)
        if (i := bend(curve)) is not None:
            axis.axvline(sizes[i], color="gray", linestyle=":")
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
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=80, format="png")
