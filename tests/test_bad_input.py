"""Bad input ends a command with one line that names the place and the remedy, and leaves nothing half-written.

Every case is a command as a user types it, with one mistake.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from forked import ROOT
from safetensors.torch import load_file, save_file

from training import toy_model

TRAIN = ["grpo_aqa.py", "--steps", "1", "--max_new_tokens", "8", "--accumulation_steps", "1"]
PLAIN = {"audio": "good.wav", "question": "What is it?", "choices": ["rain", "a bell"], "answer": "rain"}
R1_AQA = {"question_text": "What is it?", "multi_choice": ["rain", "a bell"], "answer": 0, "audio_path": "good.wav"}
MMAU = {"id": "m", "audio_id": "good.wav", "question": "What is it?", "choices": ["rain", "a bell"], "answer": "rain"}
GOOD = json.dumps(PLAIN)
LOUD = 0.1 * np.random.default_rng(0).normal(size=48_000)


def changed(record, **fields):
    return json.dumps(record | fields)


# ---- question files: case -> (content or a function that makes the file, part of the message) ----

LINE = "questions.jsonl, line 2: "
QUESTION_FILES = {
    "no such file": (None, "questions.jsonl: no such question file"),
    "a folder": (Path.mkdir, "questions.jsonl: is a folder"),
    "a named pipe": (os.mkfifo, "questions.jsonl: is a named pipe"),
    "a broken link": (lambda path: path.symlink_to("nowhere"), "questions.jsonl: is a broken link"),
    "empty": ("", "questions.jsonl: has no questions"),
    "an empty list": ("[]", "questions.jsonl: has no questions"),
    "a byte-order mark within": (f"{GOOD}\n\ufeff{GOOD}", LINE + "not valid JSON"),
    "UTF-16": (GOOD.encode("utf-16"), "questions.jsonl: cannot be read as UTF-8 text"),
    "Latin-1": (GOOD.replace("rain", "pluie d'été").encode("latin-1"), "cannot be read as UTF-8 text"),
    "a JSON list where lines are expected": (f"[{GOOD}]\n[{GOOD}]", LINE + "not valid JSON"),
    "lines where a JSON list is expected": (f"{GOOD},\n{GOOD}", "questions.jsonl, line 1: not valid JSON"),
    "cut off": (f"{GOOD}\n{GOOD[:40]}", LINE + "not valid JSON"),
    "a line that is no object": (f"{GOOD}\n[1, 2]", LINE + "expected a JSON object, found list"),
    "nested too deeply": (f"{GOOD}\n" + "[" * 100_000, LINE + "not valid JSON (nested too deeply)"),
    "a number of 5,000 digits": (f'{GOOD}\n{{"id": {"1" * 5000}}}', LINE + "not valid JSON"),
    "fields of another format": (f'{GOOD}\n{{"sound": 1}}', LINE + "not a question"),
    "duplicate ids": (changed(PLAIN, id=7) + "\n" + changed(PLAIN, id=7), LINE + "has the id '7', the same as"),
    "index out of range": (f"{GOOD}\n{changed(R1_AQA, answer=2)}", LINE + "answer 2 names none of the choices"),
    "index is a boolean": (f"{GOOD}\n{changed(R1_AQA, answer=True)}", LINE + "answer True names none of the choices"),
    "index is a float": (f"{GOOD}\n{changed(R1_AQA, answer=0.5)}", LINE + "answer 0.5 names none of the choices"),
    "choices are a text": (f"{GOOD}\n{changed(PLAIN, choices='rain')}", LINE + "choices must be a list"),
    "an open question without an answer": (
        f"{GOOD}\n{changed(PLAIN, choices=[], answer=None)}",
        LINE + "has no answer",
    ),
    "several clips and no other question": (
        changed(PLAIN, audio_path=["a.wav", "b.wav"], audio=None),
        "left out: several clips",
    ),
    "a cell too many": ("audio,question,answer\ngood.wav,What, or who?,rain", LINE + "has 4 cells"),
    "a letter that may be a note": (
        f"{GOOD}\n{changed(PLAIN, choices=['C major', 'A minor'], answer='A')}",
        LINE + "answer 'A' names none of the choices",
    ),
    "one choice": (f"{GOOD}\n{changed(PLAIN, choices=['rain'])}", LINE + "choices must be a list"),
    "answer in other case": (f"{GOOD}\n{changed(PLAIN, answer='Rain')}", "'rain' differs only in case or spaces"),
    "answer in other space": (f"{GOOD}\n{changed(PLAIN, answer='a  bell')}", "'a bell' differs only in case or spaces"),
    "answer withheld": (f"{GOOD}\n{changed(PLAIN, answer=None)}", LINE + "has no answer"),
    "an empty question": (f"{GOOD}\n{changed(PLAIN, question=' ')}", LINE + "question must be a text"),
    "a question of 100,000 characters": (f"{GOOD}\n{changed(PLAIN, question='why? ' * 20_000)}", "model's context"),
    "a prompt longer than the context": (
        f"{GOOD}\n{changed(PLAIN, choices=['x'] * 700 + ['rain'])}",
        "context of 2048",
    ),
    "half of a character": (f"{GOOD}\n{changed(PLAIN, question=chr(0xD800))}", LINE + "has half of a character"),
    "a second clip in the question": (
        f"{GOOD}\n{changed(PLAIN, question='<|AUDIO|>?')}",
        LINE + "has the special token <|AUDIO|>",
    ),
    "chat markup in a choice": (
        f"{GOOD}\n{changed(PLAIN, choices=['rain', 'a <|im_end|>'])}",
        LINE + "has the special token <|im_end|>",
    ),
    "an answer that the rewards do not find": (
        f"{GOOD}\n{changed(PLAIN, choices=['rain', '</answer>'], answer='</answer>')}",
        "cannot be rewarded: the rewards",
    ),
    "an answer that MMAU's file does not list": (
        f"{GOOD}\n{changed(MMAU, answer='Rain')}",
        LINE + "the right answer 'Rain' cannot be rewarded: it",
    ),
    "audio_id leaves its folder": (f"{GOOD}\n{changed(MMAU, audio_id='../good.wav')}", LINE + "audio_id '../good.wav'"),
}


# ---- the second question's clip: case -> (file name, content or a function that makes it, part of the message) ----


def cut(name, share):
    """Return a function that writes only the first `share` of a clip's bytes."""

    def make(path):
        whole = path.with_name(f"whole_{name}")
        soundfile.write(whole, LOUD, 16_000)
        path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])

    return make


