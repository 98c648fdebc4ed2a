"""The fields of every data set: clip, question, choices, answer, labels; predictions as each file spells them."""

import json

import pytest

from data import build_prompt, load_questions
from evaluation.scores import as_written
from infra.errors import InputError
from questions.fields import LeftOut, read_fields

CHOICES = ["a dog", "a bell", "it's"]
MMAR = {"id": "x", "audio_path": "./audio/x.wav", "question": "What?", "choices": CHOICES, "answer": "a bell"}
MMAR |= {"modality": "mix-sound-music", "category": "Signal Layer", "sub-category": "Pitch", "language": None}
MMSU = {"id": "s", "audio_path": "s.wav", "question": "What?", "choice_a": "a dog", "choice_b": "a bell"}
MMSU |= {"choice_c": "it's", "choice_d": "", "answer_gt": "a bell", "task_name": "pitch", "category": "Reasoning"}
MMSU |= {"sub-category": "Linguistics", "sub-sub-category": "Semantics"}
LETTERS = ["(A) a dog", "(B) a bell", "(C) it's"]
HUB = {"audio_path": "clips/h.wav", "instruction": "What?", "choices": LETTERS, "answer": LETTERS[1], "task": "sound"}
HUB |= {"category": ["Reasoning"]}
COPY = {"audio_path": "c.wav", "question": "What?\nOptions...", "question_only": "What?", "choices": "\n".join(LETTERS)}
COPY |= {"answer": "(B) a bell", "domain": "sound", "task": "Pitch", "difficulty": "easy", "file_name": "other.wav"}
PRO = {"id": "p", "audio_path": ["p.wav"], "question": "What?", "choices": CHOICES, "answer": "a bell"}
PRO |= {"category": "music", "transcription": None, "task_identifier": "t"}
MCQ = {"source_dataset": "d", "id": 3, "question_type": "sound", "audio_path": "m.wav", "question": "What?"}
MCQ |= {"choices": CHOICES, "answer": "a bell"}
DCASE = {"id": "d", "audio_path": "d.wav", "question_text": "What?", "multi_choice": CHOICES, "answer": "a bell"}
AVQA_HUB = {
    "audio_path": "clips/v.wav",
    "question": "What?\nChoices:\nA. a dog\nB. a bell\nC. it's",
    "answer": "B. a bell",
}
PLAIN = {"file_name": "p.wav", "question": "What?", "options": CHOICES, "answer": "a bell"}


@pytest.mark.parametrize(
    "record, audio, labels, spelled",
    [
        (MMAR, "audio/x.wav", ("mix-sound-music", "Signal Layer", "Pitch"), []),
        (MMSU, "s.wav", ("Reasoning", None, "Reasoning: Linguistics"), ["A", "B", "C"]),
        (HUB, "clips/h.wav", ("sound", "Reasoning", None), LETTERS),
        (COPY, "c.wav", ("sound", None, "Pitch"), []),
        (PRO, "p.wav", ("music", None, None), []),
        (MCQ, "m.wav", (None, None, None), []),
        (DCASE, "d.wav", (None, None, None), []),
        (AVQA_HUB, "clips/v.wav", (None, None, None), []),
        (PLAIN, "p.wav", (None, None, None), []),
    ],
    ids="MMAR MMSU Hub copy MMAU-Pro AudioMCQ DCASE AVQA plain".split(),
)
def test_every_data_set(tmp_path, record, audio, labels, spelled):
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    [question] = load_questions(str(tmp_path / "q.jsonl"))
    assert (question.question, question.choices, question.answer, question.also) == ("What?", CHOICES, "a bell", [])
    assert question.audio == str(tmp_path / audio) and question.spelled == spelled
    assert question.id == {"m.wav": "d/3"}.get(audio, record.get("id", f"{tmp_path / 'q.jsonl'}, line 1"))
    assert (question.task, question.category, question.sub_category) == labels
    assert build_prompt(question, "direct") == f"What? Please choose the answer from the following options: {CHOICES}."


def answer(value, choices, **fields):
    values = read_fields({"audio": "a.wav", "question": "?", "choices": choices, "answer": value} | fields, "here", "")
    return values["answer"]


NOTES = ["C", "A", "B", "A minor", "C#"]
KEYS = ["C major", "A minor", "C# minor", "D"]
AS = ["A dog", "A cat", "A bell"]
YEARS = ["1990", "2000", "2", "0"]


