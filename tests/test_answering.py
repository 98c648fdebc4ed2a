"""Answer questions in batches: each question gets the answer that it would get alone."""

import random

import torch
from eval_runs import QUESTIONS

import policy
from data import load_questions
from evaluation import answering
from model.checkpoints import load_policy


def test_answers_equal_those_one_by_one(mmau):
    """In any order of the questions. Expected: the sampler alone, with one question after the other."""
    model, processor = load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    questions = load_questions(str(mmau / "mmau.json"))
    expected = []
    for question in questions:
        prompt = policy.encode_prompts(processor, [question], "think")
        stop = policy.stop_token_ids(model, processor)
        expected += policy.decode_text(processor, *policy.sample_group(model, prompt, 1, 8, 0.0, stop)[:2])
    order = list(range(QUESTIONS))
    random.Random(0).shuffle(order)
    asked = [questions[i] for i in order]
    assert answering.answer_questions(model, processor, asked, "think", 8, 6) == [[expected[i]] for i in order]


def test_batches_hold_similar_lengths(mmau):
    """There is hardly any padding, by the true lengths of the prompts, and the longest come first."""
    questions = load_questions(str(mmau / "mmau.json"))
    _, processor = load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    tokens = [policy.encode_prompts(processor, [question], "answer")["input_ids"].shape[1] for question in questions]
    groups = answering.similar_lengths(processor, questions, "answer", 4)
    assert sorted(i for group in groups for i in group) == list(range(QUESTIONS))
    assert [len(group) for group in groups] == 5 * [4]
    padded = sum(len(group) * max(tokens[i] for i in group) for group in groups)
    in_file_order = sum(4 * max(tokens[i : i + 4]) for i in range(0, QUESTIONS, 4))
    assert padded - sum(tokens) < (in_file_order - sum(tokens)) / 3
    assert max(tokens) in [tokens[i] for i in groups[0]] and min(tokens) in [tokens[i] for i in groups[-1]]


def test_check_batching_counts_differences(mmau, monkeypatch):
    """Whole completions may differ where the predictions are the same."""
    answers = {2: [["a"], ["b"], ["c"]], 1: [["other"], ["b "], ["c"]]}  # by batch size
    monkeypatch.setattr(answering, "answer_questions", lambda *_, batch_size, **options: answers[batch_size])
    model, _ = load_policy(str(mmau / "model"), torch.float32, torch.device("cpu"))
    questions = load_questions(str(mmau / "mmau.json"))[:3]
    counts, named = answering.check_batching(model, None, questions, 2).splitlines()
    assert counts == (
        "3 questions in batches of 2 and one by one, float32 on cpu: 1 predictions differ, 2 whole completions"
    )
    assert named == "different predictions: id-0"