CLIPS = {
    "missing": ("x.wav", None, "no audio file"),
    "a folder": ("x.wav", Path.mkdir, "is a folder"),
    "a named pipe": ("x.wav", os.mkfifo, "is a named pipe"),
    "a broken link": ("x.wav", lambda path: path.symlink_to("nowhere.wav"), "is a broken link"),
    "zero bytes": ("x.wav", b"", "is an empty file"),
    "text": ("x.wav", b"This is no sound." * 100, "cannot be read as audio"),
    "a WAV cut off": ("x.wav", cut("a.wav", 0.7), "was cut off"),
    "a FLAC cut off": ("x.flac", cut("a.flac", 0.7), "was cut off"),
    "an MP3 cut off": ("x.mp3", cut("a.mp3", 0.7), "was cut off"),
    "an Ogg cut off": ("x.ogg", cut("a.ogg", 0.7), "was cut off"),
    "damaged within": ("x.flac", None, "cannot be read as audio"),  # written by make_clip; header and end are good
    "0 samples": ("x.wav", (np.zeros(0), 16_000), "has 0 ms"),
    "5 ms": ("x.wav", (LOUD[:80], 16_000), "has 5 ms"),
    "one hour": ("x.wav", (np.tile(LOUD, 75), 1_000), "lasts 3600 s"),
    "NaN samples": ("x.wav", (np.where(np.arange(48_000) == 9, np.nan, LOUD), 16_000), "NaN or infinite"),
    "infinite samples": ("x.wav", (np.where(np.arange(48_000) == 9, np.inf, LOUD), 16_000), "NaN or infinite"),
    "samples of 1e30": ("x.wav", (LOUD * 1e31, 16_000), "but full scale is 1"),
    "silence": ("x.wav", (0 * LOUD, 16_000), "absolute silence"),
    "8 channels": ("x.wav", (np.stack(8 * [LOUD], axis=1), 16_000), "8 channels"),
    "192 kHz": ("x.wav", (LOUD, 192_000), "192000 Hz"),
}

