"""Question files of every format, prompts, bad input, and the questions of each rank."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import Question, build_prompt, load_questions, step_indices
from infra.audio import load_audio
from infra.errors import InputError

R1_AQA = {"id": 7, "video_name": "x", "video_id": 3, "question_text": "Which video sound is in the video?"}
R1_AQA |= {"multi_choice": ["a dog", "it's"], "answer": 1, "question_relation": "Sound", "question_type": "Which"}
R1_AQA |= {"dataset_name": "AVQA", "audio_path": "a.wav"}
AVQA = {key: R1_AQA[key] for key in R1_AQA if key not in ("dataset_name", "audio_path")} | {"video_name": "a"}
MMAU = {"id": "u-1", "audio_id": "./a.wav", "question": "In the video?", "choices": ["a dog", "it's"]}
MMAU |= {"answer": "a dog", "task": "sound", "category": "y", "sub-category": "z", "difficulty": "hard"}
PLAIN = {"audio": "a.wav", "question": "In the video?", "choices": ["a dog", "it's"], "answer": "it's"}
FORMATS = {"R1-AQA": R1_AQA, "AVQA": AVQA | {"id": 8}, "MMAU": MMAU, "plain": PLAIN}


def changed(record: dict, **fields) -> str:
    """Return the record as JSON with some fields changed. None removes a field."""
    return json.dumps({key: value for key, value in {**record, **fields}.items() if value is not None})


def write_clip(path, samples=None, rate=16_000, subtype="FLOAT"):
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, np.full(1600, 0.1) if samples is None else samples, rate, subtype=subtype)


def load(folder, *lines, audio_dir=None):
    (folder / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_questions(str(folder / "q.jsonl"), audio_dir)


# ---- question files ----


@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.txt"])
@pytest.mark.parametrize("as_list", [True, False], ids=["list", "lines"])
def test_formats(tmp_path, name, as_list):
    """All four formats, also mixed, as a JSON list or as lines, whatever the suffix of the file."""
    audio, path, choices = str(tmp_path / "a.wav"), str(tmp_path / name), ["a dog", "it's"]
    write_clip(tmp_path / "a.wav")
    lines = [json.dumps(record) for record in FORMATS.values()]
    text = "\n [" + ",\n".join(lines) + "]\n" if as_list else "\n" + "\r\n\n".join(lines)
    (tmp_path / name).write_bytes(text.encode())
    place = f"{path}, record 4" if as_list else f"{path}, line 8"
    assert load_questions(path) == [
        Question("7", audio, "Which audio sound is in the audio?", choices, "it's"),
        Question("8", audio, "Which audio sound is in the audio?", choices, "it's"),
        Question("u-1", audio, "In the video?", choices, "a dog", "sound", "hard", "z", category="y"),
        Question(place, audio, "In the video?", choices, "it's"),
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_audio_paths(tmp_path, format):
    """They start from audio_dir, or else from the folder of the question file."""
    write_clip(tmp_path / "a.wav")
    write_clip(tmp_path / "clips" / "a.wav")
    line = json.dumps(FORMATS[format])
    assert load(tmp_path, line)[0].audio == str(tmp_path / "a.wav")
    assert load(tmp_path, line, audio_dir=str(tmp_path / "clips"))[0].audio == str(tmp_path / "clips" / "a.wav")


def test_absolute_audio_and_relative_file(tmp_path, monkeypatch):
    """An absolute audio path stays as it is. A question file may be named without a folder."""
    write_clip(tmp_path / "a.wav")
    line = changed(PLAIN, audio=str(tmp_path / "a.wav"))
    assert load(tmp_path, line, json.dumps(PLAIN), audio_dir=str(tmp_path))[0].audio == str(tmp_path / "a.wav")
    monkeypatch.chdir(tmp_path)
    assert [question.audio for question in load_questions("q.jsonl")] == [str(tmp_path / "a.wav"), "a.wav"]


@pytest.mark.parametrize("record", [MMAU, PLAIN], ids=["MMAU", "plain"])
@pytest.mark.parametrize("withheld", [{"answer": None}, {"answer": ""}], ids=["no key", "empty"])
def test_withheld_answer(tmp_path, record, withheld, capsys):
    """MMAU withholds the answers of its big test set: it leaves them out or empty."""
    write_clip(tmp_path / "a.wav")
    loaded = load(tmp_path, changed(record, **withheld), json.dumps(record | {"answer": None, "id": "other"}))
    assert [question.answer for question in loaded] == [None, None]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("record", [PLAIN, MMAU, R1_AQA, AVQA], ids=["plain", "MMAU", "R1-AQA", "AVQA"])
@pytest.mark.parametrize("absent", [None, float("nan")])
def test_null_and_nan_are_absent(tmp_path, record, absent):
    """Tables have every column in every record, also those of another format."""
    fields = {"id", "task", "difficulty", "sub-category", *PLAIN, *MMAU, *R1_AQA, *AVQA} - record.keys()
    lines = [record | dict.fromkeys(fields, absent), record | {"id": absent}, {**record, "id": "x"}]
    found = load(tmp_path, *map(json.dumps, lines))
    without = ({k: v for k, v in line.items() if v is not None and v == v} for line in lines)
    expected = load(tmp_path, *map(json.dumps, without))
    assert found == expected and [q.id for q in found[1:]] == [found[1].place, "x"]


def test_mmau_answer_that_is_no_choice(tmp_path):
    """It is kept as published."""
    write_clip(tmp_path / "a.wav")
    lines = [json.dumps(MMAU), changed(MMAU, answer="A dog", id=2), changed(MMAU, answer="a cat", id=3)]
    assert [question.answer for question in load(tmp_path, *lines)] == ["a dog", "A dog", "a cat"]


@pytest.mark.parametrize(
    "answer, choice", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9"), ("a\u00e4 ", "aa\u0308")]
)
def test_an_answer_is_found_in_other_spellings_of_unicode(tmp_path, answer, choice):
    write_clip(tmp_path / "a.wav")
    [question] = load(tmp_path, changed(PLAIN, answer=answer, choices=["tea", choice]))
    assert (question.answer, question.choices[1]) == (answer, choice)  # as the file spells them


@pytest.mark.parametrize(
    "template, ending",
    [
        ("direct", ""),
        ("answer", " Output the final answer in <answer> </answer>."),
        ("think", " Output the thinking process in <think> </think> and final answer in <answer> </answer>."),
    ],
)
def test_build_prompt(template, ending):
    """The exact texts of the released checkpoints. Braces in a question stay."""
    text = "Is {it} 100%? Please choose the answer from the following options: ['a', \"it's\"]."
    assert build_prompt(Question("0", "a.wav", "Is {it} 100%?", ["a", "it's"], "a"), template) == text + ending


def test_the_prompt_of_an_open_question_has_no_options():
    texts = [build_prompt(Question("0", "a.wav", "Is {it}?", [], "a"), template) for template in ("direct", "answer")]
    assert texts == ["Is {it}?", "Is {it}? Output the final answer in <answer> </answer>."]


@pytest.mark.parametrize(
    "choice, shown",
    [
        ("C:\\new", "'C:\\new'"),
        ("\u0915\u094d\u200d\u0937", "'\u0915\u094d\u200d\u0937'"),  # a zero-width joiner
        ("10\u00a0km\u3000", "'10\u00a0km\u3000'"),
        ("one\ntwo", "'one\ntwo'"),
        ('it\'s "it"', "'it's \"it\"'"),
    ],
)
def test_a_choice_is_shown_as_it_has_to_be_written(choice, shown):
    """repr would escape each of these."""
    assert repr(choice) != shown
    assert f": [{shown}, 'a']." in build_prompt(Question("0", "a.wav", "What?", [choice, "a"], "a"), "answer")


def test_prompts_are_those_of_a_list_wherever_repr_escapes_nothing():
    pieces = ["a", "it's", 'a "b"', "é", "e\u0301", "犬", "🎵", "<b>", "{x}", "%", "½", " ", "\u0645\u0631", "C#", ""]
    rng, compared = np.random.default_rng(0), 0
    for _ in range(2_000):
        choices = ["".join(rng.choice(pieces, 3)) for _ in range(3)]
        if not any("'" in choice and '"' in choice for choice in choices):
            prompt = build_prompt(Question("0", "a.wav", "What?", choices, "a"), "direct")
            assert prompt == f"What? Please choose the answer from the following options: {choices}."
            compared += 1
    assert compared > 1_000


def test_build_prompt_unknown_template():
    """The message names the template and the known ones."""
    with pytest.raises(InputError, match="'thinking'.*direct, answer, think"):
        build_prompt(Question("0", "a.wav", "What?", ["a", "b"], "a"), "thinking")


# ---- bad input ----

OK, FILE = json.dumps(PLAIN), "q.json"
LOST = changed(AVQA, video_name="b_000007")
# case: (question file: text, bytes or what to do with its path), what the message names
BAD = {
    "missing file": (lambda path: None, [FILE]),
    "a directory": (Path.mkdir, [FILE]),
    "latin-1": (changed(PLAIN, question="?").replace("?", "é").encode("latin-1"), [FILE, "UTF-8"]),
    "UTF-16": (OK.encode("utf-16"), [FILE, "UTF-8"]),
    "empty file": ("", [FILE]),
    "empty list": ("[ ]", [FILE]),
    "malformed line": (f"{OK}\n\n{OK[:-1]}\n{OK}", [FILE, "line 3", "JSON"]),
    "malformed list": (f"[{OK},\n{OK}\n{OK}]", [FILE, "line 3", "JSON"]),
    "unclosed list": (f"[{OK},\n{OK}", [FILE, "line 2", "JSON"]),
    "one object over lines": (json.dumps(PLAIN, indent=1), [FILE, "line 1", "JSON"]),
    "line not an object": (f'{OK}\n"text"', [FILE, "line 2"]),
    "record not an object": (f"[{OK}, null]", [FILE, "record 2"]),
    "no fields": ("{}", [FILE, "line 1"]),
    "unknown fields": (f'{OK}\n{{"sound": 1, "text": 2}}', [FILE, "line 2", "sound", "text"]),
    "no question": (changed(PLAIN, question=None), [FILE, "line 1", "question"]),
    "empty question": (changed(PLAIN, question=""), [FILE, "line 1", "question"]),
    "blank AVQA question": (changed(AVQA, question_text=" "), [FILE, "line 1", "question_text"]),
    "choices not a list": (changed(PLAIN, choices="ab"), [FILE, "line 1", "choices"]),
    "one choice": (f"[{OK}, {changed(MMAU, choices=['a dog'])}]", [FILE, "record 2", "choices"]),
    "choice not text": (changed(AVQA, multi_choice=["a", 2]), [FILE, "line 1", "multi_choice"]),
    "index negative": (changed(R1_AQA, answer=-1), [FILE, "line 1", "answer", "-1"]),
    "index text": (changed(AVQA, answer="2"), [FILE, "line 1", "answer", "'2'"]),
    "answer not a choice": (changed(PLAIN, answer="A dog"), [FILE, "line 1", "'A dog'"]),
    "MMAU's answer is an index": (changed(MMAU, answer=1), [FILE, "line 1", "answer", "1"]),
    "no audio name": (changed(PLAIN, audio=7), [FILE, "line 1", "audio"]),
    "the same id twice": (f"{changed(MMAU)}\n{OK}\n{changed(MMAU)}", [FILE, "line 3", "'u-1'", "line 1"]),
    "answer in other case": (changed(PLAIN, answer="It's"), [FILE, "line 1", '"It\'s"', "only in case or spaces"]),
    "answer in other space": (
        changed(PLAIN, answer="a  dog "),
        [FILE, "line 1", "'a dog'", "only in case or spaces"],
    ),
    "half a character": (changed(PLAIN, question="\ud800?"), [FILE, "line 1", "half of a character"]),
    "half a character in an id": (changed(PLAIN, id="\ud800"), [FILE, "line 1", "half of a character"]),
    "NUL in a name": (changed(PLAIN, audio="a\0.wav"), [FILE, "line 1", "NUL"]),
    "nested 100,000 deep": ("[" * 100_000, [FILE, "nested"]),
    "a number of 5,000 digits": (
        changed(AVQA, answer=1).replace(" 1,", " " + 5_000 * "1" + ","),
        [FILE, "line 1"],
    ),
    "a huge value": (changed(PLAIN, choices="x" * 100_000), [FILE, "line 1", "(100002 characters)"]),
    "a video's second of 5,000 digits": (changed(AVQA, video_name="x_" + "9" * 5_000), ["no audio file"]),
    "audio_id leaves its folder": (
        changed(MMAU, audio_id="x/../../a.wav"),
        [FILE, "line 1", "leaves", "audio_dir"],
    ),
    "audio_id leaves its folder, in Windows": (changed(MMAU, audio_id="x\\..\\..\\a.wav"), [FILE, "line 1", "leaves"]),
    "video_name leaves its folder": (changed(AVQA, video_name="../a"), [FILE, "line 1", "leaves"]),
    "audio is a folder": (changed(PLAIN, audio="."), ["is a folder"]),
    "missing audio": (f"{OK}\n{LOST}", ["b_000007.wav: no audio file"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case):
    """Every fault is an InputError of one line that names the file, the line or record, and what is wrong."""
    questions, named = BAD[case]
    write_clip(tmp_path / "a.wav")
    if callable(questions):
        questions(tmp_path / FILE)
    else:
        (tmp_path / FILE).write_bytes(questions if isinstance(questions, bytes) else questions.encode())
    with pytest.raises(InputError) as error:
        for question in load_questions(str(tmp_path / FILE)):
            load_audio(question.audio)
    message = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in message
    assert [name for name in named if name not in message] == []


def test_malformed_records_are_reported_together(tmp_path):
    """The message has their number and the first 20 in full."""
    (tmp_path / FILE).write_text("\n".join([OK] + 25 * [changed(PLAIN, answer="z")] + [OK]))
    with pytest.raises(InputError) as error:
        load_questions(str(tmp_path / FILE))
    first, *lines = str(error.value).split("\n")
    assert first == "25 problems"
    assert len(lines) == 21 and lines[-1] == "  ... and 5 more"
    assert [line.split(": ")[0].split(", ")[1] for line in lines[:20]] == [f"line {i}" for i in range(2, 22)]
    (tmp_path / FILE).write_text(f"{OK}\n{{\n3\n{OK}")
    with pytest.raises(InputError, match="2 problems\n.*line 2: not valid JSON.*\n.*line 3: expected a JSON object"):
        load_questions(str(tmp_path / FILE))


# ---- which questions a rank trains on ----


def stream(number, steps, prompts, world_size, seed=0):
    """Return the questions that all ranks together train on, step by step."""
    places = [(step * prompts * world_size, rank) for step in range(steps) for rank in range(world_size)]
    return [i for position, rank in places for i in step_indices(number, position, prompts, rank, seed)]


@pytest.mark.parametrize("number", [1, 5, 7, 12])
@pytest.mark.parametrize("prompts, world_size", [(1, 1), (4, 1), (2, 2), (1, 3), (2, 8), (3, 5)])
def test_every_question_once_an_epoch(number, prompts, world_size):
    """Also if a step reaches into the next epoch, or is longer than an epoch."""
    indices = stream(number, 2 * number, prompts, world_size)
    assert len(indices) == 2 * number * prompts * world_size
    for start in range(0, len(indices), number):
        assert sorted(indices[start : start + number]) == list(range(number))


def test_same_stream_for_any_number_of_ranks():
    """One rank with 4 prompts, two with 2 and four with 1 see the same questions in each step."""
    assert stream(11, 9, 4, 1) == stream(11, 9, 2, 2) == stream(11, 9, 1, 4)


def test_the_stream_goes_on_with_another_number_of_ranks():
    """3 steps of 2 ranks with 2 prompts, then one rank with 3: no question is missing or used twice."""
    first = stream(7, 3, 2, 2)
    rest = [i for position in range(12, 21, 3) for i in step_indices(7, position, 3, 0, 0)]
    assert first + rest == stream(7, 21, 1, 1)


def test_every_seed_and_epoch_has_its_own_order():
    """5 seeds by 5 epochs give 25 orders, none of them the file's own."""
    orders = {tuple(step_indices(20, 20 * epoch, 20, 0, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders | {tuple(range(20))}) == 26


def test_step_indices_is_pure():
    """The questions depend only on the arguments, and the global random generator is not used."""
    np.random.seed(0)
    before = step_indices(10, 24, 4, 1, 0)
    state = np.random.get_state()[1].copy()
    stream(10, 5, 4, 2, seed=1)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(1)
    assert step_indices(10, 24, 4, 1, 0) == before and [type(index) for index in before] == [int] * 4
