"""The predictions file and its journal: what they hold, and when they may be reused."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from data import Question, parse_record
from evaluation import predictions
from evaluation.scores import FIELDS, accuracy_by, is_right, read_predictions
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
    keys = ["model_prediction", "model_output", "answer_prediction"]
    assert voted == {"id": 1, **dict.fromkeys(keys, "rain"), "completion": texts[0]}
    empty = dict.fromkeys([*keys, "completion"], "")
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


# ---- the benchmarks' own scripts ----

VECTORS = Path(__file__).parent / "vectors"  # predictions, and what MMAR's and MMSU's own scripts print for them


def tallies(questions, predicted) -> dict[str, tuple[int, int]]:
    """Count as this project's tables do: label -> (right, questions)."""
    correct = list(map(is_right, questions, predicted))
    counts = {
        value: tuple(score) for field in FIELDS for value, score in accuracy_by(questions, correct, field).items()
    }
    return {"all": (sum(correct), len(correct))} | counts


def mmar_script(text: str) -> dict[str, tuple[int, int]]:
    """Count as MMAR's evaluation.py does for a JSON list: by modality, category and sub-category."""
    right, total = Counter(), Counter()
    for record in json.loads(text):
        said, answer, *choices = (
            set(re.findall(r"\b\w+\b", text.lower()))
            for text in (record["answer_prediction"], record["answer"], *record["choices"])
        )
        wrong = set().union(*(choice - answer for choice in choices if choice != answer))
        labels = ["all", record["modality"], record["category"], record["sub-category"]]
        total.update(labels)
        right.update(labels if said and answer <= said and not said & wrong else [])
    return {label: (right[label], total[label]) for label in total}


def mmsu_script(text: str) -> dict[str, tuple[int, int]]:
    """Count as MMSU's mmsu_evaluation.py does for JSON lines: by category, and by sub-category within it."""
    right, total = Counter(), Counter()
    for line in text.splitlines():
        record = json.loads(line)
        said = record["response"].strip().replace("\n", "")
        letter = said[0] if said[0] in "ABCD" else said[-2]
        labels = ["all", record["category"], f"{record['category']}: {record['sub-category']}"]
        total.update(labels)
        right.update(labels if record[f"choice_{letter.lower()}"] == record["answer_gt"] else [])
    return {label: (right[label], total[label]) for label in total}


def printed(name: str, pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, (VECTORS / f"{name}_totals.txt").read_text(), re.MULTILINE)


def test_totals_are_those_of_mmars_script():
    path = VECTORS / "mmar_predictions.jsonl"
    counted = tallies(*read_predictions(str(path)))
    assert counted == mmar_script(f"[{','.join(path.read_text().splitlines())}]")
    shown = printed("mmar", r"^(.+?) ?:? ([0-9.]+)% over ([0-9]+) samples$")
    assert len(shown) == len(counted) == 15
    for label, share, total in shown:
        right, number = counted["all" if label == "Total Accuracy" else label]
        assert (f"{right / number * 100:.2f}", str(number)) == (share, total), label


def test_totals_are_those_of_mmsus_script():
    path = VECTORS / "mmsu_predictions.jsonl"
    counted = tallies(*read_predictions(str(path)))
    assert counted == mmsu_script(path.read_text())
    shown = printed("mmsu", r"^(?:Category: (\w+)|Overall)(?:, Sub-category: (\w+))?.*Accuracy: ([0-9.]+)$")
    assert len(shown) == len(counted) == 7
    for category, sub_category, share in shown:
        right, number = counted[": ".join(filter(None, (category, sub_category))) or "all"]
        assert f"{right / number:.4f}" == share


@pytest.mark.parametrize("said, letter", [("B", "B"), ("B.", "B"), ("(B)", "B"), ("It is B.", "B"), ("A cat", "A"),
                                          ("cat", ""), ("", ""), ("?", "")])  # fmt: skip
def test_responses_of_other_programs_are_read_as_mmsus_script_does(tmp_path, said, letter):
    record = json.loads((VECTORS / "mmsu_predictions.jsonl").read_text().splitlines()[0]) | {"response": said}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    _, [predicted] = read_predictions(str(tmp_path / "p.jsonl"))
    assert predicted == (record[f"choice_{letter.lower()}"] if letter else "")


def test_answers_are_shared_among_the_rows_of_a_predictions_file(tmp_path):
    rows = [{"audio": "a.wav", "question": "?", "answer": answer, "model_prediction": "no"} for answer in ("yes", "no")]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert tallies(*read_predictions(str(tmp_path / "p.json"))) == {"all": (2, 2)}


@pytest.mark.parametrize("name, script", [("mmar", mmar_script), ("mmsu", mmsu_script)])
def test_what_is_written_gives_the_scripts_the_same_totals(tmp_path, name, script):
    """For right and wrong choices, other words, letters, several choices and nothing."""
    records = [json.loads(line) for line in (VECTORS / f"{name}_predictions.jsonl").read_text().splitlines()]
    asked, problems = predictions.without_answers([("here", record) for record in records])
    assert len(problems) == len(records)  # another program's predictions are not overwritten
    questions = [parse_record(record, "here", "") for record in asked]
    answers = {}
    for i, q in enumerate(questions):
        first, second = q.choices[:2]
        texts = [q.answer, first, second, f"It is {second}", "", "A", "B", f"{first} or {second}", q.answer.upper()]
        answers[i] = [f"<answer>{texts[i % len(texts)]}</answer>"]
    out = tmp_path / "p.json"
    predictions.write_predictions(str(out), predictions.with_answers(asked, questions, answers, {}, False), {})
    counted = script(out.read_text())
    assert tallies(*read_predictions(str(out))) == counted and 0 < counted["all"][0] < counted["all"][1]


def test_mmaus_script_agrees_if_choices_have_letters(tmp_path):
    """The Hub's copy of MMAU. The prediction is the file's spelling of the choice, so the letters are compared, too."""
    choices = ["(A) C", "(B) C#", "(C) a man", "(D) man a"]
    for answer in choices:
        record = {"audio_path": "a.wav", "instruction": "?", "choices": choices, "answer": answer}
        question = parse_record(record, "here", "")
        for said in ("C", "C#", "a man", "man a", "A", "", "a c", "It is a man", "(B) C#", "b c", "d man a"):
            [predicted] = predictions.with_answers([record], [question], {0: [said]}, {}, False)
            record_of_mmar = predicted | {"modality": "x", "category": "x", "sub-category": "x"}
            right = mmar_script(json.dumps([record_of_mmar]))["all"][0]  # the same rule as MMAU's
            assert is_right(question, said) == is_right(question, predicted["model_prediction"]) == right
