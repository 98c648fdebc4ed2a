"""The embedded default: a tiny real Qwen2-Audio that trains on a CPU, and the small world it listens to.

The model has the classes, the chat markup and the processor of Qwen2-Audio-7B-Instruct at a ten-thousandth of its
size. A short supervised warm start in all three templates, on answers of which a share is picked at random, makes it
sure of the form of an answer and unsure of the answer: the state in which GRPO takes over a real model.

    python toy.py --questions FILE --out DIR     a tiny base model for your own questions, to try them on a laptop
    python toy.py --listen                       a picture of eight of the toy's clips, or of your own with --questions
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
    set_seed,
)

from audio import audio_seconds
from checkpoint import save_checkpoint
from contact_sheet import CLIPS, draw_contact_sheet, pick
from data import AUDIO_TOKEN, TEMPLATES, Question, build_prompt, load_questions, target_text
from errors import InputError
from files import begin_folder, check_folder
from flags import Parser
from policy import completion_logprobs, encode_prompts, encode_targets
from preflight import load_checked
from toy_world import write_world

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", AUDIO_TOKEN, "<|audio_bos|>", "<|audio_eos|>"]
FOLDER = Path("runs/toy")  # where the toy is made
HEARD_SECONDS = 30  # of a clip; Qwen2-Audio's own limit
MEL_BINS = 40
STEPS = 300  # of the warm start; enough for the form of think, the longest, and too few to master the questions


def make_tokenizer(questions: list[Question]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer: any text works, and the questions' own words become one token each."""
    texts = [build_prompt(q, name) + warm_start_text(q.known_answer, name) for q in questions for name in TEMPLATES]
    texts += ["system\nYou are a helpful assistant.", "user\nAudio 1: \n", "assistant\n"] * 10  # the chat markup's
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, min_frequency=4, show_progress=False)
    vocab_and_merges = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=vocab_and_merges["vocab"],
        merges=[tuple(pair) for pair in vocab_and_merges["merges"]],  # type: ignore[misc]  # what it takes
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )


def make_model(questions: list[Question], seconds: int, seed: int):
    """A model with random weights and its processor, for clips of up to `seconds`. Returns (model, processor)."""
    tokenizer = make_tokenizer(questions)
    tokenizer.padding_side = "left"
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=seconds), tokenizer)
    initializer_range = 0.08  # about 1 / sqrt(hidden size); the usual 0.02 suits far wider models and stalls this one
    config = Qwen2AudioConfig(  # type: ignore[call-arg]  # its own type hints know less than it takes
        audio_config=dict(
            model_type="qwen2_audio_encoder",
            num_mel_bins=MEL_BINS,
            d_model=96,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=384,
            max_source_positions=seconds * 50,
            initializer_range=initializer_range,
        ),
        text_config=dict(
            model_type="qwen2",
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            max_position_embeddings=2048,
            initializer_range=initializer_range,
        ),
        audio_token_index=tokenizer.get_vocab()[AUDIO_TOKEN],
        initializer_range=initializer_range,
    )
    set_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def warm_start_text(answer: str, template: str) -> str:
    """What the warm start has the model say: target_text's, and for `think` the same after a thought that names it."""
    if template == "think":
        return f'<think>I hear "{answer}".</think>{target_text(answer, "answer")}'
    return target_text(answer, template)


