"""Score a checkpoint, or all checkpoints of a run, on MMAU or on any other question file.

    python eval_mmau.py --ckpt runs/NAME/step_000500      one checkpoint; under torchrun the questions are shared
    python eval_mmau.py --ckpt runs/NAME                  every checkpoint of a run
    python eval_mmau.py --compare A.json B.json           two predictions files
    python eval_mmau.py --ckpt ADAPTER --merge OUT        a LoRA adapter's base with the adapter merged, as a model

Decodes greedily and scores what each completion answers with MMAU's rule. The predictions file holds the input's own
records, each with `model_prediction` and `model_output`, both the answer, since MMAU's evaluation.py has read the one
and the other, and `completion`, the whole text. Whether it is right is never stored, but computed from these.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers

from ablations import change, kinds, remark
from answering import answer_questions
from checkpoint import remembered_template, save_checkpoint
from data import TEMPLATES, Question, parse_records, read_records
from errors import SHOWN, InputError
from eval_report import run_report, write_html
from files import free_bytes, step_folders, writing
from flags import Parser
from lora import is_adapter
from policy import DTYPES, load_policy, pick_dtype
from predictions import (
    check_writable,
    identify_checkpoint,
    identify_questions,
    is_done,
    journal_path,
    with_answers,
    write_predictions,
)
from preflight import bad_audio_report, check_context, check_model, digest_clips
from reward import guessing, prediction
from runtime import (
    SharedInputError,
    finish_together,
    gather,
    load_on_all_ranks,
    memory_errors,
    on_rank_0,
    require_gpu_each,
    setup_distributed,
)
from scores import ablation_table, accuracy_table, compare, is_right, percent, samples_table

MMAU = "data/MMAU/mmau-test-mini.json"

# ---- command line ----

# flag: those that contradict it
CONTRADICTIONS = {
    "ablations": ("silence", "shuffle_audio", "shuffle_choices", "samples", "html", "check_batching"),
    "silence": ("shuffle_audio",),
    "check_batching": ("samples", "html", "out"),
}
# Those that a run folder does not take
ONE_CHECKPOINT = ["ablations", "silence", "shuffle_audio", "shuffle_choices", "samples"]
ONE_CHECKPOINT += ["check_batching", "html", "out"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        usage="%(prog)s --ckpt CHECKPOINT_OR_RUN [settings]\n       %(prog)s --compare A.json B.json\n       "
        "%(prog)s --ckpt ADAPTER --merge OUT [--dtype DTYPE]",
        description="Score a checkpoint on MMAU or on any other question file: greedy decoding, MMAU's rule. The same "
        "command gives the same file, byte for byte, on any number of processes and after an interruption.",
    )

    def add(name, help, **kwargs):
        parser.add_argument(f"--{name}", help=help + (" [%(default)s]" if kwargs.get("default") else ""), **kwargs)

    add("ckpt", "checkpoint folder, Hugging Face name of a Qwen2-Audio model, or run folder: all of its checkpoints")
    add("data", f"questions [{MMAU}; of the toy: its held-out set]")
    add("audio_dir", "folder that relative audio paths start from [the question file's]")
    add("out", "predictions file [<ckpt>/mmau_predictions.json, or ..._silence.json and the like]")
    add("batch_size", "questions decoded at once; in float32 it does not change a prediction", type=int, default=16)
    add("template", "prompt template [the one each checkpoint was trained with; else answer]", choices=TEMPLATES)
    add("max_new_tokens", "longest completion, in tokens", type=int, default=256)
    add("limit", "score only the first this many questions", type=int)
    add("dtype", "auto is bfloat16 on a GPU, else float32", choices=("auto", *DTYPES), default="auto")
    add("skip_bad_audio", "count missing and broken clips as wrong, instead of stopping", action="store_true")
    add("silence", "replace each clip by silence of its length", action="store_true")
    add("shuffle_audio", "give each question the clip of another", action="store_true")
    add("shuffle_choices", "put each question's choices in a random order", type=int, metavar="SEED")
    add("ablations", "plain, and each of the three above, in one table", action="store_true")
    add("samples", "sample K >= 2 completions a question; the prediction is their majority vote", type=int, metavar="K")
    add("temperature", "of --samples [1.0]", type=float)
    add("seed", "of --samples, --shuffle_audio, --ablations and --check_batching [0]", type=int, default=0)
    add("check_batching", "only count predictions that change in batches of one, on N questions [100]", type=int,
        nargs="?", const=100, metavar="N")  # fmt: skip
    add("cuda_graph", "decode by CUDA graphs, on a GPU", choices=("on", "off"), default="on")
    add("html", "also write a page to look at: questions, answers, audio players", metavar="FILE")
    add("merge", "write a LoRA adapter's merged model to this new folder; evaluates nothing", metavar="OUT")
    add("compare", "compare two predictions files; loads no model", nargs=2, metavar=("A", "B"))

    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    pairs = [(name, other) for name, others in CONTRADICTIONS.items() for other in others]
    pairs += [("compare", other) for other in vars(args) if other != "compare"]
    pairs += [("merge", other) for other in vars(args) if other not in ("merge", "ckpt", "dtype", "compare")]
    for name, other in pairs:
        if {name, other} <= given:
            parser.error(f"--{name} and --{other} contradict each other: give one of them")
    if args.compare:
        return args
    if args.ckpt is None:
        parser.error("--ckpt is needed: a checkpoint or a run folder")
    if args.merge:
        return args
    files = [os.path.realpath(name) for name in (args.data, args.out, args.html) if name]
    if len(set(files)) < len(files):
        parser.error("--data, --out and --html must be different files")
    if args.temperature is not None and not args.samples:
        parser.error("--temperature needs --samples: without it, decoding is greedy")
    args.temperature = 1.0 if args.temperature is None else args.temperature
    for name in ONE_CHECKPOINT if step_folders(Path(args.ckpt)) else []:
        if name in given:
            parser.error(f"--{name} needs one checkpoint, and {args.ckpt} is a run folder: name one of its step_*")
    if args.out is None and not os.path.isdir(args.ckpt) and not args.check_batching:
        parser.error("--out is needed where --ckpt is not a folder")
    args.data = args.data or default_data(args.ckpt)
    return args


def default_data(ckpt: str) -> str:
    """The held-out questions of the toy, if `ckpt` is a checkpoint or run of it, or else MMAU's test-mini."""
    for folder in (Path(ckpt).resolve(), Path(ckpt).resolve().parent):
        try:
            heldout = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("heldout")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # not a run; whether it is a checkpoint, check_model will tell
        if isinstance(heldout, str) and Path(heldout).parts[-2:] == ("world", "heldout.json"):  # as toy.py names them
            return heldout
    return MMAU


