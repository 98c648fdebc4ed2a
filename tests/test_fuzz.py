"""Any input works or raises an InputError with a message. Inputs that once failed are kept as examples.

hypothesis draws the same examples every time and stores none.
"""

import json
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data import TEMPLATES, build_prompt, load_questions
from evaluation.predictions import append_journal, is_done, read_journal
from evaluation.report import write_html
from evaluation.scores import compare, is_right, majority_vote, read_predictions
from infra.audio import load_audio
from infra.errors import InputError
from model.checkpoints import remembered_template
from model.lora import adapter_base
from questions.fields import NAMES
from reward import accuracy_reward, extract_answer, format_reward, mmau_match, prediction
from training.metrics import cut_jsonl, draw_curves

fuzz = settings(max_examples=150, derandomize=True, deadline=None, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
few = settings(fuzz, max_examples=60)

# Any text, even with half of a character (a lone surrogate), which JSON can hold; and the pieces of tags and words.
ANY_TEXT = st.text(st.characters(categories=None), max_size=40)
PIECES = [
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "<answer",
    ">",
    "\n",
    " ",
    "\t",
    "a",
    "B",
    "rain",
    "\0",
    "é",
    "\ud800",
]
TAGGED = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=10,
)
DEEP, LONG = "[" * 100_000, "1" * 5_000  # deeper than json can recurse; longer than Python allows an int to be


@contextmanager
def seconds(limit):
    """Fail after `limit` seconds: a pattern that backtracks over a megabyte would take days."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not done after {limit} s"))
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    soundfile.write(folder / "a.wav", 0.1 * np.ones(1600), 16_000)
    return folder


def attempt(function, *args):
    """Return the function's value, or None if it raises an InputError. Its message must be printable."""
    try:
        return function(*args)
    except InputError as error:
        assert str(error).strip()
        str(error).encode("utf-8", "backslashreplace").decode()
        return None


# ---- completions ----


@fuzz
@given(TAGGED | ANY_TEXT, TAGGED | ANY_TEXT, st.sampled_from(list(TEMPLATES)))
def test_any_completion_has_rewards(completion, answer, template):
    assert accuracy_reward(completion, answer) in (0.0, 1.0)
    assert format_reward(completion, template) in (0.0, 1.0)
    predicted = prediction(completion)
    assert predicted == predicted.strip() and predicted in completion
    assert (extract_answer(completion) is None) or predicted == extract_answer(completion)


@fuzz
@given(TAGGED | ANY_TEXT, st.lists(TAGGED | ANY_TEXT, min_size=2, max_size=8), st.data())
def test_any_texts_are_matched(predicted, choices, data):
    answer = data.draw(st.sampled_from(choices))
    assert mmau_match(answer, predicted, choices) in (True, False)
    assert not mmau_match(answer, "", choices)
    assert majority_vote(choices) in choices


MEGABYTE = 1 << 20
BLOW_UPS = ["<answer>", "</answer>", "<answer></answer>", "<think>", "</think> ", "<think></think>", " ", "\n",
            "<answer>\n", "a ", "\u3000", "<", "_", "é"]  # fmt: skip


