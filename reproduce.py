"""The paper's table from one command: GRPO against supervised fine-tuning, LoRA and the untouched model.

    python reproduce.py                 the toy, one seed, on two CPU cores
    python reproduce.py --seeds 3       three seeds; each has its own base model, all share one world of sounds
    python reproduce.py --transfer      the paper's situation: trained on sounds alone, tested on all areas
    python reproduce.py --variants      what each variant of GRPO buys: time to a held-out accuracy, final accuracy
    python reproduce.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs --mmau data/MMAU/mmau-test-mini.json --nproc_per_node 8 --skip_bad_audio

The scripts train and evaluate each row, in processes of their own. The same command continues an interrupted table:
row.json marks a finished row, a training continues from its resume state, an evaluation from its journal.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from data import digest, load_questions
from infra.errors import InputError
from infra.files import UNFINISHED, first_free, remove, write_text
from infra.flags import Parser
from infra.ownership import OWNER, owner_file, owning
from model.checkpoints import check_model, identify_model
from paper.commands import evaluation_command, run_command, training_command
from paper.estimate import disk_bytes, disk_text, duration, rates_text, require_disk, time_text
from paper.rows import ROWS, TABLES, Job, finished_jobs, is_tuned, jobs, read_record, sha256, table_rows
from paper.table import write_table
from paper.transfer import TRANSFER_STEPS, make_transfer, measure
from paper.transfer_table import write_transfer
from paper.variants_table import write_variants
from training import toy_model
from training.preflight import CACHE, check_texts, load_checked
from training.run_folder import step_folders
from training.settings import TOY_PROMPTS, TOY_STEPS

TOKENS = 256  # the default of --max_new_tokens in all scripts
# Question files in --out.
TOY_FILES = {"data": "world/train.jsonl", "mmau": "world/heldout.json", "validation": "validation/heldout.json"}
TRANSFER_FILES = {
    "data": "worlds/trained/heldout.json",
    "mmau": "worlds/test/heldout.json",
    "clean": "worlds/clean/heldout.json",
}

# ---- arguments ----


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    others = (f"; with --{kind}: {', '.join(row.name for row in rows)}" for kind, rows in TABLES.items())
    parser = Parser(
        usage="%(prog)s [--model NAME --data FILE --mmau FILE] [settings]",
        description="Train and evaluate every row of the paper's table, and write the table. Without --model, use the "
        f"toy, which needs no GPU. Rows: {', '.join(row.name for row in ROWS)} (the toy lacks "
        f"sft_at_grpo_rate){''.join(others)}.",
    )

    def add(name, help, **kwargs):
        shown = "" if kwargs.get("default") is None else " [%(default)s]"
        parser.add_argument(f"--{name}", help=help + shown, **kwargs)

    add("model", "Hugging Face name or folder of a Qwen2-Audio model")
    add("data", "training questions: a JSON, JSON lines or CSV file")
    add("audio_dir", "folder of relative audio paths in --data [the question file's]")
    add("mmau", "questions to evaluate on, with answers: MMAU's test-mini or any other file")
    add("mmau_audio_dir", "folder of relative audio paths in --mmau [the question file's]")
    add("validation", "questions with answers, to choose learning rates; must differ from --data and --mmau")
    add("validation_audio_dir", "folder of relative audio paths in --validation [the question file's]")
    rates = "train seed 0 of each row at a third, once and three times its learning rate; use the best rate"
    add("tune_rates", rates, action="store_true")
    add("transfer", "train the toy on noisy sounds alone and test it on all areas", action="store_true")
    add("variants", "train the toy with variants of GRPO; compare time and accuracy", action="store_true")
    add("out", "folder of the table [runs/reproduce; toy: runs/reproduce_toy, _transfer or _variants]")
    add("rows", "names of the rows to run, separated by commas [all; --transfer: all but LoRA]")
    add("seeds", "runs of each row", type=int, default=1)
    add("steps", f"training steps of each row [1000; toy: {TOY_STEPS}; --transfer: {TRANSFER_STEPS}]", type=int)
    add("nproc_per_node", "ranks of each script [the number of GPUs, at least 1; toy: 2]", type=int)
    add("skip_bad_audio", "leave out questions whose clip is missing or broken, as the scripts do", action="store_true")
    add("label_noise", "share of the toy's training answers that are wrong", type=float, default=0.0)
    add("heldout_noise", "factor on the noise in the toy's held-out clips", type=float, default=1.0)
    add("seconds_per_step", "time of a training step, for the estimate, if --out has measured none yet", type=float)
    add("dry_run", "print the estimate and the commands, then stop", action="store_true")

    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("start reproduce.py with python; it calls torchrun itself")
    args.toy = args.model is None
    if args.steps is None:
        args.steps = TRANSFER_STEPS if args.transfer else TOY_STEPS if args.toy else 1000
    if args.nproc_per_node is None:
        args.nproc_per_node = 2 if args.toy else max(1, torch.cuda.device_count())
    noise = (args.label_noise, args.heldout_noise) != (0.0, 1.0)
    kinds = [kind for kind in TABLES if getattr(args, kind)]
    if kinds and (len(kinds) > 1 or args.model or args.tune_rates or noise):
        other = "each other, --model, --tune_rates, --label_noise or --heldout_noise"
        parser.error(f"--transfer and --variants cannot be combined with {other}")
    if args.toy:
        for name in ("data", "audio_dir", "mmau", "mmau_audio_dir", "validation", "validation_audio_dir"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model")
        args.out = args.out or f"runs/reproduce_{kinds[0] if kinds else 'toy'}"
        for name, path in (TRANSFER_FILES if args.transfer else TOY_FILES).items():
            setattr(args, name, os.path.join(args.out, path))
    else:
        for name in ("data", "mmau"):
            if getattr(args, name) is None:
                parser.error(f"--model needs --{name}, a file of questions")
        if args.tune_rates != (args.validation is not None):
            parser.error("with --model, --tune_rates needs --validation, and --validation needs --tune_rates")
        if noise:
            parser.error("--label_noise and --heldout_noise are for the toy; leave them out with --model")
        args.out = args.out or "runs/reproduce"
    every = table_rows(args)
    names = [row.name for row in every]
    default = [row.name for row in every if not (args.transfer and row.lora)]
    args.rows = args.rows.split(",") if args.rows else default
    for name in args.rows:
        if name not in names:
            parser.error(f"--rows: there is no row {name!r}; choose from {', '.join(names)}")
    if args.toy and TOY_PROMPTS % args.nproc_per_node:
        parser.error(f"--nproc_per_node must divide the toy's {TOY_PROMPTS} questions a step")
    return args


# ---- inputs ----


def check_inputs(args: argparse.Namespace) -> None:
    """Check the model, the question files and that args.out holds no other table. Raises InputError.

    reproduce.json in args.out holds digests of the model and of the questions: all rows of a table share them.
    """
    shared: dict = {"transfer": args.transfer, "variants": args.variants}
    if args.toy:
        shared |= {"model": None, "label_noise": args.label_noise, "heldout_noise": args.heldout_noise}
    else:
        check_model(args.model)
        chosen = [row for row in table_rows(args) if row.name in args.rows]
        files = json.dumps(identify_model(args.model)).encode()
        shared |= {"model": os.path.abspath(args.model) if os.path.exists(args.model) else args.model}
        shared |= {"model_digest": hashlib.sha256(files).hexdigest()[:16]}
        sources = [("data", args.data, args.audio_dir), ("mmau", args.mmau, args.mmau_audio_dir)]
        sources += [("validation", args.validation, args.validation_audio_dir)] * args.tune_rates
        asked: dict[str, set] = {}
        for name, path, folder in sources:
            cache = None if args.dry_run else Path(args.out, CACHE)
            questions = load_checked(path, folder, args.skip_bad_audio, cache).questions
            for template in {row.template for row in chosen if row.script or name == "mmau"}:
                check_texts(args.model, questions, template, TOKENS, strict=name == "data")
            shared |= {f"{name}_digest": digest(questions)}
            asked[name] = {(os.path.realpath(q.audio), q.question, q.answer) for q in questions}
        for name in ("data", "mmau") if args.tune_rates else ():
            if both := asked["validation"] & asked[name]:
                raise InputError(f"{args.validation}: {len(both)} of its questions are also in --{name}; give others")
    path = Path(args.out) / "reproduce.json"
    saved: dict = {}
    if path.exists():
        try:
            saved = {"transfer": False, "variants": False} | dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); name another folder with --out") from None
    # Older tables have no model_digest, and a table has a validation_digest only if its rates were tuned.
    different = [name for name in saved.keys() & shared.keys() if saved[name] != shared[name]]
    if different:
        listed = ", ".join(f"{name} {saved[name]} (now {shared[name]})" for name in sorted(different))
        raise InputError(f"{args.out}: holds the rows of another table, {listed}; name another folder with --out")
    if not args.dry_run and saved != saved | shared:
        write_text(path, json.dumps(saved | shared, indent=2) + "\n")


# ---- one job ----


class JobFailed(Exception):
    """The training or evaluation of one job failed. The other jobs still run."""


def run_job(job: Job) -> None:
    """Train and evaluate one row with one seed, or continue from where the job stopped. Raises JobFailed."""
    if job.args.toy:
        make_toy(job)
    if job.folder.exists():
        for path in (job.run_folder / OWNER, *map(owner_file, job.evaluations())):
            with owning(path):
                pass  # refused if a script of a killed reproduce.py still runs
        if not job.has_same_settings():
            earlier = first_free(lambda n: job.folder.with_name(f"{job.folder.name}.earlier_{n}"))
            job.folder.rename(earlier)
            print(f"{job.folder} was made with other settings and has been moved to {earlier}", flush=True)
    # Results stay only if the checkpoint that they are of is there.
    keep = job.is_trained() if job.row.script else job.has_same_settings()
    record: dict[str, Any] = read_record(job.record) if keep else {"settings": job.settings()}
    write_text(job.record, json.dumps(record, indent=2) + "\n")
    if job.row.script:
        if not job.checkpoint.exists():
            run_part(job, "training", training_command(job))
            if not job.checkpoint.exists():
                raise JobFailed(f"training ended before it wrote {job.checkpoint}")
        remove_all_but(job.checkpoint)
    started = time.monotonic()
    for path in job.evaluations():
        if not job.has_result(path):
            run_part(job, "evaluation", evaluation_command(job, path))
            if not path.exists():
                raise JobFailed(f"evaluation ended before it wrote {path}")
            record[f"{path.stem}_sha256"] = sha256(path)
            write_text(job.record, json.dumps(record, indent=2) + "\n")
    if job.args.transfer and not job.has_result(job.measured):
        print(f"\n{job}: measuring answers among the choices and the KL divergence from the base model", flush=True)
        found = measure(job.evaluated, job.base_model, load_questions(job.args.mmau), job.row.template, job.seed)
        write_text(job.measured, json.dumps(found) + "\n")
        record["measured_sha256"] = sha256(job.measured)
    seconds = record.get("evaluation_seconds", 0) + time.monotonic() - started
    record["evaluation_seconds"] = round(seconds, 1)
    write_text(job.record, json.dumps(record, indent=2) + "\n")


def make_toy(job: Job) -> None:
    """Make the toy's sounds and questions, and the base model of the job's seed, if they are missing."""
    args, base = job.args, Path(job.base_model)
    torch.set_num_threads(1)  # as in the scripts: any number of cores gives the same base model
    if args.transfer:
        make_transfer(Path(args.out, "worlds"), base, job.seed)
        return
    toy_model.make_world(Path(args.data).parent, heldout_noise=args.heldout_noise, label_noise=args.label_noise)
    if args.tune_rates or args.variants:
        folder = Path(args.validation).parent
        toy_model.make_world(folder, num_train=0, seed=1, heldout_noise=args.heldout_noise)
    if not base.exists():
        toy_model.make_base(load_questions(args.data), base, seed=job.seed)


def run_part(job: Job, part: str, command: list[str]) -> None:
    """Run the training or evaluation of a job. Raises JobFailed if its exit status is not 0."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if job.args.toy:
        environment.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower on so small a model
    status = run_command(command, job.log, environment)
    if status:
        raise JobFailed(f"{part} ended with exit status {status}")