# ---- what to evaluate ----


def find_checkpoints(ckpt: str) -> list[str]:
    """The checkpoints of a run folder by step, or `ckpt` itself. Raises InputError. Loads no weights."""
    checkpoints = [str(folder) for folder in step_folders(Path(ckpt))]
    if os.path.exists(os.path.join(ckpt, "metrics.jsonl")) and not checkpoints:
        raise InputError(f"{ckpt}: this run has no complete checkpoint yet")
    checkpoints = checkpoints or [ckpt]
    for checkpoint in checkpoints:
        check_model(checkpoint)
    return checkpoints


def choose_templates(given: str | None, checkpoints: list[str]) -> dict[str, str]:
    """Each checkpoint's template: the one given, else the one it was trained with, else `answer`. Prints which."""
    templates = {}
    for checkpoint in checkpoints:
        remembered = remembered_template(checkpoint)
        templates[checkpoint] = given or remembered or "answer"
        if given and remembered and given != remembered:
            print(f"{checkpoint}: trained with template {remembered}, evaluated with {given}, as --template says")
        elif not given:
            why = "as it was trained" if remembered else "since it does not say what it was trained with"
            print(f"{checkpoint}: template {templates[checkpoint]}, {why}")
    return templates


def read_data(args: argparse.Namespace) -> tuple[list[dict], list[Question]]:
    """The records and questions of args.data. Raises InputError."""
    if args.data == MMAU and not os.path.exists(MMAU):
        raise InputError(
            f"{MMAU} is missing: download it from github.com/Sakshi113/MMAU with the test-mini audios that its README "
            "links, and unpack these to data/MMAU/test-mini-audios/; or name another file with --data"
        )
    placed = read_records(args.data)
    questions = parse_records(placed, args.audio_dir or os.path.dirname(args.data))
    return [record for _, record in placed[: args.limit]], questions[: args.limit]


