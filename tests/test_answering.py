"""Batches of questions through the model: each gets the answer that it would get alone, and keeps it."""

import random
from pathlib import Path

import pytest
import torch
from evaluation import QUESTIONS

import answering
import policy
from data import load_questions
from errors import InputError

# ---- batches ----


def test_answers_equal_those_one_by_one(mmau):
    """Whatever their order: with the sampler alone, a batch of one after the other."""
    model, processor = policy.load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    questions = load_questions(str(mmau / "mmau.json"))
    expected = []
    for question in questions:
        prompt = policy.encode_prompts(processor, [question], "think")
        stop = policy.stop_token_ids(model, processor)
        expected += policy.decode_text(processor, *policy.sample_group(model, prompt, 1, 8, 0.0, stop))
    order = list(range(QUESTIONS))
    random.Random(0).shuffle(order)
    asked = [questions[i] for i in order]
    assert answering.answer_questions(model, processor, asked, "think", 8, 6) == [[expected[i]] for i in order]


def test_similar_lengths_are_together(mmau):
    """Hardly any padding, by the true lengths of the prompts; the longest first."""
    questions = load_questions(str(mmau / "mmau.json"))
    _, processor = policy.load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    tokens = [policy.encode_prompts(processor, [question], "answer")["input_ids"].shape[1] for question in questions]
    groups = answering.similar_lengths(processor, questions, "answer", 4)
    assert sorted(i for group in groups for i in group) == list(range(QUESTIONS))
    assert [len(group) for group in groups] == 5 * [4]
    padded = sum(len(group) * max(tokens[i] for i in group) for group in groups)
    in_file_order = sum(4 * max(tokens[i : i + 4]) for i in range(0, QUESTIONS, 4))
    assert padded - sum(tokens) < (in_file_order - sum(tokens)) / 3
    assert max(tokens) in [tokens[i] for i in groups[0]] and min(tokens) in [tokens[i] for i in groups[-1]]


# ---- the journal ----


def test_a_full_disk_is_said_with_the_file_and_what_to_do(tmp_path):
    (tmp_path / "j").symlink_to("/dev/full")
    with pytest.raises(InputError, match=f"^{tmp_path}/j: could not be written .*the same command continues"):
        answering.append_journal(str(tmp_path / "j"), {3: ["x"]})


TORN = {"at its end": b'{"question": 2, "comp', "by a crash": b'\0\0\0\n{"question": 2, "completions": ["z"]}\n'}


@pytest.mark.parametrize("tail", [b"", *TORN.values()], ids=["nowhere", *TORN])
def test_a_journal_is_cut_where_it_is_torn(tmp_path, tail):
    path, settings = str(tmp_path / "j"), {"seed": 1, "data": ["ü", None]}
    assert answering.read_journal(path, settings, 4, 2) == {}
    answering.append_journal(path, {3: ["a\nü", "\ufffd"], 0: ["", "x"]})
    whole = Path(path).read_bytes()
    with open(path, "ab") as file:
        file.write(tail)
    assert answering.read_journal(path, settings, 4, 2) == {3: ["a\nü", "\ufffd"], 0: ["", "x"]}
    assert Path(path).read_bytes() == whole
    Path(path).write_bytes(whole[:10])  # torn in its first line
    assert (
        answering.read_journal(path, settings, 4, 2) == {} and Path(path).read_bytes() == whole.split(b"\n")[0] + b"\n"
    )