def remove_all_but(checkpoint: Path) -> None:
    """Remove a run's resume state, its other checkpoints and the remains of interrupted removals."""
    run = checkpoint.parent
    for path in run.glob(f"*{UNFINISHED}"):
        remove(path)
    for path in (run / "resume", *step_folders(run)):
        if path.exists() and path != checkpoint:
            remove(path)


# ---- the table ----


def reproduce(args: argparse.Namespace) -> int:
    """Run all jobs that are not finished, and write the table after each. Return the exit status."""
    write = write_transfer if args.transfer else write_variants if args.variants else write_table
    check_inputs(args)
    every = jobs(args)
    todo = [job for job in every if not job.is_finished()]
    print(f"{args.out}: {len(every) - len(todo)} of {len(every)} rows are finished")
    needed = disk_bytes(args, todo)
    print(f"time: {time_text(args, todo)}\ndisk: {disk_text(args.out, needed)}", flush=True)
    if not (args.transfer or args.variants or args.tune_rates) and any(job.row.script for job in every):
        print(f"two more learning rates of each trained row (--tune_rates): {rates_text(args)} of training", flush=True)
    if args.dry_run:
        for job in todo:
            if job.row.script:
                print(shlex.join(training_command(job)))
            for path in job.evaluations():
                print(shlex.join(evaluation_command(job, path)))
        return 0
    require_disk(args.out, needed)
    failed: dict[str, str] = {}
    undecided = set()  # rows whose rate is unknown, because a training of seed 0 failed
    while todo:
        job = todo[0]
        print(f"\n==== {job}: rows left: {len(todo)}; time: {time_text(args, todo)}", flush=True)
        started = time.monotonic()
        try:
            run_job(job)
            write(args, finished_jobs(args), picture=False)
            print(f"\n{job}: {duration(time.monotonic() - started)}", flush=True)
        except JobFailed as error:
            failed[str(job)] = f"{job}: {error}; see {job.log}"
            print(f"\nfailed: {failed[str(job)]}", flush=True)
            if job.seed == 0 and is_tuned(args, job.row):
                undecided.add(job.row)
        # Listed anew: the rates of later seeds depend on the rows of seed 0.
        todo = [job for job in jobs(args) if str(job) not in failed and not job.is_finished()]
        todo = [job for job in todo if job.seed == 0 or job.row not in undecided]
    finished = finished_jobs(args)
    table = write(args, finished, picture=True)
    files = "table.md, table.png, results.json" if finished else "table.md, results.json"
    print(f"\n{table}\n{args.out}: {files}", flush=True)
    for reason in failed.values():
        print(f"reproduce.py: error: {reason}", file=sys.stderr)
    if failed:
        print("reproduce.py: the same command tries the failed rows again", file=sys.stderr)
    return 1 if failed else 0


ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


def interrupt(signum, frame):
    """Stop at the first SIGTERM or SIGHUP as at Ctrl-C. Later ones are ignored: `timeout` sends more than one."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    args = parse_args()
    for ending in ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(ending, interrupt)
    try:
        with nullcontext() if args.dry_run else owning(Path(args.out, OWNER)):
            return reproduce(args)
    except (InputError, OSError) as error:  # OSError: a folder cannot be written or the disk is full
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.exit(f"reproduce.py: interrupted; the same command continues the table in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
