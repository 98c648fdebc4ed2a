"""Measure what training Qwen2-Audio takes, with random weights and nothing downloaded.

    python bench.py memory             GPU memory of each part of a step: counted anywhere, measured where a GPU is
    python bench.py memory --table     which cards that fits, as a Markdown table
    python bench.py step               seconds of a step, and of the same step computed the plain way
    python bench.py sample             sampling: tokens per second against the memory's bandwidth
    python bench.py train              the passes that learn: model FLOP utilization
    python bench.py eval               seconds of an evaluation, and of the plain loop over the same questions
    python bench.py scale              seconds of a step against group size, clip length, completion length, prompts

`bench.py --memory` is `bench.py memory`. Times are of Qwen2-Audio-7B in bfloat16 where there is a GPU, and of a model
a 175th of its size in float32 on a CPU.
"""

import argparse
import sys

import torch

from bench_eval import bench_eval
from bench_memory import memory
from bench_scale import bench_scale
from bench_speed import bench_sample, bench_step, bench_train
from errors import InputError
from flags import Parser

BENCHES = {"memory": memory, "step": bench_step, "sample": bench_sample, "train": bench_train}
BENCHES |= {"eval": bench_eval, "scale": bench_scale}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    if "--memory" in argv:
        argv = ["memory", *(word for word in argv if word != "--memory")]
    parser = Parser(description="Measure what training Qwen2-Audio takes. Nothing is downloaded.")
    benches = parser.add_subparsers(dest="what", required=True)

    def add_bench(name, help):
        bench = benches.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if name != "eval":
            bench.add_argument("--group_size", type=int, default=8, help="completions of each prompt")
            bench.add_argument("--prompts_per_rank", type=int, default=2, help="prompts per GPU and step")
        return bench.add_argument

    every_clip, every_completion = "length of every clip, up to 30 s", "length of every completion, in tokens"
    several = dict(default=[10.0], nargs="+", help=every_clip + "; several are measured one after the other")
    taking_turns = several | dict(help="lengths of the clips, up to 30 s, which take turns")

    def add_speed_bench(name, help, max_new_tokens, tokens_help=every_completion, clips=several):
        add = add_bench(name, help)
        add("--clip_seconds", type=float, **clips)
        add("--max_new_tokens", type=int, default=max_new_tokens, help=tokens_help)
        add("--rounds", type=int, default=5, help="rounds of which medians are taken; one before them warms up")
        add("--out", help=f"results; default: bench_results/{name}_<machine>.json")
        return add

    graph = dict(choices=("on", "off"), default="on", help="decode by CUDA graphs, on a GPU")
    checkpointing = dict(choices=("auto", "on", "off"), default="auto", help="recompute layers; auto: on a GPU")

    add = add_bench("memory", "GPU memory of a step of Qwen2-Audio-7B: counted, and measured on a GPU")
    add("--table", action="store_true", help="only count, for 1, 4 and 8 GPUs: which cards it fits")
    add("--gpus", type=int, default=8, help="processes, each with a GPU of its own")
    add("--clip_seconds", type=float, default=30.0, help=every_clip)
    add("--max_new_tokens", type=int, default=256, help=every_completion)
    add("--accumulation_steps", type=int, default=2, help="forward and backward passes that these are split into")
    add("--beta", type=float, default=0.04, help="weight of the KL penalty; 0 holds no reference model")
    add("--lora_rank", type=int, default=0, help="train a LoRA adapter of this rank; 0: full fine-tuning")
    add("--gradient_checkpointing", choices=("on", "off"), default="on", help="recompute layers to save memory")
    add("--cuda_graph", **graph)
    add("--out", help="results; default: bench_results/memory_<gpu>.json, memory_counted.json without a GPU")

    add = add_speed_bench("step", "seconds and memory of a step, and of the same step computed the plain way", 16)
    add("--gradient_checkpointing", **checkpointing)
    add("--cuda_graph", **graph)

    add = add_speed_bench(
        "sample",
        "sampling: tokens per second, and milliseconds of a decode step against the memory's bandwidth",
        80,
        "length of every completion, in tokens; a decode step is timed by sampling a fifth of it, too",
    )
    add("--cuda_graph", **graph)

    add = add_speed_bench("train", "training pass and reference pass: model FLOP utilization", 256)
    add("--gradient_checkpointing", **checkpointing)

    add = add_speed_bench(
        "eval",
        "seconds of an evaluation, and of the plain loop over the same questions",
        16,
        clips=taking_turns,
    )
    add("--questions", type=int, default=64, help="questions to answer")
    add("--batch_size", type=int, default=16, help="questions decoded at once; the plain loop's batches are of 32")

    about = "seconds of a step against four sizes, one varied at a time"
    add = add_speed_bench("scale", about, 16, clips=dict(default=10.0, help=every_clip))
    add("--gradient_checkpointing", **checkpointing)
    add("--cuda_graph", **graph)
    add("--seconds_per_point", type=float, default=10.0, help="no further round of a point begins after these seconds")
    add("--picture", default="docs/bench_scale.png", help="where to draw the curves")

    args = parser.parse_args(argv)
    error = benches.choices[args.what].error
    if args.what == "memory" and args.prompts_per_rank % args.accumulation_steps:
        error("--prompts_per_rank must be a multiple of --accumulation_steps")
    if args.what == "sample" and args.max_new_tokens < 10:
        error("--max_new_tokens must be at least 10")
    return args


def main() -> None:
    args = parse_args()
    BENCHES[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench.py: error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("bench.py: error: these settings need more memory than this GPU has")
