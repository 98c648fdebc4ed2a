"""The question file of an evaluation has a name. MMAU's files are not here: tests put their own into the table."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from eval_runs import arguments, evaluate, mmau_record

import reproduce
from evaluation import report, versions
from evaluation.predictions import is_done, settings_path, write_predictions
from paper import rows, table

NEW, OLD = ({"sha256": letter * 64, "version": f"MMAU test-mini of {letter}"} for letter in "ab")


def published(monkeypatch, path, date, odd=0):
    """Put a file into the table of versions. Returns its SHA-256."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setitem(versions.VERSIONS, digest, (date, odd))
    return digest


def predictions_file(path, question_file, **changes):
    """Write the predictions of two questions and their settings. Returns the file's path."""
    predicted = {"model_prediction": "rain", "model_output": "rain", "completion": "rain"}
    records = [mmau_record(i, "a.wav", choices=["rain", "a bell"], answer="rain") | changes for i in range(2)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(str(path), [record | predicted for record in records], {"seed": 1}, question_file)
    return str(path)


# ---- one question file ----


def test_docs_count_the_versions_of_the_table():
    """docs/evaluation.md: seventeen versions, eleven of v05.15.25, three of these with 146 or 147 odd answers."""
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in versions.VERSIONS)
    dates = [date for date, _ in versions.VERSIONS.values()]
    assert dates == sorted(dates, reverse=True) and (dates[0], dates[-1]) == ("2025-08-09", "2024-10-23")
    assert len(dates) == 17 and sum(date >= "2025-05-15" for date in dates) == 11
    assert [odd for _, odd in versions.VERSIONS.values() if odd] == [146, 146, 147]


def test_a_file_has_a_hash_and_mmaus_file_a_version(tmp_path, monkeypatch):
    records = [mmau_record(i, "a.wav") for i in range(2)]
    path = tmp_path / "mmau.json"
    path.write_text(json.dumps(records, indent=2))
    digest = published(monkeypatch, path, "2025-08-09")
    assert versions.identify_file(path, records) == {"sha256": digest, "version": "MMAU test-mini of 2025-08-09"}
    assert versions.describe(versions.identify_file(path, records)) == f"sha256 {digest}, MMAU test-mini of 2025-08-09"
    published(monkeypatch, path, "2025-05-15", odd=147)
    text = "MMAU test-mini of 2025-05-15 (147 answers are not among their choices)"
    assert versions.identify_file(path, records)["version"] == text

    for copy in (path.read_bytes().replace(b"\n", b"\r\n"), b"\n".join(json.dumps(r).encode() for r in records)):
        path.write_bytes(copy)  # other line ends; JSON lines
        unknown = {"sha256": hashlib.sha256(copy).hexdigest(), "version": "not a published version of MMAU test-mini"}
        assert versions.identify_file(path, records) == unknown
        assert versions.identify_file(path, [{"audio": "a.wav"}]) == {"sha256": unknown["sha256"]}


# ---- predictions files ----


def test_predictions_files_name_their_question_file(tmp_path):
    a, b, c = (predictions_file(tmp_path / name, file) for name, file in (("a", NEW), ("b", OLD), ("c", NEW)))
    short = {name: f"sha256 {name * 12}, MMAU test-mini of {name}" for name in "ab"}
    assert versions.name_files({"A": a, "C": c}) == [f"question file: {short['a']}"]
    [line] = versions.name_files({"A": a, "B": b, "C": c})
    assert line.startswith(f"warning: different question files: A, C: {short['a']}; B: {short['b']}. Scores are")
    assert versions.name_files({}) == []


@pytest.mark.parametrize("saved", [None, {"seed": 1}, [], {"question_file": None}, {"question_file": [1]}])
def test_a_file_that_is_not_recorded_is_not_named(tmp_path, saved):
    """An earlier version of this code wrote the settings, or there are none."""
    a, b = predictions_file(tmp_path / "a", NEW), predictions_file(tmp_path / "b", OLD)
    Path(settings_path(b)).unlink() if saved is None else Path(settings_path(b)).write_text(json.dumps(saved))
    assert versions.name_files({"A": a, "B": b}) == []


