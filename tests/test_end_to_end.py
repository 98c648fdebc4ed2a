"""The commands as a user runs them: train the toy through torchrun, evaluate its checkpoint, use real recordings."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_predictions import mmsu_script
from test_use_the_model import answer
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from data import TEMPLATES, load_questions
from evaluation.answering import answer_questions
from model.checkpoints import load_policy
from reward import format_reward, prediction
from training.toy_model import warm_start_text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
REAL_SOUNDS = ROOT.parent / "shared" / "real_sounds"
METRICS = {
    "step", "loss", "reward", "reward_std", "accuracy", "format", "kl", "clip_fraction", "entropy", "completion_tokens",
    "equal_reward_groups", "grad_norm", "lr", "seconds", "seconds_data", "seconds_sample", "seconds_reference",
    "seconds_train", "seconds_update", "peak_memory_gb", "all_right_groups", "all_wrong_groups",
    "truncated_completions", "tokens_per_second",
}  # fmt: skip


def command(*args, ranks=None):
    """Return the command line of a script; with `ranks`, through torchrun."""
    launcher = [] if ranks is None else ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher, str(ROOT / args[0]), *map(str, args[1:])]


def run(*args, cwd, ranks=None):
    """Run a script in the folder `cwd`, require exit status 0 and return what it printed."""
    done = subprocess.run(command(*args, ranks=ranks), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def scores(printed):
    """Read the table at the end of a training run. Returns accuracy: guessing, before, after; and format after."""
    numbers = {name: [float(x) for x in re.findall(r"\d\.\d+", line)] for line in printed.splitlines()
               for name in ("guessing", "before GRPO", "after GRPO") if line.strip().startswith(name)}  # fmt: skip
    return numbers["guessing"][0], numbers["before GRPO"][0], *numbers["after GRPO"]


def total(printed):
    """Read the accuracy over all questions from the evaluation's table."""
    return float(re.search(r"^all +([\d.]+)%", printed, re.MULTILINE).group(1)) / 100


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Train the toy for four steps on two ranks. Returns (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("short")
    flags = ("--steps", 4, "--save_every", 2, "--log_completions_every", 2, "--prompts_per_rank", 4)
    return folder, run("grpo_aqa.py", *flags, "--accumulation_steps", 2, "--seed", 1, cwd=folder, ranks=2)


def test_run_folder(short_run):
    folder = short_run[0] / "runs" / "toy"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert all(METRICS <= set(m) and None not in m.values() for m in metrics)
    assert all(m["reward"] == pytest.approx(m["accuracy"] + m["format"]) for m in metrics)
    assert [m["lr"] for m in metrics] == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4])
    completions = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [c["step"] for c in completions] == 4 * [2] + 4 * [4]
    assert all(len(c["completions"]) == len(c["rewards"]) == len(c["advantages"]) == 8 for c in completions)
    config = json.loads((folder / "config.json").read_text())
    assert config["world_size"] == 2 and config["beta"] == 0.04 and config["steps"] == 4
    assert (folder / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_000002", "step_000004"]


def test_checkpoint_is_a_plain_hugging_face_folder(short_run):
    """transformers alone loads it. Every weight was trained, except the audio tower's fixed positions."""
    folder = short_run[0] / "runs" / "toy"
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "step_000004")
    processor = AutoProcessor.from_pretrained(folder / "step_000004")
    base = Qwen2AudioForConditionalGeneration.from_pretrained(folder / "base")
    same = [name for (name, a), b in zip(model.named_parameters(), base.parameters()) if a.equal(b)]
    assert same == ["model.audio_tower.embed_positions.weight"]
    text = "über 漢字 <answer>"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_toys_base_answers_in_every_template(short_run, template):
    """Its answers have the right form, are choices, are right about half the time, and repeat the thought's choice."""
    folder = short_run[0] / "runs" / "toy"
    model, processor = load_policy(str(folder / "base"), torch.float32, torch.device("cpu"))
    asked = load_questions(str(folder / "world" / "heldout.json"))[:100]
    completions = answer_questions(model, processor, asked, template, max_new_tokens=32, batch_size=50)
    texts = [text for [text] in completions]
    assert sum(format_reward(text, template) for text in texts) >= 98
    assert sum(prediction(text) in question.choices for text, question in zip(texts, asked)) >= 90
    assert 30 <= sum(prediction(text) == question.answer for text, question in zip(texts, asked)) <= 70
    if template == "think":
        assert sum(text == warm_start_text(prediction(text), "think") for text in texts) >= 70


def test_evaluation_finds_the_heldout_questions(short_run):
    folder, printed = short_run
    checkpoint = folder / "runs" / "toy" / "step_000004"
    evaluated = run("eval_mmau.py", "--ckpt", checkpoint, cwd=folder)
    assert total(evaluated) == pytest.approx(scores(printed)[2], abs=0.002)
    heldout = json.loads((folder / "runs" / "toy" / "world" / "heldout.json").read_text())
    chance = 100 * sum(1 / len(record["choices"]) for record in heldout) / len(heldout)
    rows = ("task          music", "difficulty    hard", "sub_category  Vowel", f"guessing would score {chance:.2f}%")
    assert [row for row in rows if row not in evaluated] == []
    answered = json.loads((checkpoint / "mmau_predictions.json").read_text())
    assert len(answered) == len(heldout) >= 500
    for record, given in zip(answered, heldout):
        assert {key: record[key] for key in given} == given
        assert record["model_output"] == record["model_prediction"]
        assert record["model_prediction"] in record["completion"]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_plain_transformers_answers_as_the_evaluation_does(short_run, tmp_path, kind):
    """With the README's snippet, on the toy's checkpoint and on an adapter of its base."""
    toy = short_run[0] / "runs" / "toy"
    checkpoint = toy / "step_000004"
    if kind == "adapter":
        flags = ("--model", toy / "base", "--data", toy / "world" / "train.jsonl", "--lora_rank", 4, "--lr", 0.02)
        run("grpo_aqa.py", *flags, "--steps", 3, "--max_new_tokens", 16, "--out", "lora", cwd=tmp_path)
        checkpoint = tmp_path / "lora" / "step_000003"
    flags = ("--data", toy / "world" / "heldout.json", "--limit", 20, "--dtype", "float32", "--out", "p.json")
    run("eval_mmau.py", "--ckpt", checkpoint, *flags, "--max_new_tokens", 32, cwd=tmp_path)
    records = json.loads((tmp_path / "p.json").read_text())
    texts = [answer(checkpoint, record, toy / "world", 32) for record in records]
    assert texts == [record["completion"] for record in records] and len(set(texts)) > 1