# ---- models, output folders, settings: case -> (command, part of the message) ----

DATA = ["--data", "good.jsonl"]
EVALUATE = ["eval_mmau.py", "--max_new_tokens", "4", *DATA]
OTHERS = {
    "no such model": ([*TRAIN, *DATA, "--model", "no/model"], "no/model: cannot be loaded"),
    "a model folder without config.json": ([*TRAIN, *DATA, "--model", "empty"], "empty: not a model folder"),
    "a config.json cut off": ([*TRAIN, *DATA, "--model", "bad_config"], "bad_config: cannot be loaded"),
    "another kind of model": ([*TRAIN, *DATA, "--model", "qwen2"], "qwen2: cannot be loaded as a Qwen2-Audio model"),
    "no weights": ([*TRAIN, *DATA, "--model", "weightless"], "weightless: has no model.safetensors"),
    "no weights to evaluate": ([*EVALUATE, "--ckpt", "weightless"], "weightless: has no model.safetensors"),
    "a shard missing": ([*TRAIN, *DATA, "--model", "shard_missing"], "1 of 2 weight files are missing"),
    "a shard missing, evaluated": ([*EVALUATE, "--ckpt", "shard_missing"], "1 of 2 weight files are missing"),
    "a shard index cut off": ([*TRAIN, *DATA, "--model", "bad_index"], "model.safetensors.index.json: cannot be used"),
    "weights of another shape": ([*TRAIN, *DATA, "--model", "other_shape"], "other_shape: cannot be loaded"),
    "weights cut off": ([*EVALUATE, "--ckpt", "cut_off"], "cut_off: cannot be loaded"),
    "a weight missing": ([*EVALUATE, "--ckpt", "weight_missing"], "weights are missing: lm_head"),
    "a pickle instead of safetensors": ([*TRAIN, *DATA, "--model", "pickled"], "pytorch_model.bin, a pickle"),
    "a pickle, evaluated": ([*EVALUATE, "--ckpt", "pickled"], "pytorch_model.bin, a pickle"),
    "an adapter without its base": ([*EVALUATE, "--ckpt", "adapter"], "the base model of this adapter"),
    "a run of another version": ([*TRAIN, *DATA, "--model", "base", "--out", "old_run", "--resume"], "version 0"),
    "a run's config.json cut off": ([*TRAIN, *DATA, "--model", "base", "--out", "cut_run", "--resume"], "config.json"),
    "a run without checkpoints": (["eval_mmau.py", "--ckpt", "young_run", *DATA], "no complete checkpoint yet"),
    "--out in a file": ([*TRAIN, *DATA, "--model", "base", "--out", "good.wav/run"], "good.wav/run: cannot be written"),
    "--out where nobody may write": ([*TRAIN, *DATA, "--model", "base", "--out", "/proc/run"], "/proc/run: cannot be"),
    "predictions where nobody may write": ([*EVALUATE, "--ckpt", "base", "--out", "/proc/p.json"], "/proc/p.json: can"),
    "predictions in place of a folder": ([*EVALUATE, "--ckpt", "base", "--out", "base"], "base: is a folder"),
    "too few tokens for the answer": (
        [*TRAIN, *DATA, "--model", "base", "--max_new_tokens", "2"], "raise --max_new_tokens to"),
    "no held-out file": ([*TRAIN, *DATA, "--model", "base", "--heldout", "none.json"], "none.json: no such"),
    "--data without --model": (["grpo_aqa.py", *DATA], "--data needs --model"),
    "--audio_dir without --model": (["sft_aqa.py", "--audio_dir", "x"], "--audio_dir needs --model"),
    "--model without --data": (["grpo_aqa.py", "--model", "base"], "--model needs --data"),
    "parts that do not divide": (["grpo_aqa.py", "--prompts_per_rank", "3", "--accumulation_steps", "2"], "multiple"),
    "dropout without LoRA": (["grpo_aqa.py", "--lora_dropout", "0.1"], "--lora_dropout needs --lora_rank"),
    "thoughts to imitate": (["sft_aqa.py", "--template", "think"], "--template think"),
    "two ablations at once": ([*EVALUATE, "--ckpt", "base", "--silence", "--shuffle_audio"], "contradict"),
    "a group of one": (["grpo_aqa.py", "--group_size", "1"], "--group_size must be at least 2, not 1"),
    "a rate that is no number": (["grpo_aqa.py", "--lr", "nan"], "--lr must be above 0, not nan"),
    "completions beyond the context": (
        ["grpo_aqa.py", *DATA, "--model", "base", "--max_new_tokens", "2048"], "--max_new_tokens 2048 is more than"),
    "not a predictions file": (["eval_mmau.py", "--compare", "good.jsonl", "good.jsonl"], "line 1: no text"),
    "markup in toy.py's questions": (["toy.py", "--questions", "markup.jsonl", "--out", "tiny"], "token <|im_start|>"),
    "markup in questions to evaluate": (
        ["eval_mmau.py", "--ckpt", "base", "--data", "markup.jsonl"], "markup.jsonl, line 1: has the special token"),
    "markup in supervised questions": (
        ["sft_aqa.py", "--steps", "1", "--model", "base", "--data", "markup.jsonl"], "token <|im_start|>"),
    "a field that predictions use": (
        ["eval_mmau.py", "--ckpt", "base", "--data", "own_fields.jsonl"], "line 1: has the field 'samples'"),
    "toy.py's output exists": (["toy.py", "--questions", "good.jsonl", "--out", "base"], "base: exists already"),
}  # fmt: skip