@pytest.mark.parametrize("odd", [7, None, ["x"], "\x1b[2J\n"])
def test_odd_records_of_a_question_file_are_printed_in_one_line(tmp_path, odd):
    a = predictions_file(tmp_path / "a", {"sha256": odd, "version": odd})
    [line] = versions.name_files({"A": a})
    assert line.isprintable()


def test_the_name_of_the_question_file_does_not_decide_what_is_done(tmp_path):
    """Files with other bytes may hold the same records. Settings of earlier versions of this code have no name."""
    out = predictions_file(tmp_path / "a", NEW)
    assert is_done(out, {"seed": 1}) and not is_done(out, {"seed": 2})
    saved = json.loads(Path(settings_path(out)).read_text())
    assert saved.pop("question_file") == NEW
    Path(settings_path(out)).write_text(json.dumps(saved))
    assert is_done(out, {"seed": 1})


# ---- commands ----


def test_evaluations_print_and_store_the_file_and_compare_warns(mmau, tmp_path, monkeypatch, capsys):
    """Two versions with other ids; then one with another answer, and one that was saved again."""
    records = json.loads((mmau / "mmau.json").read_text())
    a, b, c, d = (mmau / f"version_{name}.json" for name in "abcd")
    a.write_text(json.dumps(records, indent=2))
    b.write_text(json.dumps([r | {"id": f"new-{r['id']}"} for r in records]))
    c.write_text(json.dumps([r | {"answer": r["choices"][1]} for r in records]))
    d.write_text(json.dumps(records))
    digests = [published(monkeypatch, path, f"2025-06-2{i}") for i, path in enumerate((a, b))]
    for path in (a, b, c, d):
        assert evaluate(*arguments(mmau, tmp_path / path.name, "--data", path, "--limit", 2)) == 0
    printed = capsys.readouterr().out
    for i, (path, digest) in enumerate(zip((a, b), digests)):
        file = {"sha256": digest, "version": f"MMAU test-mini of 2025-06-2{i}"}
        assert f"questions: {path}, sha256 {digest}, {file['version']}\n" in printed
        assert json.loads(Path(settings_path(str(tmp_path / path.name))).read_text())["question_file"] == file
    assert f"questions: {c}, sha256 " in printed and "not a published version of MMAU test-mini" in printed

    def compared(one, other):
        status = evaluate("--compare", tmp_path / one.name, tmp_path / other.name)
        return status, capsys.readouterr()

    status, printed = compared(a, b)
    warning = f"warning: different question files: A: sha256 {digests[0][:12]}, MMAU test-mini of 2025-06-20; B: "
    assert status == 0 and printed.out.startswith(warning) and "McNemar" in printed.out
    status, printed = compared(a, a)
    assert status == 0 and printed.out.startswith("question file: sha256 ") and "warning" not in printed.out
    status, printed = compared(a, d)
    same = ", not a published version of MMAU test-mini. Their questions and clips are the same\n"
    assert status == 0 and printed.out.startswith("question files: A: sha256 ") and same in printed.out
    status, printed = compared(a, c)
    assert status == 1 and printed.out.startswith(warning) and "different questions: number 1" in printed.err


def test_tables_of_a_run_and_of_the_paper_name_the_file(tmp_path):
    line = f"question file: sha256 {'a' * 12}, MMAU test-mini of a"
    warning = "warning: different question files: "
    results = [(step, predictions_file(tmp_path / f"{step}.json", NEW)) for step in (1, 2)]
    assert report.run_report(tmp_path, results, "of what").splitlines()[-1] == line
    assert f"- {line}\n" in (tmp_path / "mmau_scores.md").read_text()
    predictions_file(tmp_path / "2.json", OLD)
    assert report.run_report(tmp_path, results, "of what").splitlines()[-1].startswith(f"{warning}step_000001: sha256 ")

    args = reproduce.parse_args(["--out", str(tmp_path), "--rows", "untouched_answer,sft_full"])
    jobs = rows.jobs(args)
    for job in jobs:
        predictions_file(job.predictions, NEW)
    assert f"- {line}\n" in table.write_table(args, jobs, picture=False)
    predictions_file(jobs[1].predictions, OLD, id="another")
    text = table.write_table(args, jobs, picture=False).replace("\\", "")
    assert f"- {warning}untouched_answer of seed 0: sha256 " in text and "; sft_full of seed 0: sha256 bbb" in text
    assert json.loads((tmp_path / "results.json").read_text())["question_file"][0].startswith(warning)