@pytest.mark.parametrize(
    "value, choices, right",
    [
        ("a bell", CHOICES, "a bell"),
        *((text, CHOICES, "a bell") for text in ("B", "(B)", "B.", "B)", "B:", "(B) a bell", "B. a bell", 1)),
        ("B", LETTERS, "a bell"),
        ("a bell", LETTERS, "a bell"),
        *((note, NOTES, note) for note in NOTES),  # the exact text comes first
        *((key, KEYS, key) for key in KEYS),
        ("D", ["C major", "x", "y", "C#"], "C#"),
        ("A", AS, "A dog"),
        ("B", AS, "A cat"),
        ("2000", YEARS, "2000"),
        (2000, YEARS, "2000"),
        (1, YEARS, "2000"),
        (2, YEARS, "2"),
        (["a bell"], CHOICES, "a bell"),
        ("", CHOICES, None),
        ("1", CHOICES, "a bell"),  # a cell of CSV
        ("1", ["0 ", "1 ", "2"], "1"),  # the text of a choice
        (1.0, CHOICES, "a bell"),  # a table's column of integers with a gap
        ("B", ["Am7", "Cmaj7"], "Cmaj7"),
    ],
)
def test_answers(value, choices, right):
    """As text, letter or index."""
    assert answer(value, choices) == right


@pytest.mark.parametrize(
    "value, choices",
    [
        ("A", KEYS),  # a letter, or the key of A
        ("C", ["D", "C#", "x", "y"]),
        ("B", ["x", "y", "B flat"]),
        ("A", ["Cmaj7", "Am7"]),
        ("A", ["x", "A-flat"]),
        ("(B) a dog", CHOICES),  # letter and text contradict each other
        (0, YEARS),  # the first choice, or "0"
        (3, CHOICES),
        (True, CHOICES),
        (1.5, CHOICES),
        ("7", CHOICES),
        (["a dog", "a bell"], CHOICES),
        ({"text": "a bell"}, CHOICES),
    ],
)
def test_an_ambiguous_answer_is_refused(value, choices):
    with pytest.raises(InputError, match="here: answer (.* names none of the choices|has several answers)"):
        answer(value, choices)


def test_an_index_of_avqa_is_an_index_whatever_the_choices():
    record = {"video_name": "v", "question_text": "?", "multi_choice": YEARS, "answer": 2}
    assert read_fields(record, "here", "")["answer"] == "2"


@pytest.mark.parametrize(
    "choices, bare",
    [
        (["A) x", "B) y"], ["x", "y"]),
        (["A: x", "B: y\nz"], ["x", "y\nz"]),
        (["(A)x", "(B)y"], ["x", "y"]),
        ('[\'a "x"\', "it\'s"]', ['a "x"', "it's"]),
        ('["x", "y"]', ["x", "y"]),
        ("(A) x (B) y z (C) A. B. Yehoshua", ["x", "y z", "A. B. Yehoshua"]),
        ("A. x\nB. y", ["x", "y"]),
        ("A.3\nB.One\n", ["3", "One"]),
        (["A minor", "B minor"], None),
        (["A.x", "B.y"], None),
        (["(B) x", "(A) y"], None),
        (["(A) x", "y"], None),
        (["(A) ", "(B) "], None),
    ],
)
def test_letters_of_choices(choices, bare):
    """If all choices have their letters, in order, the model sees the choices without them."""
    values = read_fields({"audio": "a.wav", "question": "?", "choices": choices, "answer": ""}, "here", "")
    assert values["choices"] == (bare or choices)
    assert values["spelled"] == (choices if bare and isinstance(choices, list) else [])


def test_mmaus_own_file_is_read_as_it_was_published():
    """Its prompts and its script's totals stay."""
    record = {"audio_id": "a.wav", "question": "?", "choices": LETTERS, "answer": "B"}
    values = read_fields(record, "here", "")
    assert (values["choices"], values["answer"], values["spelled"]) == (LETTERS, "B", [])
    for odd in ("2", "two dogs"):  # 146 answers of a version are no choices
        assert read_fields(record | {"choices": CHOICES, "answer": odd}, "here", "")["answer"] == odd


def test_several_clips_and_open_questions_of_mmau_pro_are_left_out():
    for fields, reason in (({"audio_path": ["a.wav", "b.wav"]}, "several clips"), ({"choices": []}, "MMAU-Pro")):
        with pytest.raises(LeftOut, match=reason):
            read_fields(PRO | fields, "here", "")
    with pytest.raises(InputError, match="here: audio_path must be a text") as error:
        read_fields(PRO | {"audio_path": []}, "here", "")
    assert not isinstance(error.value, LeftOut)


