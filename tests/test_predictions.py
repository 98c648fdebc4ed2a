"""The predictions file and its journal: what they hold, and when they may be reused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data import Question
from evaluation import predictions
from infra.errors import InputError
from infra.ownership import OWNER, owning

# ---- predictions files ----


def test_where_predictions_are_written(tmp_path):
    """In the checkpoint's folder; a Hugging Face name is no folder and has one under runs/."""
    path = predictions.predictions_path
    assert path(str(tmp_path)) == str(tmp_path / "mmau_predictions.json")
    assert path(str(tmp_path), suffix="_silence") == str(tmp_path / "mmau_predictions_silence.json")
    assert path(str(tmp_path), "a/b.json", "_samples") == "a/b_samples.json" and path("Org/Name", "c") == "c"
    folder = "runs/Qwen2-Audio-7B-Instruct/untouched"
    assert path("Qwen/Qwen2-Audio-7B-Instruct") == f"{folder}/mmau_predictions.json"
    assert path("Qwen/Qwen2-Audio-7B-Instruct", None, "_silence") == f"{folder}/mmau_predictions_silence.json"


def test_the_prediction_is_the_majority_vote():
    """The vote counts the samples' answers, not their whole texts. Questions without a completion are wrong."""
    texts = ["a bell", "<answer>rain</answer>", "so <answer>rain</answer>", "rain", " a bell\n"]
    questions = [Question("0", "a.wav", "What?", choices, None) for choices in (["rain", "a bell"], ["x", "y"])]
    (voted, silent) = predictions.with_answers([{"id": 1}, {"id": 2}], questions, {0: texts}, {1: "why"}, sampled=True)
    assert voted.pop("samples") == texts
    assert voted == {"id": 1, "model_prediction": "rain", "model_output": "rain", "completion": texts[0]}
    empty = {"model_prediction": "", "model_output": "", "completion": ""}
    assert silent == {"id": 2, **empty, "samples": [], "error": "why"}
    assert predictions.with_answers([{}], questions, {0: texts[4:]}, {}, sampled=False)[0]["model_output"] == "a bell"
    question = Question("0", "a.wav", "What?", ["th\u00e9", "the"], None)
    for texts in (["the\u0301"], ["th\u00e9", "the\u0301"]):  # a choice, as the file spells it; both samples say it
        [tea] = predictions.with_answers([{}], [question], {0: texts}, {}, sampled=len(texts) > 1)
        assert tea["model_prediction"] == tea["model_output"] == "th\u00e9" and tea["completion"] == texts[0]


def test_fields_of_the_user_are_not_overwritten():
    """A record of an earlier evaluation loses what that evaluation has added. A field of the user's own is refused."""
    for sampled, errors in ((True, {}), (False, {0: "why"})):
        question = Question("0", "a.wav", "What?", ["x", "y"], None)
        [record] = predictions.with_answers([{"id": 1, "mine": 2}], [question], {}, errors, sampled)
        assert predictions.without_answers([("p", record)]) == ([{"id": 1, "mine": 2}], [])
    absent = {"id": 1, "samples": None, "error": float("nan")}
    assert predictions.without_answers([("p", absent)]) == ([{"id": 1}], [])
    for key in predictions.ADDED:
        [problem] = predictions.without_answers([("p", {"id": 1, key: "mine"})])[1]
        assert problem.startswith(f"p: has the field '{key}', which predictions files use")


def test_a_checkpoint_is_identified_by_its_model_files(mmau, tmp_path):
    """Not by predictions or journals beside them."""
    shutil.copytree(mmau / "model", tmp_path / "model")
    before = predictions.identify_checkpoint(str(tmp_path / "model"))
    for name in ("mine.json", "mine.json.partial.jsonl"):
        (tmp_path / "model" / name).write_text("")
    assert predictions.identify_checkpoint(str(tmp_path / "model")) == before
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        os.utime(tmp_path / "model" / name)
        assert before != (before := predictions.identify_checkpoint(str(tmp_path / "model")))


def test_an_adapter_is_identified_by_its_base_too(tmp_path):
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


def test_predictions_are_done_while_file_and_settings_are_unchanged(tmp_path):
    """If settings or file differ, the file does not count as done and is kept as .old."""
    out, settings, records = str(tmp_path / "p.json"), {"seed": 1, "template": "answer"}, [{"model_prediction": "é"}]
    assert not predictions.is_done(out, settings)
    Path(predictions.journal_path(out)).touch()
    predictions.write_predictions(out, records, settings)
    assert predictions.is_done(out, settings) and not predictions.is_done(out, settings | {"seed": 2})
    assert json.loads(Path(out).read_bytes().decode("ascii")) == records  # whatever the reader's default encoding is
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


# ---- the journal ----


def test_a_full_disk_is_reported_with_the_file_and_what_to_do(tmp_path):
    (tmp_path / "j").symlink_to("/dev/full")
    with pytest.raises(InputError, match=f"^{tmp_path}/j: could not be written .*the same command continues"):
        predictions.append_journal(str(tmp_path / "j"), {3: ["x"]})


TORN = {"at its end": b'{"question": 2, "comp', "by a crash": b'\0\0\0\n{"question": 2, "completions": ["z"]}\n'}


@pytest.mark.parametrize("tail", [b"", *TORN.values()], ids=["nowhere", *TORN])
def test_a_journal_is_cut_where_it_is_torn(tmp_path, tail):
    path, settings = str(tmp_path / "j"), {"seed": 1, "data": ["ü", None]}
    assert predictions.read_journal(path, settings, 4, 2) == {}
    predictions.append_journal(path, {3: ["a\nü", "\ufffd"], 0: ["", "x"]})
    whole = Path(path).read_bytes()
    with open(path, "ab") as file:
        file.write(tail)
    assert predictions.read_journal(path, settings, 4, 2) == {3: ["a\nü", "\ufffd"], 0: ["", "x"]}
    assert Path(path).read_bytes() == whole
    Path(path).write_bytes(whole[:10])  # torn in its first line
    assert predictions.read_journal(path, settings, 4, 2) == {}
    assert Path(path).read_bytes() == whole.split(b"\n")[0] + b"\n"


def test_a_journal_that_another_job_takes_over_stays_as_it_is(tmp_path):
    """A job may load a large model while the other one begins the journal."""
    path = tmp_path / "p.json.partial.jsonl"
    path.write_text('{"half of a li')
    with owning(tmp_path / OWNER):
        (tmp_path / OWNER).write_text('{"token": "of another job"}')
        with pytest.raises(InputError, match="another job has taken over"):
            predictions.read_journal(str(path), {}, 1, 1)
    assert path.read_text() == '{"half of a li' and len(list(tmp_path.iterdir())) == 2