def warm_start(model, processor, questions: list[Question], steps: int, random_answers: float, seed: int) -> None:
    """Supervised training on warm_start_text, where a share `random_answers` of the answers is any choice.

    With a share of 1 the model learns the form and guesses; with less, on more questions than it can learn by heart,
    it starts to listen and GRPO gets going sooner. Batches of 16, one template after the other; the learning rate
    rises to 1e-3 over 50 steps and falls to 0 over the last third.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    bar = tqdm(range(1, steps + 1), desc="warm start", unit="step")
    for step in bar:
        template = list(TEMPLATES)[step % len(TEMPLATES)]
        batch = [questions[i] for i in rng.choice(len(questions), 16)]
        answers = [rng.choice(q.choices) if rng.random() < random_answers else q.known_answer for q in batch]
        completions, mask = encode_targets(processor, [warm_start_text(answer, template) for answer in answers])
        prompt = encode_prompts(processor, batch, template)
        logprobs, _ = completion_logprobs(model, prompt, completions, mask, temperature=1.0)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 50, 3 * (steps + 1 - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def paths(folder: Path) -> tuple[Path, Path, Path]:
    """Where make_toy puts the base model, the training questions and the held-out questions."""
    return folder / "base", folder / "world" / "train.jsonl", folder / "world" / "heldout.json"


def make_toy(folder: Path) -> None:
    """Make folder/world (sounds and questions) and folder/base (the warm-started model), or find them there."""
    base, train, _ = paths(folder)
    make_world(train.parent)
    if not base.exists():
        make_base(load_questions(str(train)), base)


def make_world(folder: Path, heldout_noise: float = 1.0, label_noise: float = 0.0) -> None:
    """Write the toy's world to `folder`, as write_world does, or find it there, whatever it was made with.

    It is there as a whole or not at all, also where a run is killed meanwhile.
    """
    if not folder.exists():
        print(f"making sounds and questions in {folder}", flush=True)
        unfinished = begin_folder(folder)
        write_world(unfinished, heldout_noise=heldout_noise, label_noise=label_noise)
        unfinished.rename(folder)  # fails where another process was faster


def make_base(
    questions: list[Question], out: Path, seed: int = 0, steps: int = STEPS, random_answers: float = 0.6
) -> None:
    """Write a tiny warm-started base model for `questions` to the folder `out`. The defaults are the toy's."""
    longest = max(audio_seconds(question.audio) for question in questions)
    model, processor = make_model(questions, min(HEARD_SECONDS, math.ceil(longest)), seed)
    warm_start(model, processor, questions, steps, random_answers, seed)
    save_checkpoint(out, model, processor)


def draw_examples(questions: list[Question], out: Path, seed: int) -> None:
    """Draw some of the questions with their clips, as the tiny model hears them. Raises InputError."""
    check_folder(out.parent, out)
    draw_contact_sheet(out, pick(questions, CLIPS, seed), MEL_BINS, HEARD_SECONDS)
    print(f"picture: {out}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="Make a tiny Qwen2-Audio base model for a question file, to try grpo_aqa.py on it without a GPU. "
        "With --listen: a picture of clips and questions instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--listen", action="store_true", help="draw eight example clips with their questions; alone: the toy's")
    add("--questions", help="training questions: R1-AQA, AVQA, MMAU or plain file")
    add("--audio_dir", help="folder that relative audio paths start from; default: the question file's")
    add("--out", help="folder for the model; with --listen, the picture (of the toy: runs/toy/listen.png)")
    add("--skip_bad_audio", action="store_true", help="go on without questions whose clip is missing or broken")
    add("--random_answers", type=float, default=1.0, help="share of its training answers that are any of the choices")
    add("--steps", type=int, default=STEPS, help="steps of the supervised warm start, 16 questions each")
    add("--seed", type=int, default=0, help="of the weights and the order of questions, or of the examples drawn")
    args = parser.parse_args(argv)
    needed = ("questions", "out") if not args.listen else ("out",) if args.questions else ()
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for name in ("skip_bad_audio", "random_answers", "steps") if args.listen else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} does not go with --listen")
    if args.listen and args.out and not args.out.endswith(".png"):
        parser.error("--listen draws a PNG picture: let --out end in .png")
    if args.audio_dir and not args.questions:
        parser.error("--audio_dir needs --questions")
    return args


def main() -> None:
    args = parse_args()
    if args.listen and args.questions:
        draw_examples(load_questions(args.questions, args.audio_dir), Path(args.out), args.seed)
        return
    if args.listen:
        train = paths(FOLDER)[1]
        make_world(train.parent)
        draw_examples(load_questions(str(train)), Path(args.out or FOLDER / "listen.png"), args.seed)
        return
    if os.path.exists(args.out):
        raise InputError(f"{args.out}: exists already; name a new folder with --out, or remove it")
    check_folder(Path(args.out))
    questions = load_checked(args.questions, args.audio_dir, args.skip_bad_audio, decode=True).questions
    make_base(questions, Path(args.out), args.seed, args.steps, args.random_answers)
    print(f"base model: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"toy.py: error: {error}")
