"""Settings of a training run: the flags that grpo_aqa.py and sft_aqa.py share, and the toy's defaults."""

import argparse
import os

from data import TEMPLATES
from infra.flags import AUTO_ON_OFF, ON_OFF, Parser
from model.checkpoints import DTYPES
from training.toy_model import FOLDER, paths

# ---- learning rates ----

LR = {"grpo_aqa.py": 1e-6, "sft_aqa.py": 1e-5}  # with --model; GRPO's is the paper's
TOY_LR = {"grpo_aqa.py": 3e-4, "sft_aqa.py": 1e-3}
LORA_LR = 10  # LoRA works best at about 10x the full fine-tuning rate (thinkingmachines.ai/blog/lora)

# ---- the toy: what a script trains without --model ----

TOY_MODEL, TOY_DATA, TOY_HELDOUT = map(str, paths(FOLDER))  # made by the first run, found by later ones
TOY_STEPS = 360
TOY_PROMPTS = 16  # per step over all ranks: the toy learns the same on 1, 2 and 8 ranks
TOY_TOKENS = 32  # longest completion
TOY = dict(steps=TOY_STEPS, max_new_tokens=TOY_TOKENS, dtype="float32", heldout_every=60)

# ---- LoRA ----

LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # language model; q, k, v also in the tower

# ---- the command line ----


def add_setting(parser: argparse._ActionsContainer, name: str, default, help: str, **kwargs) -> None:
    """Add the flag --name, of its default's type. The help line shows the default."""
    kind, shown = (str, "") if default is None else (type(default), " [%(default)s]")
    parser.add_argument(f"--{name}", **dict(default=default, type=kind, help=help + shown) | kwargs)


def shared_settings(description: str, defaults: dict, toy_defaults: dict) -> Parser:
    """Make the parser that both scripts share. A script adds its own flags, then calls parse_settings.

    defaults: `out` and `lr`, which differ between the scripts. toy_defaults: the defaults without --model.
    """
    shown = " ".join(f"--{name} {value}" for name, value in toy_defaults.items())
    parser = Parser(
        usage="%(prog)s [--model NAME --data FILE] [settings]",
        description=f"{description} Without --model, it uses the toy, which needs no GPU. The toy's defaults: {shown}, "
        f"--prompts_per_rank {TOY_PROMPTS} / ranks.",
    )

    def add(name, default, help, **kwargs):
        add_setting(parser, name, default, help, **kwargs)

    def switch(name, help):
        parser.add_argument(f"--{name}", action="store_true", help=help)

    add("model", None, "Hugging Face name or folder of a Qwen2-Audio model")
    add("data", None, "training questions: a JSON, JSON lines or CSV file")
    add("audio_dir", None, "folder of relative audio paths [the question file's]")
    add("heldout", None, "questions to score before and after training; audio paths start from their file's folder")
    add("heldout_every", 0, "steps between scores of the held-out questions; 0: only before and after training")
    add("out", defaults["out"], "run folder")
    add("steps", 1000, "training steps")
    add("prompts_per_rank", 2, "questions per rank and step")
    add("accumulation_steps", 1, "forward and backward passes per step")
    add("template", "answer", "prompt template", choices=TEMPLATES)
    add("max_new_tokens", 256, "longest completion, in tokens")
    lr = f"AdamW's learning rate at step 1, then linear decay to 0 [{defaults['lr']:g}; with LoRA {LORA_LR}x that]"
    add("lr", None, lr, type=float)
    add("max_grad_norm", 1.0, "clip the gradient to this global norm")
    add("seed", 0, "seed of the data order, sampling, dropout and LoRA's weights")
    add("dtype", "auto", "dtype of the weights; auto: bfloat16 on a GPU, else float32", choices=("auto", *DTYPES))
    add("gradient_checkpointing", "auto", "recompute layers in the backward pass; auto: on a GPU", **AUTO_ON_OFF)
    add("cuda_graph", "on", "on a GPU, decode with CUDA graphs", **ON_OFF)
    add("save_every", 100, "steps between checkpoints")
    add("save_state_every", None, "steps between resume states [as --save_every]", type=int)
    add("keep_last", 0, "keep this many of the newest checkpoints; 0: all")
    add("lora_rank", 0, "train LoRA adapters of this rank; 0: train all weights")
    add("lora_alpha", 32.0, "LoRA's product is scaled by alpha / rank")
    add("lora_dropout", 0.0, "dropout of LoRA's inputs in training")
    add("lora_targets", LORA_TARGETS, "names of the linear layers with adapters")
    switch("freeze_audio_tower", "do not train the audio tower")
    switch("vary_choice_order", "show a question's choices in a new random order each time it is used")
    switch("skip_bad_audio", "leave out questions with a missing or broken clip, instead of stopping")
    switch("tensorboard", "also write a log for TensorBoard, in the run folder; needs the package tensorboard")
    switch("resume", "continue the run in --out from its newest state")
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None, defaults: dict, toy_defaults: dict
) -> argparse.Namespace:
    """Parse and check a command line of shared_settings, which took the same dictionaries.

    Exits with one line if flags are missing or contradict each other.
    """
    args = parser.parse_args(argv)
    if args.model is None:
        for name in ("data", "audio_dir", "heldout"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model (`python toy.py --questions FILE --out DIR` makes a tiny one)")
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        parser.set_defaults(model=TOY_MODEL, data=TOY_DATA, heldout=TOY_HELDOUT, **toy_defaults | {"lr": None})
        parser.set_defaults(prompts_per_rank=max(1, TOY_PROMPTS // ranks))
        args, defaults = parser.parse_args(argv), toy_defaults
    elif args.data is None:
        parser.error("--model needs --data, a file of training questions")
    if args.heldout_every and not args.heldout:
        parser.error("--heldout_every needs --heldout, a file of held-out questions")
    name = os.path.basename(os.path.abspath(args.model))  # abspath: for "." and ".."
    args.out = args.out.replace("<model's name>", name)
    if args.lr is None:
        args.lr = defaults["lr"] * (LORA_LR if args.lora_rank else 1)
    if args.save_state_every is None:
        args.save_state_every = args.save_every

    for name in () if args.lora_rank else ("lora_alpha", "lora_dropout", "lora_targets"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --lora_rank")
    if args.prompts_per_rank % args.accumulation_steps:
        parser.error("--prompts_per_rank must be a multiple of --accumulation_steps")
    return args