def read_clips(args: argparse.Namespace, questions: list[Question]) -> tuple[list[str | None], dict[int, str]]:
    """Digests of the questions' clips, and which cannot be used and why, by question; decodes all of them.

    Raises SharedInputError if some cannot be used, unless args.skip_bad_audio.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    paths = list(dict.fromkeys(question.audio for question in questions))
    checked = {}
    for part in gather(digest_clips(paths[rank::ranks], bar=rank == 0)):
        checked |= part
    digests, reasons = zip(*(checked[question.audio] for question in questions))
    errors = {i: reason for i, reason in enumerate(reasons) if reason is not None}
    faults = {questions[i].place: reason for i, reason in errors.items()}
    if errors and not args.skip_bad_audio:
        remedy = "; replace them, name their folder with --audio_dir, or count these as wrong with --skip_bad_audio"
        raise SharedInputError(bad_audio_report(faults, len(questions), remedy))
    if errors and rank == 0:
        print(bad_audio_report(faults, len(questions), " and count as wrong; the predictions file names them all"))
    return list(digests), errors


def predictions_path(args: argparse.Namespace, checkpoint: str, kind: dict) -> str:
    """Where an evaluation's predictions go; changed questions have a name of their own."""
    suffix = "_silence" if kind["silence"] else ""
    suffix += "_shuffled_audio" if kind["shuffle_audio"] else ""
    suffix += "_shuffled_choices" if kind["shuffle_choices"] is not None else ""
    suffix += "_samples" if args.samples else ""
    if args.out and not args.ablations:
        return args.out
    stem, extension = os.path.splitext(args.out or os.path.join(checkpoint, "mmau_predictions.json"))
    return stem + suffix + extension