def test_a_second_run_reuses_the_toy_and_keeps_the_first_run(short_run):
    folder = short_run[0] / "runs" / "toy"
    made = {path: path.stat().st_mtime_ns for name in ("world", "base") for path in (folder / name).rglob("*")}
    metrics = (folder / "metrics.jsonl").read_text()
    printed = run("grpo_aqa.py", "--steps", 1, "--prompts_per_rank", 2, "--beta", 0, "--updates_per_rollout", 2,
                  cwd=short_run[0])  # fmt: skip
    assert {path: path.stat().st_mtime_ns for name in ("world", "base") for path in (folder / name).rglob("*")} == made
    assert (folder / "earlier_1" / "metrics.jsonl").read_text() == metrics and "earlier_1" in printed
    assert json.loads((folder / "metrics.jsonl").read_text())["kl"] is None


def test_open_questions_train_and_mmsu_is_scored_as_its_script_does(short_run, tmp_path):
    """Clotho-AQA's CSV has no choices. MMSU's script reads letters, in JSON lines."""
    toy = short_run[0] / "runs" / "toy"
    heldout = json.loads((toy / "world" / "heldout.json").read_text())[:40]
    with open(tmp_path / "open.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "QuestionText", "answer", "confidence"])
        rows.writerows([record["audio_id"], record["question"], record["answer"], "yes"] for record in heldout)
    flags = ("--model", toy / "base", "--data", "open.csv", "--audio_dir", toy / "world", "--max_new_tokens", 16)
    printed = run("grpo_aqa.py", *flags, "--steps", 2, "--prompts_per_rank", 4, "--out", "open", cwd=tmp_path)
    assert "40 of 40 questions have no choices" in printed
    [line, _] = (tmp_path / "open" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(line)["accuracy"] < 1

    records = []
    for i, record in enumerate(heldout):
        choices = {f"choice_{letter}": choice for letter, choice in zip("abcd", record["choices"])}
        labels = {"category": "Perception", "sub-category": record["sub-category"]}
        records.append({"id": i, "audio_path": record["audio_id"], "question": record["question"], **choices,
                        "answer_gt": record["answer"], **labels})  # fmt: skip
    (tmp_path / "mmsu.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--ckpt", "open/step_000002", "--data", "mmsu.jsonl", "--audio_dir", toy / "world", "--out", "p.json")
    printed = run("eval_mmau.py", *flags, "--max_new_tokens", 16, cwd=tmp_path)
    right, questions = mmsu_script((tmp_path / "p.json").read_text())["all"]
    assert questions == 40 and f"{right}/40" in printed and "Perception: " in printed


# ---- claims of the README; these tests take minutes ----


def test_the_toy_learns_and_needs_the_audio(short_run, tmp_path):
    for name in ("world", "base"):  # a second run in the same folder would find them, too
        shutil.copytree(short_run[0] / "runs" / "toy" / name, tmp_path / "runs" / "toy" / name)
    guessing, before, after, format_after = scores(run("grpo_aqa.py", cwd=tmp_path, ranks=2))
    assert before <= 0.60 and after >= 0.90 and format_after >= 0.99
    silent = total(run("eval_mmau.py", "--ckpt", "runs/toy/step_000360", "--silence", cwd=tmp_path))
    assert abs(silent - guessing) <= 0.10


REAL_FLAGS = ("--steps", 300, "--lr", 3e-4, "--prompts_per_rank", 8, "--accumulation_steps", 1, "--max_new_tokens", 16)


@pytest.mark.skipif(not REAL_SOUNDS.is_dir(), reason="no real recordings next to this checkout")
def test_training_on_real_recordings(tmp_path):
    questions = REAL_SOUNDS / "train_r1aqa.jsonl"
    skip = "--skip_bad_audio"  # two of the recordings are empty
    run("toy.py", "--questions", questions, "--out", "tiny", skip, cwd=tmp_path)
    flags = (*REAL_FLAGS, skip)
    run("grpo_aqa.py", "--model", "tiny", "--data", questions, "--out", "run", *flags, cwd=tmp_path, ranks=2)
    accuracy = [json.loads(line)["accuracy"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(accuracy[-20:]) / 20 >= sum(accuracy[:20]) / 20 + 0.30
    checkpoint = sorted((tmp_path / "run").glob("step_*"))[-1]
    evaluated = run("eval_mmau.py", "--ckpt", checkpoint, "--data", REAL_SOUNDS / "test_mmau.json", skip, cwd=tmp_path)
    assert "/44" in evaluated and "sub_category" in evaluated
