"""Score the held-out questions of a run greedily: before training, every --heldout_every steps, and at the end."""

import argparse

from data import Question
from evaluation.answering import answer_questions
from evaluation.scores import guessing, is_right_exactly, not_apart
from infra.processes import memory_errors
from reward import format_reward, prediction


def score_heldout(questions: list[Question], policy, processor, args: argparse.Namespace) -> tuple[list[bool], float]:
    """Answer the questions, shared over the ranks, and return score_answers. All ranks call this.

    Draws no random numbers, so training continues as without it.
    """
    with memory_errors("the held-out questions"):
        answers = answer_questions(
            policy,
            processor,
            questions,
            args.template,
            args.max_new_tokens,
            batch_size=4 * args.prompts_per_rank,  # one completion per question instead of a group
            cuda_graph=args.cuda_graph,
        )
    return score_answers(questions, answers, args.template)


def score_answers(questions: list[Question], answers: list[list[str]], template: str) -> tuple[list[bool], float]:
    """Return whether each answer is right by is_right_exactly, and the share of well-formed completions.

    answers: one completion for each question.
    """
    pairs = [(question, completion) for question, (completion,) in zip(questions, answers)]
    right = [is_right_exactly(question, prediction(text, question.choices)) for question, text in pairs]
    return right, sum(format_reward(completion, template) for _, completion in pairs) / len(pairs)


def heldout_table(questions: list[Question], scores: dict[str, tuple[float, float]]) -> str:
    """Format named scores (accuracy, share of well-formed completions), and the score of guessing, as aligned lines."""
    chance = guessing(questions, is_right_exactly)
    lines = [f"{len(questions)} held-out questions, greedy   accuracy   format", f"  {'guessing':<30}  {chance:.3f}"]
    lines += [f"  {name:<30}  {accuracy:.3f}      {format_:.3f}" for name, (accuracy, format_) in scores.items()]
    if line := not_apart(questions):
        lines.append(f"{line}; exact comparison decides these")
    return "\n".join(lines)