# ---- the whole ----


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Answer the questions with each checkpoint, write predictions and print tables. All ranks call this."""
    checkpoints, (records, questions) = on_rank_0(lambda: (find_checkpoints(args.ckpt), read_data(args)))
    templates = on_rank_0(lambda: choose_templates(args.template, checkpoints))
    digests, errors = read_clips(args, questions)
    readable = [i for i in range(len(questions)) if i not in errors]
    heard = [questions[i] for i in readable]
    for checkpoint in checkpoints:
        on_rank_0(lambda: check_context(checkpoint, heard, templates[checkpoint], args.max_new_tokens))
    dtype, rank = pick_dtype(args.dtype, device), dist.get_rank()
    options = dict(max_new_tokens=args.max_new_tokens, cuda_graph=args.cuda_graph == "on")
    if args.check_batching:
        model, processor = load_on_all_ranks(args.ckpt, dtype, device)
        options |= {"template": templates[args.ckpt], "silence": args.silence}
        check_batching(args, model, processor, heard, options)
        return

    sampling = dict(samples=args.samples, temperature=args.temperature, seed=args.seed) if args.samples else {}
    several = args.ablations or checkpoints != [args.ckpt]
    names = ("max_new_tokens", "batch_size", "samples", "temperature", "seed")
    common = {name: getattr(args, name) for name in names} | {"dtype": str(dtype), "device": device.type}
    common |= {"questions": identify_questions(records, digests), "unreadable": list(errors)}
    common |= {"torch": str(torch.__version__), "transformers": transformers.__version__}
    outs = [predictions_path(args, checkpoint, kind) for checkpoint in checkpoints for kind in kinds(args).values()]
    on_rank_0(lambda: check_writable(outs + [args.html] * bool(args.html)))
    results, broken = {}, []  # (checkpoint, kind) -> predictions file; why a checkpoint of a run has none
    for checkpoint in checkpoints:
        model = None  # one at a time, and none where nothing is to do
        for name, kind in kinds(args).items():
            out = predictions_path(args, checkpoint, kind)
            template = {"template": templates[checkpoint]}
            settings = template | common | kind | {"checkpoint": identify_checkpoint(checkpoint)}
            if several and on_rank_0(lambda: is_done(out, settings)):
                results[checkpoint, name] = out
                if rank == 0:
                    print(f"{out}: already there, with the same settings")
                continue
            if model is None:
                try:
                    model, processor = load_on_all_ranks(checkpoint, dtype, device)
                except SharedInputError as error:
                    if len(checkpoints) == 1:
                        raise
                    broken.append(str(error))  # the others' table does not wait for it
                    break
            asked = change(heard, kind, args.seed)
            answers = answer_questions(
                model, processor, asked, batch_size=args.batch_size, silence=kind["silence"],
                journal=(journal_path(out), settings), **template, **sampling, **options,
            )  # fmt: skip
            predicted = with_answers(records, dict(zip(readable, answers)), errors, bool(args.samples))
            on_rank_0(lambda: write_predictions(out, predicted, settings))
            results[checkpoint, name] = out
            if rank == 0 and several:
                print(f"predictions: {out}", flush=True)
    if rank == 0 and results:
        report(args, questions, templates, results)
    if broken:
        raise SharedInputError(f"{len(broken)} of {len(checkpoints)} checkpoints not evaluated: {'; '.join(broken)}")


def check_batching(args, model, processor, questions: list[Question], options: dict) -> None:
    """Answer a sample in batches and one by one, and print how many predictions differ."""
    chosen = np.random.default_rng(args.seed).permutation(len(questions))[: args.check_batching]
    sample = change([questions[i] for i in sorted(chosen)], kinds(args)["plain"], args.seed)
    batched, single = (
        [text for (text,) in answer_questions(model, processor, sample, batch_size=size, **options)]
        for size in (args.batch_size, 1)
    )
    differing = [q.id for q, a, b in zip(sample, batched, single) if prediction(a) != prediction(b)]
    completions = sum(a != b for a, b in zip(batched, single))
    if dist.get_rank() == 0:
        print(
            f"{len(sample)} questions in batches of {args.batch_size} and one by one, {str(model.dtype)[6:]} on "
            f"{model.device.type}: {len(differing)} predictions differ, {completions} whole texts"
        )
        if differing:
            print(f"they are {', '.join(differing[:SHOWN])}{', ...' if len(differing) > SHOWN else ''}")


def merge_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """Write the model that an adapter makes of its base, its processor and its template to the new folder args.merge.

    Rank 0 does. Raises InputError.
    """
    if os.path.exists(args.merge):
        raise InputError(f"{args.merge}: exists already; name a new folder with --merge, or remove it")
    if not is_adapter(args.ckpt):
        run = step_folders(Path(args.ckpt))
        what = "a run folder; name one of its step_*" if run else "not the folder of an adapter"
        raise InputError(f"{args.ckpt}: nothing to merge, this is {what}")
    template, dtype = remembered_template(args.ckpt), pick_dtype(args.dtype, device)
    model, processor = load_policy(args.ckpt, dtype, torch.device("cpu"))
    size, free = sum(p.nbytes for p in model.parameters()), free_bytes(Path(args.merge))
    if free < size:
        raise InputError(f"{args.merge}: the model takes {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
    with writing(Path(args.merge), lambda: "see to the disk, then try again"):
        save_checkpoint(Path(args.merge), model, processor, template)
    print(f"merged model, {str(dtype)[6:]}, {size / 1e9:.2f} GB: {args.merge}")


def report(
    args: argparse.Namespace, questions: list[Question], templates: dict[str, str], results: dict[tuple[str, str], str]
) -> None:
    """Print the tables, from the predictions files alone."""
    if step_folders(Path(args.ckpt)):
        steps = [(int(Path(checkpoint).name.removeprefix("step_")), out) for (checkpoint, _), out in results.items()]
        used = ", ".join(sorted(set(templates.values())))
        print(run_report(args.ckpt, steps, f"{len(questions)} questions of {args.data}, template {used}"))
        return
    predicted = {name: json.loads(Path(out).read_text(encoding="utf-8")) for (_, name), out in results.items()}
    scored = [i for i, question in enumerate(questions) if question.answer is not None]
    asked = [questions[i] for i in scored]

    def right(said):
        return [is_right(questions[i], said(i)) for i in scored]

    correct = {name: right(lambda i: records[i]["model_prediction"]) for name, records in predicted.items()}
    if scored and args.ablations:
        print(ablation_table(asked, correct))
    elif scored:
        records, votes = predicted["plain"], correct["plain"]
        if args.samples:
            print(f"majority vote of {args.samples} samples")
        print(accuracy_table(asked, votes))
        print(f"guessing would score {percent(guessing([question.choices for question in asked]), 1)}{remark(args)}")
        if args.samples:
            texts = [records[i]["samples"] or [""] * args.samples for i in range(len(questions))]
            samples = [right(lambda i: prediction(texts[i][k])) for k in range(args.samples)]
            print(samples_table(asked, [list(own) for own in zip(*samples)], votes))
    if len(scored) < len(questions):
        print(f"{len(questions) - len(scored)} questions have no answer in {args.data} and are not scored")
    skipped = sum("error" in record for record in predicted["plain"])
    if skipped:
        print(f"{skipped} questions without a usable clip count as wrong")
    for out in [] if args.ablations else results.values():
        print(f"predictions: {out}")
    if args.html:
        records, shown = predicted["plain"], list(questions)
        heard = [i for i, record in enumerate(records) if "error" not in record]
        for i, question in zip(heard, change([questions[i] for i in heard], kinds(args)["plain"], args.seed)):
            shown[i] = question  # as the model was asked
        write_html(args.html, shown, records, f"{args.ckpt} on {args.data}{remark(args)}")
        print(f"page: {args.html}")


def main() -> int:
    args = parse_args()
    if args.compare:
        try:
            print(compare(*args.compare))
            return 0
        except InputError as error:
            print(f"eval_mmau.py: error: {error}", file=sys.stderr)
            return 1
    _, _, device = setup_distributed()

    def work():
        require_gpu_each()
        with memory_errors("the evaluation"):
            if args.merge:
                on_rank_0(lambda: merge_checkpoint(args, device))
            else:
                evaluate(args, device)

    keeps = not (args.merge or args.check_batching)
    left = "the same command continues from what is answered" if keeps else "nothing was written"
    return finish_together("eval_mmau.py", work, interrupted=lambda: left)


if __name__ == "__main__":
    sys.exit(main())
