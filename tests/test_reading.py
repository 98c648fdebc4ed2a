"""Records of JSON lists, JSON lines and CSV, told apart by content. Bad input of JSON is in test_data.py."""

import csv
import json

import pytest

from data import load_questions
from infra.errors import InputError
from questions.reading import find_records, require

ROWS = [
    {"file_name": "a b.wav", "QuestionText": 'Is it "loud",\nor not?', "answer": "yes", "confidence": "no"},
    {"file_name": "é.wav", "QuestionText": "What; is it?", "answer": "dog", "confidence": ""},
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("name", ["q.csv", "q.json"])
def test_csv(tmp_path, delimiter, ending, quoting, name):
    """As the csv module writes it. An empty cell is an absent field, and empty lines are no records."""
    with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
        file.write(ending)
        writer = csv.DictWriter(file, [*ROWS[0]], delimiter=delimiter, lineterminator=ending, quoting=quoting)
        writer.writeheader()
        writer.writerows(ROWS)
        file.write(ending)
    path = str(tmp_path / name)
    places, records = zip(*require(find_records(path)))
    assert list(records) == [ROWS[0], {k: v for k, v in ROWS[1].items() if v}]
    assert places == (f"{path}, line 3", f"{path}, line 5")
    first, second = load_questions(path)
    assert (first.question, first.answer, first.choices) == (ROWS[0]["QuestionText"], "yes", [])
    assert second.audio == str(tmp_path / "é.wav") and second.id == f"{path}, line 5"


def test_json_with_names_of_fields_as_values_is_no_csv(tmp_path):
    record = {"audio": "x.wav", "question": "?", "choices": ["video", "audio", "text"], "answer": "audio"}
    for text in (json.dumps(record), f"[{json.dumps(record)}]"):
        (tmp_path / "q.json").write_text(text)
        assert load_questions(str(tmp_path / "q.json"))[0].answer == "audio"


def test_a_cell_with_choices(tmp_path):
    choices = ["a, b", 'say "c"']
    with open(tmp_path / "q.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "question", "choices", "answer"])
        rows.writerow(["x.wav", "?", json.dumps(choices), "a, b"])
    [question] = load_questions(str(tmp_path / "q.csv"))
    assert (question.choices, question.answer) == (choices, "a, b")


def test_any_of_several_answers_is_right(tmp_path):
    """Clotho-AQA has three rows for each question. A list of answers means the same."""
    rows = ["a.wav,Who?,man", "a.wav,Who?,boy", "b.wav,Who?,cat", "a.wav,Who?,man", "a.wav,What?,dog"]
    (tmp_path / "q.csv").write_text("\n".join(["file_name,QuestionText,answer", *rows]))
    questions = load_questions(str(tmp_path / "q.csv"))
    assert [(q.answer, q.also) for q in questions] == [
        ("man", ["boy"]), ("boy", ["man"]), ("cat", []), ("man", ["boy"]), ("dog", [])]  # fmt: skip
    (tmp_path / "q.json").write_text(json.dumps([{"audio": "a.wav", "question": "Who?", "answer": ["man", "boy"]}]))
    assert [(q.answer, q.also) for q in load_questions(str(tmp_path / "q.json"))] == [("man", ["boy"])]


@pytest.mark.parametrize(
    "text, message",
    [
        ("audio,question,answer\nx.wav,a,b,c,d\ny.wav,a,b", "line 2: has 5 cells, but the header has 3; quote"),
        ("audio,question,answer\n", "has no questions"),
        ('audio,question,answer\nx.wav,"' + "a" * 200_000 + '",b', "line 2: not valid CSV"),
        ("name,question,answer\nx.wav,a,b", "line 1: not valid JSON.*or CSV with a header"),
        ("audio,question,answer\nx.wav,a\ny.wav,a,b", "line 2: has 2 cells"),
        ('audio,question,answer\nx.wav,"a,b\ny.wav,c,d', "line 3: not valid CSV"),
        ("audio,question,question\nx.wav,a,b", "line 1: has the field 'question' twice"),
        (b"PAR1\x00\xff", "is a parquet file; convert it with python prepare.py"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "q.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"q.csv(, |: ){message}"):
        require(find_records(str(tmp_path / "q.csv")))


def test_left_out_questions_are_counted_and_named(tmp_path, capsys):
    good = {"audio_path": ["a.wav"], "question": "?", "choices": ["x", "y"], "answer": "x"}
    records = [good, good | {"audio_path": ["a.wav", "b.wav"]}, good | {"choices": None}]
    (tmp_path / "q.json").write_text(json.dumps(records))
    assert len(load_questions(str(tmp_path / "q.json"))) == 1
    said = capsys.readouterr().out
    assert "1 of 3 questions are left out: several clips\n" in said and "q.json, record 2\n" in said
    assert "1 of 3 questions are left out: an open question of MMAU-Pro" in said and "q.json, record 3\n" in said
    (tmp_path / "q.json").write_text(json.dumps(records[1:]))
    with pytest.raises(InputError, match="1 of 2 questions are left out: several clips"):
        load_questions(str(tmp_path / "q.json"))
