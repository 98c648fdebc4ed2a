"""The run folder: settings, metrics, completions, curves, and checkpoints as plain Hugging Face folders."""

import json
import re
import shutil
from pathlib import Path

import torch

RUN_FILES = ("config.json", "metrics.jsonl", "completions.jsonl", "curves.png")  # and step_000100/, ...


def start_run(out: Path, config: dict) -> None:
    """Make the run folder and write config.json. What an earlier run left there is moved to out/earlier_1, _2, ..."""
    out.mkdir(parents=True, exist_ok=True)
    left = [path for path in out.iterdir() if path.name in RUN_FILES or re.fullmatch(r"step_\d+", path.name)]
    if left:
        number = 1
        while (out / f"earlier_{number}").exists():
            number += 1
        earlier = out / f"earlier_{number}"
        earlier.mkdir()
        for path in left:
            path.rename(earlier / path.name)
        print(f"{out} holds an earlier run; its files are now in {earlier}", flush=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def append_jsonl(path: Path, record: dict) -> None:
    """Add one JSON line to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def log_completions(path: Path, step: int, questions, prompts, texts, rewards, advantages) -> None:
    """Add B questions with their G completions each, one line a question. rewards, advantages: [B, G]."""
    group_size = rewards.shape[1]
    for b, question in enumerate(questions):
        record = {
            "step": step,
            "id": question.id,
            "audio": question.audio,
            "prompt": prompts[b],
            "answer": question.answer,
            "completions": texts[b * group_size : (b + 1) * group_size],
            "rewards": rewards[b].tolist(),
            "advantages": [round(advantage, 4) for advantage in advantages[b].tolist()],
        }
        append_jsonl(path, record)


def save_checkpoint(folder: Path, model, processor) -> None:
    """Write model and processor as a new Hugging Face folder, which is either complete or not there at all."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)


def draw_curves(out: Path) -> None:
    """Draw metrics.jsonl as curves.png: each metric over steps, thin, with its running mean over it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    steps = [m["step"] for m in metrics]
    shown = {
        "reward": "reward (accuracy + format)",
        "accuracy": "sampled training accuracy",
        "format": "share of well-formed completions",
        "kl": "KL to the reference (nats per token)",
        "entropy": "policy entropy (nats per token)",
        "completion_tokens": "completion length (tokens)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, shown.items()):
        values = torch.tensor([float("nan") if m[name] is None else m[name] for m in metrics])
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        window = max(1, min(25, len(values) // 4))
        smooth = values.unfold(0, window, 1).mean(-1)
        axis.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.8)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)
