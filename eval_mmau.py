"""Score a checkpoint on MMAU, or on any other question file.

    python eval_mmau.py --ckpt runs/NAME/step_000500 --data data/MMAU/mmau-test-mini.json

Decodes greedily, scores what each completion answers with MMAU's rule, and prints accuracy by task, difficulty and
sub-category. The predictions file holds the input's own records with three keys more: `model_prediction` and
`model_output`, both the answer, since MMAU's evaluation.py has read the one and the other, and `completion`, the
whole text.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import TEMPLATES, InputError, Question, load_questions, read_records
from policy import DTYPES, answer_greedily, load_policy, pick_dtype
from reward import guessing, mmau_match, prediction


def accuracy_table(questions: list[Question], correct: list[bool]) -> str:
    """Accuracy with counts in total and by task, difficulty and sub-category, as aligned lines."""
    rows = [("all", "", correct)]
    for field in ("task", "difficulty", "sub_category"):
        values = [getattr(question, field) for question in questions]
        for value in sorted({value for value in values if value is not None}):
            rows.append((field, value, [right for right, own in zip(correct, values) if own == value]))
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(
        f"{field:<12}  {value:<{width}}  {100 * sum(part) / len(part):6.2f}%  {sum(part)}/{len(part)}"
        for field, value, part in rows
    )


def default_data(ckpt: str) -> str:
    """The held-out questions of the run that a checkpoint belongs to, or else MMAU's test-mini."""
    config = Path(ckpt).resolve().parent / "config.json"
    if config.is_file():
        heldout = json.loads(config.read_text(encoding="utf-8")).get("heldout")
        if heldout:
            return heldout
    return "data/MMAU/mmau-test-mini.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score a checkpoint on MMAU or on any other question file: greedy decoding, MMAU's rule.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder, or Hugging Face name of a Qwen2-Audio model")
    add("--data", help="questions; default: the run's held-out questions, or data/MMAU/mmau-test-mini.json")
    add("--audio_dir", help="folder that relative audio paths start from; default: the question file's")
    add("--out", help="predictions file; default: <ckpt>/mmau_predictions.json, or ..._silence.json")
    add("--batch_size", type=int, default=16, help="questions decoded at once")
    add("--template", choices=TEMPLATES, default="answer", help="prompt template")
    add("--max_new_tokens", type=int, default=256, help="longest completion, in tokens")
    add("--limit", type=int, help="score only the first this many questions")
    add("--silence", action="store_true", help="replace each clip by silence of its length")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bfloat16 on a GPU")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.data = args.data or default_data(args.ckpt)
    if args.out is None:
        if not os.path.isdir(args.ckpt):
            parser.error("--out is needed where --ckpt is not a folder")
        args.out = os.path.join(args.ckpt, f"mmau_predictions{'_silence' if args.silence else ''}.json")
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    questions = load_questions(args.data, args.audio_dir)[: args.limit]
    records = [record for _, record in read_records(args.data)][: args.limit]
    model, processor = load_policy(args.ckpt, pick_dtype(args.dtype, device), device)

    completions = []
    with tqdm(total=len(questions), desc="answering", unit="question") as bar:
        for i in range(0, len(questions), args.batch_size):
            batch = questions[i : i + args.batch_size]
            completions += answer_greedily(model, processor, batch, args.template, args.max_new_tokens, args.silence)
            bar.update(len(batch))
    predictions = [prediction(completion) for completion in completions]

    for record, predicted, completion in zip(records, predictions, completions):
        record |= {"model_prediction": predicted, "model_output": predicted, "completion": completion}
    unfinished = Path(args.out + ".unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(args.out)

    answered = [(q, predicted) for q, predicted in zip(questions, predictions) if q.answer is not None]
    scored = [question for question, _ in answered]
    if scored:
        print(accuracy_table(scored, [mmau_match(q.answer, predicted, q.choices) for q, predicted in answered]))
        chance = guessing([question.choices for question in scored])
        print(f"guessing would score {100 * chance:.2f}%{'; the clips were silence' if args.silence else ''}")
    if len(scored) < len(questions):
        print(f"{len(questions) - len(scored)} questions have no answer in {args.data} and are not scored")
    print(f"predictions: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"eval_mmau.py: error: {error}")
