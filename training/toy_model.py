"""The toy: a tiny Qwen2-Audio that trains on a CPU.

The model has the classes, chat markup and processor of Qwen2-Audio-7B-Instruct, at a ten-thousandth of its size. A
short supervised warm start teaches all three templates, with a share of random answers. Afterwards the model masters
the form of an answer and is unsure of the answer itself. GRPO finds a real model in the same state.
"""

import json
import math
from collections.abc import Callable
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

from data import AUDIO_TOKEN, TEMPLATES, Question, build_prompt, load_questions, target_text
from infra.audio import audio_seconds
from infra.files import begin_folder, writing
from infra.ownership import owner_file, owning, require_ownership
from model.checkpoints import save_checkpoint
from policy import completion_logprobs, encode_prompts, encode_targets
from training.toy_world import write_world

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", AUDIO_TOKEN, "<|audio_bos|>", "<|audio_eos|>"]
FOLDER = Path("runs/toy")  # where the toy is made
HEARD_SECONDS = 30  # longest part of a clip, as for Qwen2-Audio
MEL_BINS = 40
STEPS = 300  # of the warm start: enough for the form of `think`, too few to master the questions


def make_tokenizer(questions: list[Question]) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer: it takes any text, and each word of the questions becomes one token."""
    texts = [build_prompt(q, name) + warm_start_text(q.known_answer, name) for q in questions for name in TEMPLATES]
    texts += ["system\nYou are a helpful assistant.", "user\nAudio 1: \n", "assistant\n"] * 10  # the chat markup
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, min_frequency=4, show_progress=False)
    vocab_and_merges = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=vocab_and_merges["vocab"],
        merges=[tuple(pair) for pair in vocab_and_merges["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )


def make_model(questions: list[Question], seconds: int, seed: int):
    """Make a model with random weights for clips of up to `seconds`. Returns (model, processor)."""
    tokenizer = make_tokenizer(questions)
    tokenizer.padding_side = "left"
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=seconds), tokenizer)
    initializer_range = 0.08  # about 1 / sqrt(hidden size); with the usual 0.02 this narrow model does not learn
    config = Qwen2AudioConfig(  # type: ignore[call-arg]  # its type hints are incomplete
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
    """Return the target of the warm start: target_text, and for `think` a thought that names the answer before it."""
    if template == "think":
        return f'<think>I hear "{answer}".</think>{target_text(answer, "answer")}'
    return target_text(answer, template)


def warm_start(model, processor, questions: list[Question], steps: int, random_answers: float, seed: int) -> None:
    """Train the model on warm_start_text. A share `random_answers` of the answers is a random choice.

    With a share of 1 the model learns the form and guesses. With less, and too many questions to learn by heart, it
    starts to listen, and GRPO has a shorter way. Batches of 16, the templates take turns. The learning rate rises to
    1e-3 over 50 steps and falls to 0 over the last third.
    """
    rng = np.random.default_rng(seed)
    known = [q.known_answer for q in questions]  # an open question has no choices: draw from all answers
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    bar = tqdm(range(1, steps + 1), desc="warm start", unit="step")
    for step in bar:
        template = list(TEMPLATES)[step % len(TEMPLATES)]
        batch = [questions[i] for i in rng.choice(len(questions), 16)]
        answers = [rng.choice(q.choices or known) if rng.random() < random_answers else q.known_answer for q in batch]
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
    """Return the paths of the toy's base model, training questions and held-out questions."""
    return folder / "base", folder / "world" / "train.jsonl", folder / "world" / "heldout.json"


def make_toy(folder: Path) -> None:
    """Make folder/world (sounds and questions) and folder/base (the warm-started model) unless they exist."""
    base, train, _ = paths(folder)
    make_world(train.parent)
    make_once(base, lambda: make_base(load_questions(str(train)), base))


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Call make() unless `folder` exists. If another job is making it, wait for that job."""
    if not folder.exists():
        with owning(owner_file(folder), patience=600):
            if not folder.exists():
                make()


def make_world(folder: Path, **settings) -> None:
    """Write the toy's sounds and questions to `folder` with write_world, unless the folder exists.

    The folder is complete or missing, even if the run is killed meanwhile. settings: keywords of write_world.
    """

    def make():
        print(f"making sounds and questions in {folder}", flush=True)
        with writing(folder, lambda: "check the disk, then try again"):
            unfinished = begin_folder(folder)
            write_world(unfinished, **settings)
            require_ownership()
            unfinished.rename(folder)

    make_once(folder, make)


def make_base(
    questions: list[Question], out: Path, seed: int = 0, steps: int = STEPS, random_answers: float = 0.6
) -> None:
    """Write a tiny warm-started base model for `questions` to the folder `out`. The defaults are the toy's."""
    longest = max(audio_seconds(question.audio) for question in questions)
    model, processor = make_model(questions, min(HEARD_SECONDS, math.ceil(longest)), seed)
    warm_start(model, processor, questions, steps, random_answers, seed)
    save_checkpoint(out, model, processor)