@pytest.mark.parametrize("name", ["audio_path", "file_name", "audio_id", "video_name"])
@pytest.mark.parametrize("path", ["../a.wav", "x/../../a.wav", "..\\a.wav"])
def test_names_of_data_sets_stay_in_the_audio_folder(name, path):
    with pytest.raises(InputError, match=f"here: {name} .* leaves the audio folder"):
        read_fields({name: path, "question": "?", "choices": CHOICES, "answer": "a dog"}, "here", "")
    assert read_fields({"audio": path, "question": "?", "answer": "a dog"}, "here", "x")["audio"].endswith("a.wav")


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "Q in the video?\nChoices:\nA. dog\nB. cat"},
        {"question": "Q in the video? Options: A. dog\nB. cat"},
        {"question": "Q in the video?\nchoices:\n(A) dog (B) cat"},
        {"question": "Q in the video?\nA. dog\nB. cat"},
        {"question": "Q in the audio?", "A": "dog", "B": "cat"},
        {"question": "Q in the audio?", "option_a": "dog", "option_b": "cat", "option_c": ""},
        {"question": "Q in the audio?", "choice_A": "dog", "choice_B": "cat"},
    ],
)
def test_choices_in_the_text_or_in_fields_of_their_own(fields):
    for right in ("B", "cat", "B. cat"):
        values = read_fields({"audio": "a.wav", "answer": right} | fields, "here", "")
        assert values["question"] == "Q in the audio?" and values["choices"] == ["dog", "cat"]
        assert values["answer"] == "cat" and values["spelled"] == []


def test_letters_of_mmsu_are_those_of_the_fields():
    record = {**MMSU, "choice_b": "", "choice_d": "a cat"}
    for right in ("D", "D. a cat", "a cat"):
        values = read_fields(record | {"answer_gt": right}, "here", "")
        assert values["answer"] == "a cat" and values["spelled"] == ["A", "C", "D"]


@pytest.mark.parametrize("right", ["B", "(B)", "B.", "B. cat"])
def test_an_open_answer_is_no_letter_of_a_choice(right):
    """The choices may have a name that is not known. A single letter may be a note."""
    record = {"audio": "a.wav", "question": "Q?", "answer": right, "candidates": ["dog", "cat"]}
    if right == "B":
        assert read_fields(record, "here", "")["answer"] == "B"
    else:
        with pytest.raises(
            InputError, match="here: answer .* is the letter of a choice, but there are no choices; add them"
        ):
            read_fields(record, "here", "")


def question_of(tmp_path, record):
    (tmp_path / "q.jsonl").write_text(json.dumps(record))
    return load_questions(str(tmp_path / "q.jsonl"))[0]


@pytest.mark.parametrize("record, written", [(HUB, "(B) a bell"), (MMSU, "B"), (MMAR, "a bell")])
def test_predictions_are_written_as_the_file_spells_them(tmp_path, record, written):
    question = question_of(tmp_path, record)
    assert as_written(question, "a bell") == as_written(question, written) == written
    if question.spelled:
        assert as_written(question, "The BELL, a bell.") == written  # MMAU's rule: it names this choice alone


def test_a_prediction_that_names_no_choice(tmp_path):
    """MMSU's script counts letters only, so the prediction becomes the letter of a wrong choice."""
    assert as_written(question_of(tmp_path, HUB), "a dog or a bell") == "a dog or a bell"
    assert as_written(question_of(tmp_path, MMSU), "a dog or a bell") == "A"
    assert as_written(question_of(tmp_path, MMSU | {"answer_gt": "a dog"}), "") == "B"
    twice = HUB | {"choices": ["(A) x", "(B) y", "(C) x"], "answer": "(C) x"}  # equal choices are right together
    assert as_written(question_of(tmp_path, twice), "x") == "(C) x"
    swapped = MMSU | {"choice_a": "B", "choice_b": "A", "answer_gt": "A"}  # choices that are letters themselves
    assert as_written(question_of(tmp_path, swapped), "A") == "B"
    assert as_written(question_of(tmp_path, swapped | {"choice_c": "A"}), "A") == "B"
    chords = HUB | {"choices": ["(A) C", "(B) C#"], "answer": "(B) C#"}
    assert as_written(question_of(tmp_path, chords), "It is C") == "It is C"  # MMAU's rule: it may be both
