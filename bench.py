"""Measure the memory and time of training Qwen2-Audio, with random weights. Nothing is downloaded.

    python bench.py memory             GPU memory of each part of a step: counted, and measured if there is a GPU
    python bench.py memory --table     which cards a run fits, as a Markdown table
    python bench.py step               seconds of a step, and of the same step computed the plain way
    python bench.py sample             sampling: tokens per second, compared with the memory's bandwidth
    python bench.py train              reference and training pass: model FLOP utilization
    python bench.py eval               seconds of an evaluation, and of the plain loop over the same questions
    python bench.py scale              seconds of a step for other group sizes, clip and completion lengths, prompts
    python bench.py gpu                on one H100 or H200: kernels, fidelity, memory and speed, within five minutes

`memory` is about Qwen2-Audio-7B in bfloat16. With a GPU, so are the times. Without one, the times are of a model that
is 175 times smaller, in float32.
"""

import argparse
import sys

import torch

from benchmarks.evaluation import bench_eval
from benchmarks.memory import bench_memory
from benchmarks.one_gpu import PARTS, bench_gpu
from benchmarks.scale import bench_scale
from benchmarks.speed import bench_sample, bench_step, bench_train
from infra.errors import InputError
from infra.flags import AUTO_ON_OFF, ON_OFF, Parser
from infra.processes import choose_kernels

BENCHES = {"memory": bench_memory, "step": bench_step, "sample": bench_sample, "train": bench_train}
BENCHES |= {"eval": bench_eval, "scale": bench_scale, "gpu": bench_gpu}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Measure the memory and time of training Qwen2-Audio. Nothing is downloaded.")
    benches = parser.add_subparsers(dest="what", required=True)

    def add_bench(name, help):
        bench = benches.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if name not in ("eval", "gpu"):
            bench.add_argument("--group_size", type=int, default=8, help="completions per prompt")
            bench.add_argument("--prompts_per_rank", type=int, default=2, help="prompts per GPU and step")
        return bench.add_argument

    every_clip, every_completion = "length of every clip, up to 30 s", "length of every completion, in tokens"
    several = dict(default=[10.0], nargs="+", help=every_clip + "; several lengths are measured one after the other")
    in_turn = several | dict(help="clip lengths, up to 30 s; the questions have them in turn")

    def add_speed_bench(name, help, max_new_tokens, tokens_help=every_completion, clips=several):
        add = add_bench(name, help)
        add("--clip_seconds", type=float, **clips)
        add("--max_new_tokens", type=int, default=max_new_tokens, help=tokens_help)
        add("--rounds", type=int, default=5, help="rounds to take medians of; one more comes first, to warm up")
        add("--out", help=f"results file; default: bench_results/{name}_<machine>.json")
        return add

    graph = ON_OFF | dict(default="on", help="on a GPU, decode with CUDA graphs")
    checkpointing = AUTO_ON_OFF | dict(default="auto", help="recompute layers in the backward pass; auto: on a GPU")

    add = add_bench("memory", "GPU memory of a step of Qwen2-Audio-7B: counted, and measured if there is a GPU")
    add("--table", action="store_true", help="only count, for 1, 2, 4 and 8 GPUs, and print which cards a run fits")
    add("--gpus", type=int, default=8, help="ranks, one GPU each")
    add("--clip_seconds", type=float, default=30.0, help=every_clip)
    add("--max_new_tokens", type=int, default=256, help=every_completion)
    add("--accumulation_steps", type=int, default=1, help="forward and backward passes per step")
    add("--beta", type=float, default=0.04, help="weight of the KL penalty; 0: no reference model")
    add("--lora_rank", type=int, default=0, help="train a LoRA adapter of this rank; 0: train all weights")
    add("--gradient_checkpointing", default="on", help="recompute layers in the backward pass", **ON_OFF)
    add("--cuda_graph", **graph)
    add("--out", help="results file; default: bench_results/memory_<gpu>.json, or memory_counted.json without a GPU")

    add = add_speed_bench("step", "seconds and memory of a step, and of the same step computed the plain way", 16)
    add("--gradient_checkpointing", **checkpointing)
    add("--cuda_graph", **graph)

    add = add_speed_bench(
        "sample",
        "sampling: tokens per second, and milliseconds of a decode step compared with the memory's bandwidth",
        80,
        every_completion + "; sampling a fifth of them is timed, too: the difference is the time of the decode steps",
    )
    add("--cuda_graph", **graph)

    add = add_speed_bench("train", "reference pass and training pass: model FLOP utilization", 256)
    add("--gradient_checkpointing", **checkpointing)

    about = "seconds of an evaluation, and of the plain loop over the same questions"
    add = add_speed_bench("eval", about, 16, clips=in_turn)
    add("--questions", type=int, default=64, help="questions to answer")
    add("--batch_size", type=int, default=16, help="questions per batch; the plain loop takes 32")

    about = "seconds of a step for other sizes, varied one at a time"
    add = add_speed_bench("scale", about, 16, clips=dict(default=10.0, help=every_clip))
    add("--gradient_checkpointing", **checkpointing)
    add("--cuda_graph", **graph)
    add("--seconds_per_point", type=float, default=10.0, help="after these seconds, start no more rounds of a size")
    add("--picture", default="docs/bench_scale.png", help="where to draw the curves")

    add = add_bench("gpu", "on one H100 or H200: kernels, fidelity, memory and speed, within five minutes")
    add("--parts", choices=list(PARTS), default=list(PARTS), nargs="+", help="parts to run, each in its own process")
    add("--tiny", action="store_true", help="run on the CPU, with a small model: only to test the parts")
    add("--out", help="folder of the results; default: bench_results/gpu_<machine>")

    args = parser.parse_args(argv)
    error = benches.choices[args.what].error
    if args.what == "memory" and args.prompts_per_rank % args.accumulation_steps:
        error("--prompts_per_rank must be a multiple of --accumulation_steps")
    if args.what == "sample" and args.max_new_tokens < 10:
        error("--max_new_tokens must be at least 10")
    return args


def main() -> None:
    args = parse_args()
    choose_kernels()
    BENCHES[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"bench.py: error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("bench.py: error: these settings need more memory than this GPU has")
