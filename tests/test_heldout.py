"""The scores of held-out questions. tests/test_run.py has the steps after which a run scores them."""

from test_scores import cells

from data import Question
from training.heldout import heldout_table, score_answers


def test_exact_comparison_decides_held_out_questions_that_the_rule_cannot_tell_apart():
    questions = [Question(str(i), "a.wav", "What?", ["+", "-"], "+-"[i % 2]) for i in range(4)]
    assert score_answers(questions, [["<answer>+</answer>"]] * 4, "answer") == ([True, False, True, False], 1.0)
    table = heldout_table(questions, {"after": (0.5, 1.0)})
    assert cells(table.splitlines()[1]) == ["guessing", "0.500"]
    assert table.endswith("the choices of 4 questions apart: 0, 1, 2, 3; exact comparison decides these")


def test_heldout_scores():
    """Accuracy counts the answer by MMAU's rule, format the whole completion."""
    questions = [Question(str(i), "a.wav", "What?", ["dog", "cat"], "dog") for i in range(4)]
    completions = ["<answer>dog</answer>", "<answer>cat</answer>", "Dog", "so <answer>a dog</answer>"]
    scored = score_answers(questions, [[text] for text in completions], "answer")
    assert scored == ([True, False, True, True], 0.5)
    heading, *rows = heldout_table(questions, {"before": (0.25, 1.0), "after": (0.75, 0.5)}).splitlines()
    assert heading.startswith("4 held-out questions, greedy")
    assert [cells(row) for row in rows] == [
        ["guessing", "0.500"], ["before", "0.250", "1.000"], ["after", "0.750", "0.500"]
    ]  # fmt: skip
