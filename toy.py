"""The embedded default: a tiny real Qwen2-Audio that trains on a CPU, and the small world it listens to.

The model has the classes, the chat markup and the processor of Qwen2-Audio-7B-Instruct at a ten-thousandth of its
size. A short supervised warm start on partly wrong answers leaves it sure of the answer's form and unsure of the
answer: the state in which GRPO takes over a real model.

    python toy.py --questions FILE --out DIR     a tiny base model for your own questions, to try them on a laptop
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
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

from checkpoint import save_checkpoint
from data import TEMPLATES, InputError, Question, build_prompt, load_questions
from policy import completion_logprobs, encode_prompts, load_policy
from toy_world import write_world

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
MAX_SECONDS = 30  # of a clip; Qwen2-Audio's own limit


def make_tokenizer(questions: list[Question]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer: any text works, and the questions' own words become one token each."""
    texts = [build_prompt(q, template) + f"<answer>{q.answer}</answer>" for q in questions for template in TEMPLATES]
    texts += ["system\nYou are a helpful assistant.", "user\nAudio 1: \n", "assistant\n"] * 10  # the chat markup's
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, min_frequency=4, show_progress=False)
    vocab_and_merges = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=vocab_and_merges["vocab"],
        merges=[tuple(pair) for pair in vocab_and_merges["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
    )


def make_model(questions: list[Question], seconds: int, seed: int):
    """A model with random weights and its processor, for clips of up to `seconds`. Returns (model, processor)."""
    tokenizer = make_tokenizer(questions)
    tokenizer.padding_side = "left"
    mel_bins = 40
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=seconds), tokenizer)
    initializer_range = 0.08  # about 1 / sqrt(hidden size); the usual 0.02 suits models of thousands, this one it stalls
    config = Qwen2AudioConfig(
        audio_config=dict(
            model_type="qwen2_audio_encoder",
            num_mel_bins=mel_bins,
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
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        initializer_range=initializer_range,
    )
    set_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def warm_start(model, processor, questions, steps, random_answers, seed, batch_size=32, lr=1e-3, template="answer"):
    """Supervised training on <answer>...</answer>; a share `random_answers` of the answers is any of the choices."""
    rng = np.random.default_rng(seed)
    tokenizer = processor.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    bar = tqdm(range(steps), desc="warm start", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = [questions[i] for i in rng.choice(len(questions), batch_size)]
        answers = [rng.choice(q.choices) if rng.random() < random_answers else q.answer for q in batch]
        targets = [tokenizer(f"<answer>{answer}</answer>{tokenizer.eos_token}")["input_ids"] for answer in answers]
        completions = tokenizer.pad({"input_ids": targets}, padding_side="right", return_tensors="pt")
        mask = completions["attention_mask"].bool()
        prompt = encode_prompts(processor, batch, template)
        logprobs, _ = completion_logprobs(model, prompt, completions["input_ids"], mask, temperature=1.0)
        loss = -logprobs.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def make_toy(folder: Path, seed: int) -> None:
    """Make folder/world (sounds and questions) and folder/base (the warm-started model), or find them there."""
    world, base = folder / "world", folder / "base"
    if not world.exists():
        print(f"making the toy's sounds and questions in {world}", flush=True)
        write_world(world)
    if not base.exists():
        questions = load_questions(str(world / "train.jsonl"))
        model, processor = make_model(questions, 2, 0)
        warm_start(model, processor, questions, int(os.environ.get("WS","120")), float(os.environ.get("WN",".5")), 0)
        save_checkpoint(base, model, processor)
