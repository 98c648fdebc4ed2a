"""Score a checkpoint, or all checkpoints of a run, on MMAU or on any other question file.

    python eval_mmau.py --ckpt runs/NAME/step_000500      one checkpoint; torchrun shares the questions over its ranks
    python eval_mmau.py --ckpt runs/NAME                  every checkpoint of a run
    python eval_mmau.py --compare A.json B.json           two predictions files
    python eval_mmau.py --ckpt ADAPTER --merge OUT        merge a LoRA adapter into its base and save the model

Decodes greedily and scores each completion's answer by MMAU's rule. The predictions file holds the question file's own
records. Each has the whole text as `completion`, and the answer under the keys that the scripts of MMAU, MMAR and MMSU
read (predictions.ADDED). Whether an answer is right is not stored but computed from the predictions.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers

from data import TEMPLATES, Question, find_questions_in, share_answers
from evaluation.ablations import change, check_needs_audio, note, suffix, variants, write_needs_audio
from evaluation.answering import answer_questions, check_batching
from evaluation.predictions import (
    check_writable,
    identify_checkpoint,
    identify_questions,
    is_done,
    journal_path,
    predictions_path,
    with_answers,
    without_answers,
    write_predictions,
)
from evaluation.report import checkpoint_report, run_report, write_html
from evaluation.scores import compare
from evaluation.versions import describe, identify_file, name_files
from infra.errors import InputError
from infra.files import free_bytes, writing
from infra.flags import ON_OFF, Parser
from infra.ownership import owner_file, owning
from infra.processes import (
    SharedInputError,
    finish_together,
    memory_errors,
    on_rank_0,
    owning_together,
    require_gpu_each,
    setup_distributed,
)
from model.checkpoints import (
    DTYPES,
    check_model,
    load_on_all_ranks,
    load_policy,
    pick_dtype,
    remembered_template,
    save_checkpoint,
)
from model.lora import is_adapter
from questions.reading import find_records, require
from training.preflight import check_texts, heard_seconds, long_clips_note, read_clips
from training.run_folder import step_folders, step_of

MMAU = "data/MMAU/mmau-test-mini.json"

# ---- command line ----

# flag -> flags it cannot be combined with
CONTRADICTIONS = {
    "ablations": ("silence", "shuffle_audio", "shuffle_choices", "samples", "html", "check_batching"),
    "silence": ("shuffle_audio",),
    "orders": ("ablations", "shuffle_choices", "samples", "html", "check_batching"),
    "check_batching": ("samples", "html", "out"),
}
# flags that a run folder does not take
ONE_CHECKPOINT = "out silence shuffle_audio shuffle_choices ablations orders samples check_batching html".split()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        usage="%(prog)s --ckpt CHECKPOINT_OR_RUN [settings]\n       %(prog)s --compare A.json B.json\n       "
        "%(prog)s --ckpt ADAPTER --merge OUT [--dtype DTYPE]",
        description="Score a checkpoint on MMAU or on any other question file: greedy decoding, MMAU's rule. The same "
        "command writes the same file, byte for byte, on any number of ranks and after an interruption.",
    )

    def add(name, help, **kwargs):
        parser.add_argument(f"--{name}", help=help + (" [%(default)s]" if kwargs.get("default") else ""), **kwargs)

    add("ckpt", "checkpoint folder, Hugging Face name of a Qwen2-Audio model, or run folder: all of its checkpoints")
    add("data", f"question file [{MMAU}; for the toy: its held-out questions]")
    add("audio_dir", "folder that relative audio paths start from [the question file's folder]")
    add("out", "predictions file [mmau_predictions.json, or ..._silence.json and so on, in the checkpoint's folder; "
        "for a Hugging Face name, in runs/NAME/untouched/]")  # fmt: skip
    add("batch_size", "questions decoded at once", type=int, default=16)
    add("template", "prompt template [the one each checkpoint was trained with, else answer]", choices=TEMPLATES)
    add("max_new_tokens", "longest completion, in tokens", type=int, default=256)
    add("limit", "score only the first N questions", type=int, metavar="N")
    add("dtype", "auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", *DTYPES), default="auto")
    add("skip_bad_audio", "count missing and broken clips as wrong instead of stopping", action="store_true")
    add("silence", "replace each clip by silence of the same length", action="store_true")
    add("shuffle_audio", "give each question the clip of another question", action="store_true")
    add("shuffle_choices", "put each question's choices in a random order", type=int, metavar="SEED")
    add("ablations", "plain and each of the three changes above, in one table", action="store_true")
    add("write_needs_audio", "with --ablations: write the questions that are wrong with silence and with another "
        "clip, as a question file for training", metavar="FILE")  # fmt: skip
    add("orders", "ask with K >= 2 orders of the choices: mean, deviation, share of unchanged answers", type=int,
        metavar="K")  # fmt: skip
    add("samples", "sample K >= 2 completions a question; the prediction is their majority vote", type=int, metavar="K")
    add("temperature", "temperature of --samples [1.0]", type=float)
    add("seed", "seed of --samples, --shuffle_audio, --ablations, --orders, --check_batching [0]", type=int, default=0)
    add("check_batching", "only count predictions that differ if asked one at a time, on N questions [100]", type=int,
        nargs="?", const=100, metavar="N")  # fmt: skip
    add("cuda_graph", "on a GPU, decode with CUDA graphs", default="on", **ON_OFF)
    add("html", "also write a page with questions, answers and audio players", metavar="FILE")
    add("merge", "write a LoRA adapter's merged model to this new folder; evaluates nothing", metavar="OUT")
    add("compare", "compare two predictions files; loads no model", nargs=2, metavar=("A", "B"))

    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # with None in place of every default
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    pairs = [(name, other) for name, others in CONTRADICTIONS.items() for other in others]
    pairs += [("compare", other) for other in vars(args) if other != "compare"]
    pairs += [("merge", other) for other in vars(args) if other not in ("merge", "ckpt", "dtype", "compare")]
    for name, other in pairs:
        if {name, other} <= given:
            parser.error(f"--{name} and --{other} contradict each other: give one of them")
    if args.compare:
        return args
    if args.ckpt is None:
        parser.error("--ckpt is missing: give a checkpoint or a run folder")
    if args.merge:
        return args
    args.data = args.data or default_data(args.ckpt)
    files = [os.path.realpath(name) for name in (args.data, args.out, args.html, args.write_needs_audio) if name]
    if len(set(files)) < len(files):
        parser.error("--data, --out, --html and --write_needs_audio must be different files")
    if args.write_needs_audio and not args.ablations:
        parser.error("--write_needs_audio needs --ablations, which ask without each question's sound")
    if args.temperature is not None and not args.samples:
        parser.error("--temperature needs --samples: without --samples, decoding is greedy")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    for name in ONE_CHECKPOINT if step_folders(Path(args.ckpt)) else []:
        if name in given:
            parser.error(f"--{name} needs one checkpoint, but {args.ckpt} is a run folder: name one of its step_*")
    return args


def default_data(ckpt: str) -> str:
    """Return the toy's held-out questions if `ckpt` is a checkpoint or run of the toy, else MMAU's test-mini."""
    for folder in (Path(ckpt).resolve(), Path(ckpt).resolve().parent):
        try:
            heldout = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("heldout")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # not a run; check_model reports it unless it is a checkpoint
        if isinstance(heldout, str) and Path(heldout).parts[-2:] == ("world", "heldout.json"):  # the toy's own names
            return heldout
    return MMAU


# ---- find what to evaluate ----


@dataclass
class Plan:
    """What to evaluate, found and checked before a model is loaded."""

    checkpoints: list[str]
    templates: dict[str, str]  # of each checkpoint
    records: list[dict]  # of the question file
    questions: list[Question]
    digests: list[str | None]  # of each question's clip
    errors: dict[int, str]  # index of a question -> why its clip is unusable
    usable: dict[int, Question]  # the other questions, by index


def make_plan(args: argparse.Namespace) -> Plan:
    """Find checkpoints, questions and clips, and check them. All ranks call this. Raises InputError."""
    checkpoints = on_rank_0(lambda: find_checkpoints(args.ckpt))
    records, questions = on_rank_0(lambda: read_data(args.data, args.audio_dir, args.limit))
    templates = on_rank_0(lambda: choose_templates(args.template, checkpoints))
    digests, errors, seconds = read_clips(questions, args.skip_bad_audio)
    usable = {i: question for i, question in enumerate(questions) if i not in errors}
    one_each = {template: checkpoint for checkpoint, template in templates.items()}
    for template, checkpoint in one_each.items():  # the checkpoints of a run have the same tokenizer and context
        asked = list(usable.values())
        on_rank_0(lambda: check_texts(checkpoint, asked, template, args.max_new_tokens, strict=False))
    if dist.get_rank() == 0 and (text := long_clips_note(seconds, heard_seconds(checkpoints[0]))):
        print(text)
    return Plan(checkpoints, templates, records, questions, digests, errors, usable)


def find_checkpoints(ckpt: str) -> list[str]:
    """Return the checkpoints of a run folder by step, or `ckpt` itself. Loads no weights. Raises InputError."""
    checkpoints = [str(folder) for folder in step_folders(Path(ckpt))]
    if os.path.exists(os.path.join(ckpt, "metrics.jsonl")) and not checkpoints:
        raise InputError(f"{ckpt}: this run has no complete checkpoint yet")
    checkpoints = checkpoints or [ckpt]
    for checkpoint in checkpoints:
        check_model(checkpoint)
    return checkpoints


def choose_templates(given: str | None, checkpoints: list[str]) -> dict[str, str]:
    """Return each checkpoint's template: the given one, else the one it was trained with, else `answer`. Prints it."""
    templates = {}
    for checkpoint in checkpoints:
        remembered = remembered_template(checkpoint)
        templates[checkpoint] = given or remembered or "answer"
        if given and remembered and given != remembered:
            print(f"{checkpoint}: trained with template {remembered}, evaluated with --template {given}")
        elif not given:
            why = "the one it was trained with" if remembered else "the default: the checkpoint records none"
            print(f"{checkpoint}: template {templates[checkpoint]}, {why}")
    return templates


