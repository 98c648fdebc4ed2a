"""The README's snippet for plain transformers answers as eval_mmau.py does: from a checkpoint, from an adapter."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
from eval_runs import arguments, evaluate
from test_lora import TARGETS, randomize

from model.checkpoints import load_policy, save_checkpoint
from model.lora import add_lora

ROOT = Path(__file__).resolve().parents[1]


def answer(checkpoint, record, folder, max_new_tokens):
    """Run the snippet with another checkpoint, clip and question. Return what it prints."""
    readme = (ROOT / "README.md").read_text()
    [snippet] = re.findall(r"^    import soundfile.*?^    print\(.*?$", readme, re.MULTILINE | re.DOTALL)
    asked = str(folder / record["audio_id"]), record["question"], record["choices"]
    replaced = {
        "checkpoint = .*": f"checkpoint = {str(checkpoint)!r}",
        "clip, question, choices = .*": f"clip, question, choices = {asked!r}",
        "max_new_tokens=256": f"max_new_tokens={max_new_tokens}",
    }
    code = textwrap.dedent(snippet)
    for pattern, text in replaced.items():
        code, count = re.subn(pattern, lambda _: text, code)
        assert count == 1, pattern
    printed = []
    exec(code, {"print": printed.append})
    return printed[0]


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_the_snippet_answers_as_the_evaluation_does(mmau, tmp_path, kind):
    """With random weights. The checkpoint's own sampling settings would give other answers."""
    model, processor = load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.5)
    save_checkpoint(tmp_path / "base", model, processor)
    if kind == "adapter":
        add_lora(model, str(tmp_path / "base"), 3, 12, 0.0, TARGETS, freeze_audio_tower=False, seed=0)
        randomize(model)
        save_checkpoint(tmp_path / "adapter", model, processor)
    checkpoint = tmp_path / ("base" if kind == "checkpoint" else "adapter")
    assert evaluate(*arguments(mmau, tmp_path / "p.json", "--ckpt", checkpoint)) == 0
    records = json.loads((tmp_path / "p.json").read_text())[:4]
    assert [answer(checkpoint, record, mmau, 10) for record in records] == [record["completion"] for record in records]
