"""Time of an evaluation, compared with the plain loop: questions in file order, clips padded to 30 s, generate()."""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

from benchmarks.models import build_model, save_results, start_result
from benchmarks.speed import hardware, pad_clips
from data import Question
from evaluation.answering import answer_questions
from infra.audio import SAMPLE_RATE, audio_package
from policy import decode_text, encode_prompts, to_device
from training.toy_model import make_tokenizer

PLAIN_BATCH = 32  # questions


def make_questions(folder: Path, count: int, clip_seconds: list[float]) -> list[Question]:
    """Make questions about clips of noise. The clips have the given lengths in turn."""
    soundfile = audio_package("soundfile")
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        path, seconds = folder / f"{i}.wav", clip_seconds[i % len(clip_seconds)]
        soundfile.write(path, 0.1 * rng.standard_normal(round(SAMPLE_RATE * seconds)).clip(-3, 3), SAMPLE_RATE)
        choices = [f"a {name} {i}" for name in ("bell", "dog", "train", "voice")]
        made.append(Question(str(i), str(path), f"Which sound number {i} is heard in the audio?", choices, choices[0]))
    return made


@torch.no_grad()
def plain_answers(model, processor, questions: list[Question], template: str, max_new_tokens: int) -> list[str]:
    """Answer questions greedily, as usual evaluation scripts do. Return the same texts as answer_questions."""
    answers = []
    for start in range(0, len(questions), PLAIN_BATCH):
        prompt = encode_prompts(processor, questions[start : start + PLAIN_BATCH], template)
        prompt = to_device(pad_clips(model, prompt), model.device)
        tokens = model.generate(
            **prompt, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        completions = tokens[:, prompt["input_ids"].shape[1] :]
        answers += decode_text(processor, completions, torch.ones_like(completions, dtype=torch.bool))
    return answers


def bench_eval(args: argparse.Namespace) -> None:
    config, dtype, device, ranks = hardware()
    result = start_result(args, ranks)
    with tempfile.TemporaryDirectory() as folder:
        questions = make_questions(Path(folder), args.questions, args.clip_seconds)
        audio = config.audio_config
        mel = WhisperFeatureExtractor(audio.num_mel_bins, chunk_length=2 * audio.max_source_positions // 100)
        processor = Qwen2AudioProcessor(mel, make_tokenizer(questions))
        processor.tokenizer.padding_side = "left"
        config.audio_token_id = processor.audio_token_id
        model = build_model(config, dtype, device)
        model.lm_head.weight.data[processor.tokenizer.all_special_ids] = 0  # so all completions have max_new_tokens

        def plain() -> list[str]:
            return plain_answers(model, processor, questions, "answer", args.max_new_tokens)

        def ours() -> list[str]:
            texts = answer_questions(model, processor, questions, "answer", args.max_new_tokens, args.batch_size)
            return [text for (text,) in texts]

        ways = {"plain": plain, "ours": ours}
        rounds, texts = {way: [] for way in ways}, {}
        for i in range(args.rounds + 1):
            for way, answer in ways.items():
                started = time.perf_counter()
                texts[way] = answer()
                if i > 0:  # the first round warms up
                    rounds[way].append(time.perf_counter() - started)
    equal = sum(a == b for a, b in zip(*texts.values()))
    result["clips"] = {"clip_seconds": args.clip_seconds, "rounds": rounds, "equal_texts": equal}
    print(report(args, rounds, equal), flush=True)
    save_results(result, "eval", result["machine"], args.out)


def report(args: argparse.Namespace, rounds: dict[str, list[float]], equal: int) -> str:
    """Make the table of both ways. rounds: seconds of each round. equal: questions with the same text both ways."""
    ratio = median(plain / ours for plain, ours in zip(rounds["plain"], rounds["ours"]))
    lengths = " and ".join(f"{seconds:g}" for seconds in args.clip_seconds)
    lines = [f"\neval: {args.questions} questions, clips of {lengths} s, completions of {args.max_new_tokens} tokens"]
    for way, seconds in rounds.items():
        lines.append(f"  {way:<14}{median(seconds):9.2f} s{args.questions / median(seconds):9.2f} questions/s")
    lines.append(f"  plain / ours  {ratio:9.2f}      {equal} of {args.questions} texts equal")
    return "\n".join(lines)
