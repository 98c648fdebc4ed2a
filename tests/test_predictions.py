"""The predictions file: what is said of each question, and of which checkpoint."""

import json
import os
import shutil
from pathlib import Path

import predictions


def test_the_prediction_is_the_majority_vote():
    """Over what the samples answer, not over their texts; and questions without a completion are wrong."""
    texts = ["a bell", "<answer>rain</answer>", "so <answer>rain</answer>", "rain", " a bell\n"]
    (voted, silent) = predictions.with_answers([{"id": 1}, {"id": 2}], {0: texts}, {1: "why"}, sampled=True)
    assert voted.pop("samples") == texts
    assert voted == {"id": 1, "model_prediction": "rain", "model_output": "rain", "completion": texts[0]}
    empty = {"model_prediction": "", "model_output": "", "completion": ""}
    assert silent == {"id": 2, **empty, "samples": [], "error": "why"}
    assert predictions.with_answers([{}], {0: texts[4:]}, {}, sampled=False)[0]["model_output"] == "a bell"


def test_a_checkpoint_is_told_by_its_model_files(mmau, tmp_path):
    """Not by predictions or journals that lie beside them."""
    shutil.copytree(mmau / "model", tmp_path / "model")
    before = predictions.identify_checkpoint(str(tmp_path / "model"))
    for name in ("mine.json", "mine.json.partial.jsonl"):
        (tmp_path / "model" / name).write_text("")
    assert predictions.identify_checkpoint(str(tmp_path / "model")) == before
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        os.utime(tmp_path / "model" / name)
        assert before != (before := predictions.identify_checkpoint(str(tmp_path / "model")))


def test_an_adapter_is_told_by_its_base_too(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / name).touch()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    )
    before = predictions.identify_checkpoint(str(adapter))
    assert before == predictions.identify_checkpoint(str(adapter))
    os.utime(base / "model.safetensors", (1, 1))
    assert before != predictions.identify_checkpoint(str(adapter))


def test_predictions_are_done_while_file_and_settings_are_those(tmp_path):
    """Whatever differs, in the settings or in the file, is not taken for done, and is kept as .old."""
    out, settings, records = str(tmp_path / "p.json"), {"seed": 1, "template": "answer"}, [{"model_prediction": "é"}]
    assert not predictions.is_done(out, settings)
    Path(predictions.journal_path(out)).touch()
    predictions.write_predictions(out, records, settings)
    assert predictions.is_done(out, settings) and not predictions.is_done(out, settings | {"seed": 2})
    assert json.loads(Path(out).read_bytes().decode("ascii")) == records  # whatever the reader takes for the default
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.json.settings.json"]
    whole = Path(out).read_bytes()
    Path(out).write_bytes(whole.replace(b"u00e9", b"u00e8"))
    assert not predictions.is_done(out, settings)
    predictions.write_predictions(out, records, settings)
    assert Path(out).read_bytes() == whole and b"u00e8" in Path(out + ".old").read_bytes()
    predictions.write_predictions(out, [], settings | {"seed": 2})
    assert Path(out + ".old_2").read_bytes() == whole and predictions.is_done(out + ".old_2", settings)
    assert predictions.is_done(out, settings | {"seed": 2})
    for damaged in ("[]", "{", "[" * 100_000):
        Path(out + ".settings.json").write_text(damaged)
        assert not predictions.is_done(out, settings | {"seed": 2})
