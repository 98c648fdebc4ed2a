"""Make a tiny Qwen2-Audio for your own questions, to try them on a laptop; or draw clips and questions as a picture.

    python toy.py --questions FILE --out DIR     a tiny base model for your questions
    python toy.py --listen                       a picture of eight of the toy's clips, or of yours with --questions

Without --model, grpo_aqa.py and sft_aqa.py make the toy's own base model themselves (training/toy_model.py).
"""

import argparse
import os
import sys
from pathlib import Path

from data import Question, load_questions
from evaluation.contact_sheet import CLIPS, draw_contact_sheet, pick
from infra.errors import InputError, list_problems
from infra.files import check_folder
from infra.flags import Parser
from infra.ownership import owner_file, owning
from training.preflight import load_checked, long_clips_note, special_tokens_in
from training.toy_model import FOLDER, HEARD_SECONDS, MEL_BINS, SPECIAL_TOKENS, STEPS, make_base, make_world, paths


def draw_examples(questions: list[Question], out: Path, seed: int) -> None:
    """Draw eight of the questions and their clips, as the tiny model hears them. Raises InputError."""
    check_folder(out.parent, out)
    draw_contact_sheet(out, pick(questions, CLIPS, seed), MEL_BINS, HEARD_SECONDS)
    print(f"picture: {out}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description="Make a tiny Qwen2-Audio base model for a question file, to try grpo_aqa.py without a GPU. "
        "With --listen, draw clips and questions as a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--listen",
        action="store_true",
        help="draw eight clips and questions, the toy's or those of --questions",
    )
    add("--questions", help="training questions: a JSON, JSON lines or CSV file")
    add("--audio_dir", help="folder of relative audio paths; default: the question file's")
    add("--out", help="folder of the model; with --listen, the picture (the toy's: runs/toy/listen.png)")
    add(
        "--skip_bad_audio",
        action="store_true",
        help="leave out questions with a bad clip, instead of stopping",
    )
    add("--random_answers", type=float, default=1.0, help="share of the warm start's answers that are a random choice")
    add("--steps", type=int, default=STEPS, help="steps of the supervised warm start, of 16 questions each")
    add("--seed", type=int, default=0, help="seed of weights and questions, or of the examples drawn")
    args = parser.parse_args(argv)
    needed = ("questions", "out") if not args.listen else ("out",) if args.questions else ()
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    for name in ("skip_bad_audio", "random_answers", "steps") if args.listen else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} does not go with --listen")
    if args.listen and args.out and not args.out.endswith(".png"):
        parser.error("--listen draws a PNG picture: let --out end in .png")
    if args.audio_dir and not args.questions:
        parser.error("--audio_dir needs --questions")
    return args


def main() -> None:
    args = parse_args()
    if args.listen and args.questions:
        draw_examples(load_questions(args.questions, args.audio_dir), Path(args.out), args.seed)
        return
    if args.listen:
        train = paths(FOLDER)[1]
        make_world(train.parent)
        draw_examples(load_questions(str(train)), Path(args.out or FOLDER / "listen.png"), args.seed)
        return
    if os.path.exists(args.out):
        raise InputError(f"{args.out}: exists already; name a new folder with --out, or remove it")
    check_folder(Path(args.out))
    checked = load_checked(args.questions, args.audio_dir, args.skip_bad_audio, decode=True)
    if problems := special_tokens_in(checked.questions, SPECIAL_TOKENS):
        raise InputError(list_problems(problems))
    if note := long_clips_note(checked.seconds.values(), HEARD_SECONDS):
        print(note, flush=True)
    with owning(owner_file(args.out)):
        make_base(checked.questions, Path(args.out), args.seed, args.steps, args.random_answers)
    print(f"base model: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"toy.py: error: {error}")