@pytest.mark.parametrize("piece", BLOW_UPS)
def test_a_megabyte_takes_linear_time(piece):
    """Whichever piece the megabyte repeats, also between tags that match the beginning of a pattern."""
    text = piece * (MEGABYTE // len(piece))
    with seconds(60):
        for completion in (
            text,
            f"<think>{text}</answer>",
            f"<answer>{text}</answer>",
            f"<think></think>{text}<answer",
        ):
            for template in TEMPLATES:
                format_reward(completion, template)
            extract_answer(completion)
            accuracy_reward(completion, text)
            mmau_match(text, completion, [text, "b", completion])


# ---- question files ----

LISTS = [["rain", "wind"], [], ["a.wav"], ["A. rain", "B. wind"], "(A) rain (B) wind", "['rain', 'wind']", "[" * 9_999]
TEXTS = ["a.wav", "rain", "../a.wav", "", "\0", "A", "(B)", "B. wind", "?\nChoices:\nA. rain\nB. wind"]
VALUES = st.one_of(JSON, st.sampled_from([*LISTS, *TEXTS, 0, 1, True, 1.0]))
FIELDS = sorted({"id", "source_dataset", "choice_a", "choice_b", *(name for names in NAMES.values() for name in names)})
PLAIN = {"audio": "a.wav", "question": "What?", "choices": ["rain", "wind"], "answer": "rain"}
AVQA = {"video_name": "a", "question_text": "What?", "multi_choice": ["rain", "wind"], "answer": 0}
RECORDS = st.builds(
    lambda base, changes: base | changes,
    st.sampled_from([PLAIN, AVQA, {}]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)


def check_questions(folder, content: bytes):
    (folder / "q.jsonl").write_bytes(content)
    for question in attempt(load_questions, str(folder / "q.jsonl")) or []:
        for template in TEMPLATES:
            build_prompt(question, template).encode()
        assert question.answer is None or question.answer
        assert len(question.choices) != 1 and len(question.spelled) in (0, len(question.choices))
        for text in ("", "A", *question.choices, *question.spelled):
            assert question.answer is None or is_right(question, text) in (True, False)


@few
@given(content=st.binary(max_size=200))
@example(content=b"\xef\xbb\xbf")
@example(content=b"\xff\xfe{\0}\0")
@example(content=DEEP.encode())
@example(content=b'{"a": ' + LONG.encode() + b"}")
@example(content=b"[" + LONG.encode() + b"]")
@example(content=b'["a"')
def test_any_bytes_as_questions(folder, content):
    check_questions(folder, content)


@fuzz
@given(record=RECORDS | JSON, as_list=st.booleans())
@example(record=PLAIN | {"question": "\ud800"}, as_list=False)  # no tokenizer takes half a character
@example(record=PLAIN | {"task": "\udfff"}, as_list=False)  # no file takes it either
@example(record=PLAIN | {"audio": "a\0.wav"}, as_list=True)
def test_any_record_as_a_question(folder, record, as_list):
    text = json.dumps([record]) if as_list else json.dumps(record)
    check_questions(folder, text.encode())


@fuzz
@given(
    st.lists(st.lists(st.sampled_from([*TEXTS, '"', "a,b", "\r", "é"]), max_size=5), max_size=4),
    st.sampled_from(",;\t"),
)
def test_any_cells_as_a_question(folder, rows, delimiter):
    header = delimiter.join(["file_name", "question", "answer", "choices"])
    check_questions(folder, "\n".join([header, *(delimiter.join(row) for row in rows)]).encode())


# ---- clips ----

AUDIO = {}  # suffix -> one good file


def audio_file(folder, suffix):
    if suffix not in AUDIO:
        path = folder / f"whole{suffix}"
        soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=4_000), 16_000)
        AUDIO[suffix] = path.read_bytes()
    return AUDIO[suffix]


def check_clip(folder, suffix, content: bytes):
    path = folder / f"clip{suffix}"
    path.write_bytes(content)
    audio = attempt(load_audio, str(path))
    if audio is not None:
        assert audio.dtype == np.float32 and audio.ndim == 1 and len(audio) >= 400 and np.isfinite(audio).all()


@few
@given(st.sampled_from([".wav", ".flac", ".ogg", ".mp3", ".raw", ".aiff", ""]), st.binary(max_size=3000))
@example(".mp3", b"\xff\xfb\x90Info")  # ends where a size should follow
def test_any_bytes_as_a_clip(folder, suffix, content):
    check_clip(folder, suffix, content)


@fuzz
@given(st.sampled_from([".wav", ".flac", ".ogg", ".mp3"]), st.data())
def test_any_damage_to_a_clip(folder, suffix, data):
    """Bytes are changed, inserted or cut. Some headers then have false rates, channels or lengths."""
    content = bytearray(audio_file(folder, suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 60) | st.integers(0, len(content) - 1)) % max(len(content), 1)
        kind = data.draw(st.sampled_from(["change", "cut", "drop", "insert"]))
        if kind == "change":
            content[place : place + 4] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "cut":
            del content[place:]
        elif kind == "drop":
            del content[place : place + data.draw(st.integers(1, 50))]
        else:
            content[place:place] = data.draw(st.binary(max_size=50))
        if not content:
            break
    with seconds(60):
        check_clip(folder, suffix, bytes(content))


