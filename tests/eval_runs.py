"""Evaluate in tests: make a question file with MMAU's keys, and run eval_mmau.py on it in this process."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import eval_mmau
from data import load_questions
from model.checkpoints import save_checkpoint
from training import toy_model

QUESTIONS = 20
BATCH = 3  # 7 batches


def make_home(folder):
    """Write `model/` with random weights, and `mmau.json` with 20 questions about clips of 0.3 to 2 s."""
    rng, records = np.random.default_rng(0), []
    (folder / "test-mini-audios").mkdir()
    for i in range(QUESTIONS):
        path = f"./test-mini-audios/clip-{i}.wav"
        noise = rng.normal(size=int(16_000 * rng.uniform(0.3, 2))).clip(-3, 3)
        soundfile.write(folder / path, rng.uniform(0.05, 0.3) * noise, 16_000)
        records.append(mmau_record(i, path))
    (folder / "mmau.json").write_text(json.dumps(records))
    questions = load_questions(str(folder / "mmau.json"))
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    save_checkpoint(folder / "model", model, processor)


def mmau_record(i, path, **changes):
    """Return a record with MMAU's keys."""
    words = ["rain", "a bell", "the wind", "a dog", "2 dogs", "a cat, far off", "rain and wind", "nothing"]
    choices = words[i % 3 :][: 2 + i % 4]
    text = "What is it?" if i % 2 else f"Which of these {'loud or quiet ' * (i % 5)}sounds is it?"
    base = {"id": f"id-{i}", "audio_id": path, "question": text, "choices": choices, "answer": choices[0]}
    labels = {"dataset": "made up", "task": ("sound", "music", "speech")[i % 3], "split": "test-mini"}
    labels |= {"category": "Reasoning", "sub-category": f"Sub {i % 4}", "difficulty": ("easy", "hard")[i % 2]}
    return base | labels | changes


def arguments(home, out, *flags):
    """Return the flags of an evaluation in float32 with short completions and small batches. Later flags win."""
    flags = ("--max_new_tokens", 10, "--batch_size", BATCH, "--dtype", "float32", "--out", out, *flags)
    return [str(flag) for flag in ("--ckpt", home / "model", "--data", home / "mmau.json", *flags)]


def evaluate(*flags):
    """Run the script in this process. Returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_mmau.py", *map(str, flags)])
        return eval_mmau.main()


def answers_in(path):
    return [record["model_prediction"] for record in json.loads(Path(path).read_text())]