def read_data(path: str, audio_dir: str | None, limit: int | None) -> tuple[list[dict], list[Question]]:
    """Read the first `limit` records and questions of a file. Raises InputError."""
    if path == MMAU and not os.path.exists(MMAU):
        raise InputError(
            f"{MMAU} is missing: download it from github.com/Sakshi113/MMAU with the test-mini audios that its README "
            "links, and unpack them to data/MMAU/test-mini-audios/; or name another file with --data"
        )
    placed = require(find_records(path))
    questions = share_answers(require(find_questions_in(placed, audio_dir or os.path.dirname(path)))[:limit])
    asked = {question.place for question in questions}  # find_questions_in may leave out some
    records = require(without_answers([(place, record) for place, record in placed if place in asked]))
    if any(isinstance(record.get("audio_path"), list) for record in records):
        print("questions of MMAU-Pro: the scores are by MMAU's rule, not by MMAU-Pro's own scorer")
    return records, questions


# ---- evaluate ----


def evaluate(args: argparse.Namespace, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
    """Answer the questions with each checkpoint, write predictions and print tables. All ranks call this."""
    rank, checkpoints = dist.get_rank(), plan.checkpoints
    changed = variants(args)
    several = len(changed) > 1 or checkpoints != [args.ckpt]
    outs = {}  # (checkpoint, variant) -> predictions file
    for checkpoint in checkpoints:
        for name, changes in changed.items():
            ending = "" if args.out and len(changed) == 1 else suffix(changes) + "_samples" * bool(args.samples)
            outs[checkpoint, name] = predictions_path(checkpoint, args.out, ending)
    on_rank_0(lambda: check_writable([*outs.values(), *filter(None, (args.html, args.write_needs_audio))]))
    if args.write_needs_audio:
        on_rank_0(lambda: check_needs_audio(plan.records, plan.questions))

    file = on_rank_0(lambda: identify_file(args.data, plan.records))
    if rank == 0:
        print(f"questions: {args.data}, {describe(file)}")
    sampling = dict(samples=args.samples, temperature=args.temperature, seed=args.seed) if args.samples else {}
    names = ("max_new_tokens", "batch_size", "samples", "temperature", "seed")
    common = {name: getattr(args, name) for name in names} | {"dtype": str(dtype), "device": device.type}
    common |= {"questions": identify_questions(plan.records, plan.digests), "unreadable": list(plan.errors)}
    common |= {"torch": str(torch.__version__), "transformers": transformers.__version__}
    results, broken = {}, []  # (checkpoint, variant) -> predictions file; why a checkpoint of a run has none
    for checkpoint in checkpoints:
        model = None  # loaded only if something is left to do, and freed before the next one
        for name, changes in changed.items():
            out, template = outs[checkpoint, name], plan.templates[checkpoint]
            settings = {"template": template} | common | changes | {"checkpoint": identify_checkpoint(checkpoint)}
            if several and on_rank_0(lambda: is_done(out, settings)):
                results[checkpoint, name] = out
                if rank == 0:
                    print(f"{out}: already there, with the same settings")
                continue
            with owning_together([owner_file(out)]):
                if model is None:
                    try:
                        model, processor = load_on_all_ranks(checkpoint, dtype, device)
                    except SharedInputError as error:
                        if len(checkpoints) == 1:
                            raise
                        broken.append(str(error))  # the other checkpoints' table does not wait for this one
                        break
                questions = change(list(plan.usable.values()), changes, args.seed)
                answers = answer_questions(
                    model, processor, questions, template, args.max_new_tokens, args.batch_size,
                    silence=changes["silence"], journal=(journal_path(out), settings), cuda_graph=args.cuda_graph,
                    **sampling,
                )  # fmt: skip
                predicted = with_answers(
                    plan.records, plan.questions, dict(zip(plan.usable, answers)), plan.errors, bool(args.samples)
                )
                on_rank_0(lambda: write_predictions(out, predicted, settings, file))
            results[checkpoint, name] = out
            if rank == 0 and several:
                print(f"predictions: {out}", flush=True)
    gone = on_rank_0(lambda: [key for key, out in results.items() if not os.path.exists(out)])
    broken += [f"{results.pop(key)} was removed meanwhile" for key in gone]  # by a training with --keep_last
    if rank == 0 and results:
        report(args, plan, results)
    if broken:
        raise SharedInputError(f"{len(broken)} of {len(checkpoints)} checkpoints not evaluated: {'; '.join(broken)}")


def report(args: argparse.Namespace, plan: Plan, results: dict[tuple[str, str], str]) -> None:
    """Print the tables and write the page, from the predictions files alone."""
    if step_folders(Path(args.ckpt)):
        steps = [(step_of(Path(checkpoint)), out) for (checkpoint, _), out in results.items()]
        used = ", ".join(sorted(set(plan.templates.values())))
        print(run_report(args.ckpt, steps, f"{len(plan.questions)} questions of {args.data}, template {used}"))
        return
    plain = variants(args)["plain"]
    predicted = {name: [record for _, record in require(find_records(out))] for (_, name), out in results.items()}
    lines = checkpoint_report(plan.questions, predicted, args.samples, note(plain))
    lines += [f"predictions: {out}" for out in results.values()] if len(results) == 1 else []
    if args.write_needs_audio:
        folder = args.audio_dir or os.path.dirname(args.data)
        lines.append(write_needs_audio(args.write_needs_audio, plan.records, plan.questions, predicted, folder))
    print("\n".join(lines))
    if args.html:
        shown = list(plan.questions)
        for i, question in zip(plan.usable, change(list(plan.usable.values()), plain, args.seed)):
            shown[i] = question  # as the model was asked
        write_html(args.html, shown, predicted["plain"], f"{args.ckpt} on {args.data}{note(plain)}")
        print(f"page: {args.html}")


def evaluate_batching(args: argparse.Namespace, plan: Plan, dtype: torch.dtype, device: torch.device) -> None:
    """Print how many predictions of some questions depend on the other questions of a batch. All ranks call this."""
    model, processor = load_on_all_ranks(args.ckpt, dtype, device)
    usable = list(plan.usable.values())
    chosen = np.random.default_rng(args.seed).permutation(len(usable))[: args.check_batching]
    questions = change([usable[i] for i in sorted(chosen)], variants(args)["plain"], args.seed)
    text = check_batching(
        model, processor, questions, args.batch_size, template=plan.templates[args.ckpt],
        max_new_tokens=args.max_new_tokens, silence=args.silence, cuda_graph=args.cuda_graph,
    )  # fmt: skip
    if dist.get_rank() == 0:
        print(text)


def merge_checkpoint(adapter: str, out: str, dtype: torch.dtype) -> None:
    """Merge a LoRA adapter into its base and save the model to the new folder out. Only rank 0 calls this.

    Raises InputError.
    """
    if os.path.exists(out):
        raise InputError(f"{out}: exists already; name a new folder with --merge, or remove it")
    if not is_adapter(adapter):
        run = step_folders(Path(adapter))
        reason = "this is a run folder; name one of its step_*" if run else "this is not the folder of an adapter"
        raise InputError(f"{adapter}: nothing to merge, {reason}")
    template = remembered_template(adapter)
    with owning(owner_file(out)):
        model, processor = load_policy(adapter, dtype, torch.device("cpu"))
        size, free = sum(p.nbytes for p in model.parameters()), free_bytes(Path(out))
        if free < size:
            raise InputError(f"{out}: the model takes {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free")
        with writing(Path(out), lambda: "free some disk space, then try again"):
            save_checkpoint(Path(out), model, processor, template)
    print(f"merged model, {str(dtype)[6:]}, {size / 1e9:.2f} GB: {out}")


def main() -> int:
    args = parse_args()
    if args.compare:
        try:
            for line in name_files(dict(zip("AB", args.compare))):
                print(line)
            print(compare(*args.compare))
            return 0
        except (InputError, OSError) as error:
            print(f"eval_mmau.py: error: {error}", file=sys.stderr)
            return 1
    _, _, device = setup_distributed()

    def work():
        require_gpu_each()
        with memory_errors("the evaluation"):
            dtype = pick_dtype(args.dtype, device)
            if args.merge:
                on_rank_0(lambda: merge_checkpoint(args.ckpt, args.merge, dtype))
            elif args.check_batching:
                evaluate_batching(args, make_plan(args), dtype, device)
            else:
                evaluate(args, make_plan(args), dtype, device)

    writes_journal = not (args.merge or args.check_batching)
    left = "the same command continues from the last batch" if writes_journal else "nothing was written"
    return finish_together("eval_mmau.py", work, interrupted=lambda: left)


if __name__ == "__main__":
    sys.exit(main())