# ---- damaged files of the scripts ----


def predictions_files(path: Path):
    attempt(read_predictions, str(path))
    attempt(compare, str(path), str(path))
    return is_done(str(path), {"x": 1})


@few
@given(content=st.binary(max_size=200))
@example(content=DEEP.encode())
def test_any_bytes_as_predictions_and_their_settings(folder, content):
    (folder / "p.json").write_bytes(content)
    (folder / "p.json.settings.json").write_bytes(content)
    assert not predictions_files(folder / "p.json")


PREDICTED = st.dictionaries(
    st.sampled_from(["model_prediction", "model_output", "completion", "samples", "error"]), JSON
)


@fuzz
@given(record=st.builds(dict.__or__, RECORDS, PREDICTED), settings_=JSON)
@example(record=PLAIN | {"model_prediction": "rain", "samples": 7}, settings_=[])
def test_any_record_as_a_prediction(folder, record, settings_):
    (folder / "p.json").write_text(json.dumps([record, record | {"id": 2}]))
    (folder / "p.json.settings.json").write_text(json.dumps(settings_))
    assert not predictions_files(folder / "p.json")
    read = attempt(read_predictions, str(folder / "p.json"))
    if read is not None:
        questions, predicted = read
        records = [record | {"model_prediction": text} for text in predicted]
        write_html(str(folder / "p.html"), questions, records, "caption")


HEADER = {"seed": 1}
ANSWER = st.fixed_dictionaries(
    {"question": JSON | st.integers(-1, 3), "completions": JSON | st.lists(ANY_TEXT, max_size=3)}
)


@fuzz
@given(lines=st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line) | ANSWER, max_size=4))
@example(lines=[{"question": True, "completions": ["a", "b"]}])
@example(lines=[{"question": 0, "completions": "ab"}])
@example(lines=[{"question": 7, "completions": ["a", "b"]}])
def test_any_journal(folder, lines):
    """Each answer taken from the journal is two texts for an existing question, exactly as in the journal."""
    path = folder / "j"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join([json.dumps(HEADER, sort_keys=True).encode(), *texts, b""]))
    answers = read_journal(str(path), HEADER, 3, 2)
    for i, completions in answers.items():
        assert type(i) is int and 0 <= i < 3 and type(completions) is list and len(completions) == 2
        assert {"question": i, "completions": completions} in lines
    append_journal(str(path), {1: ["x", "y"]})
    assert read_journal(str(path), HEADER, 3, 2) == answers | {1: ["x", "y"]}


METRIC = st.fixed_dictionaries({"step": JSON | st.integers(1, 9)}, optional={"reward": JSON, "loss": JSON, "kl": JSON})


@settings(few, max_examples=15)  # drawing is slow
@given(lines=st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line) | METRIC, max_size=5))
@example(lines=[{"step": 1, "loss": None}, {"step": 2, "loss": "high"}, {"step": 3, "loss": 10**400}])
@example(lines=[{"step": 1}])
def test_any_metrics(folder, lines):
    """A resumed run can continue, and the curves show all values that can be drawn."""
    path = folder / "metrics.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join([*texts, b'{"step": 1, "torn']))
    draw_curves(folder)
    cut_jsonl(path, 5)
    assert all(0 < json.loads(line)["step"] <= 5 for line in path.read_text().splitlines())
    draw_curves(folder)


@fuzz
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=DEEP.encode())
@example(content=b'{"template": ["answer"]}')
@example(content=b'{"peft_type": "LORA", "base_model_name_or_path": "\\u0000"}')
def test_any_json_beside_a_checkpoint(folder, content):
    for name in ("aqa.json", "adapter_config.json"):
        (folder / name).write_bytes(content)
    assert attempt(remembered_template, folder) in (None, *TEMPLATES)
    attempt(adapter_base, str(folder))