COMMANDS = {
    f"question file: {name}": [*TRAIN, "--model", "base", "--data", "questions.jsonl"] for name in QUESTION_FILES
}
COMMANDS |= {f"clip: {name}": [*TRAIN, "--model", "base", "--data", "questions.jsonl"] for name in CLIPS}
COMMANDS |= {
    f"clip to evaluate: {name}": ["eval_mmau.py", "--ckpt", "base", "--data", "questions.jsonl"] for name in CLIPS
}
COMMANDS |= {name: args for name, (args, _) in OTHERS.items()}
NAMED = {f"question file: {name}": named for name, (_, named) in QUESTION_FILES.items()}
NAMED |= {f"{what}: {name}": named for what in ("clip", "clip to evaluate") for name, (_, _, named) in CLIPS.items()}
NAMED |= {name: named for name, (_, named) in OTHERS.items()}

BAR = re.compile(r"\d+%\|.*\]$")


def make_models(folder, questions):
    """Write a good model folder `base`, and others with one fault each."""
    model, processor = toy_model.make_model(questions, seconds=2, seed=0)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    for name in ("weightless", "pickled", "bad_config", "other_shape", "cut_off", "weight_missing", "bad_index"):
        shutil.copytree(folder / "base", folder / name)
    for name in ("weightless", "pickled", "bad_index"):
        (folder / name / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    (folder / "bad_config" / "config.json").write_text('{"model_type": "qwen2_au')
    (folder / "bad_index" / "model.safetensors.index.json").write_text("{")
    weights = load_file(folder / "base" / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    save_file(weights | {head: weights[head][:, :-1].contiguous()}, folder / "other_shape" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    save_file({name: w for name, w in weights.items() if name != head}, folder / "weight_missing" / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    os.truncate(folder / "cut_off" / "model.safetensors", 100_000)
    model.save_pretrained(folder / "shard_missing", max_shard_size="2MB")
    processor.save_pretrained(folder / "shard_missing")
    shards = sorted((folder / "shard_missing").glob("model-*.safetensors"))
    assert len(shards) == 2
    shards[1].unlink()
    (folder / "empty").mkdir()
    (folder / "qwen2").mkdir()
    (folder / "qwen2" / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "qwen2" / "model.safetensors").touch()
    (folder / "adapter").mkdir()
    base = str(folder / "nowhere")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    )
    (folder / "adapter" / "adapter_model.safetensors").touch()
    for name, config in (("old_run", '{"steps": 1, "launchers": []}'), ("cut_run", '{"steps": 1, "laun')):
        (folder / name / "resume" / "step_000001").mkdir(parents=True)
        (folder / name / "config.json").write_text(config)
    (folder / "young_run").mkdir()
    (folder / "young_run" / "metrics.jsonl").touch()


def make_clip(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        soundfile.write(path, *content, subtype="FLOAT")
    elif content is not None:
        content(path)
    elif path.suffix == ".flac":
        soundfile.write(path, LOUD, 16_000)
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2 : len(whole) // 2 + 4096] = bytes(4096)
        path.write_bytes(whole)


def files(folder):
    """Return path -> size of all files below a folder, without the commands' own output."""
    found = {path: path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()}
    return {path: size for path, size in found.items() if path.name not in ("stdout", "stderr")}


@pytest.fixture(scope="module")
def ended(tmp_path_factory, questions, forker):
    """Run each command in a folder of its own. Returns name -> (exit status, stderr, files before, files after)."""
    models = tmp_path_factory.mktemp("models")
    make_models(models, questions)
    folders, before = {}, {}
    for name in COMMANDS:
        folder = folders[name] = tmp_path_factory.mktemp("case")
        for path in models.iterdir():
            (folder / path.name).symlink_to(path)
        if "_run" in " ".join(COMMANDS[name]):  # copies, because the command must leave these runs as they are
            for run in ("old_run", "cut_run", "young_run"):
                (folder / run).unlink()
                shutil.copytree(models / run, folder / run)
        soundfile.write(folder / "good.wav", LOUD, 16_000)
        (folder / "good.jsonl").write_text(GOOD + "\n" + GOOD)
        (folder / "markup.jsonl").write_text(changed(PLAIN, question="What?<|im_start|>system"))
        (folder / "own_fields.jsonl").write_text(changed(PLAIN, samples=[1, 2]))
        what, _, case = name.partition(": ")
        if what == "question file":
            content = QUESTION_FILES[case][0]
            if callable(content):
                content(folder / "questions.jsonl")
            elif content is not None:
                data = content if isinstance(content, bytes) else content.encode()
                (folder / "questions.jsonl").write_bytes(data)
        elif what in ("clip", "clip to evaluate"):
            clip, content, _ = CLIPS[case]
            make_clip(folder / clip, content)
            (folder / "questions.jsonl").write_text(f"{GOOD}\n{changed(PLAIN, audio=clip)}")
        before[name] = files(folder)
    done = {name: forker.run(folders[name], args) for name, args in COMMANDS.items()}
    return {name: (*done[name][::2], before[name], files(folders[name])) for name in COMMANDS}


def test_the_docs_count_the_cases():
    counted = f"{len(COMMANDS)} commands with one thing wrong"
    assert counted in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_gives_one_line_and_leaves_nothing_half_written(ended, name):
    status, stderr, before, after = ended[name]
    # A progress bar is drawn over itself: only the text after the last carriage return stays visible.
    lines = [line.split("\r")[-1] for line in stderr.splitlines()]
    lines = [line for line in lines if line.strip() and not BAR.search(line)]
    first_lines = [line for line in lines if not line.startswith("  ")]  # indented lines list several problems
    assert status in (1, 2), stderr
    assert len(first_lines) == 1 and f"{COMMANDS[name][0]}: error: " in first_lines[0], stderr
    assert NAMED[name] in " ".join(lines), stderr
    if name.startswith("clip"):
        assert "questions.jsonl, line 2: " in " ".join(lines) and "--skip_bad_audio" in first_lines[0]
    assert {path: size for path, size in after.items() if path in before} == before  # existing files are unchanged
    added = [path for path in after if path not in before]
    assert not [path for path in added if "unfinished" in str(path) or "step_" in str(path)]
    assert {path.name for path in added} <= {"config.json", "audio_headers.json"}
    for path in added:
        json.loads(path.read_text())
