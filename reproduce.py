"""The paper's table from one command: GRPO against supervised fine-tuning, LoRA and the untouched model.

    python reproduce.py                 the toy, one seed, on two CPU cores
    python reproduce.py --seeds 3       three seeds, each with a base model of its own, in one world of sounds
    python reproduce.py --model Qwen/Qwen2-Audio-7B-Instruct --data data/AVQA/train_qa.json \\
        --audio_dir data/AVQA/wavs --mmau data/MMAU/mmau-test-mini.json --nproc_per_node 8

Each row of the table is trained and evaluated by the scripts, in processes of their own. The same command continues
where it was interrupted: finished rows are found by their row.json, a training by its resume state, an evaluation by
its journal.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

import toy
from data import digest, load_questions
from errors import InputError
from files import UNFINISHED, first_free, remove, step_folders, write_text
from flags import Parser
from preflight import CACHE, check_model, load_checked
from reproduce_estimate import disk_bytes, disk_text, duration, require_disk, time_text
from reproduce_report import write_report
from reproduce_rows import (
    ROWS,
    Row,
    base_model,
    evaluation_command,
    finished_rows,
    is_finished,
    is_own,
    jobs,
    last_checkpoint,
    predictions_file,
    row_folder,
    settings,
    sha256,
    training_command,
)
from training import TOY_PROMPTS

# ---- command line ----


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = Parser(
        usage="%(prog)s [--model NAME --data FILE --mmau FILE] [settings]",
        description="Train and evaluate every row of the paper's table, and write it. Without --model: on the toy, "
        f"which needs no GPU. Rows: {', '.join(names)}.",
    )

    def add(name, help, **kwargs):
        shown = "" if kwargs.get("default") is None else " [%(default)s]"
        parser.add_argument(f"--{name}", help=help + shown, **kwargs)

    add("model", "Hugging Face name or folder of a Qwen2-Audio model")
    add("data", "training questions: an R1-AQA, AVQA, MMAU or plain file")
    add("audio_dir", "folder that its relative audio paths start from [the question file's]")
    add("mmau", "questions to evaluate on, with answers; MMAU's test-mini or any other file")
    add("mmau_audio_dir", "folder that its relative audio paths start from [the question file's]")
    add("out", "folder of the table [runs/reproduce; of the toy: runs/reproduce_toy]")
    add("rows", "names of the rows to run, with commas between them [all]")
    add("seeds", "runs of each row", type=int, default=1)
    add("steps", "training steps of each row [1000; of the toy: 360]", type=int)
    add("nproc_per_node", "processes of a script [GPUs, at least 1; of the toy: 2]", type=int)
    add("skip_bad_audio", "go on where clips are missing or broken, as the scripts do", action="store_true")
    add("label_noise", "share of the toy's training answers that are wrong", type=float, default=0.0)
    add("heldout_noise", "the toy's held-out clips are this many times as noisy", type=float, default=1.0)
    add("seconds_per_step", "of training, for the estimate, where none has been measured in --out", type=float)
    add("dry_run", "print the estimate and the commands, and do nothing", action="store_true")

    args = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parser.error("start it with python: it calls torchrun itself")
    args.toy = args.model is None
    args.steps = (360 if args.toy else 1000) if args.steps is None else args.steps
    if args.nproc_per_node is None:
        args.nproc_per_node = 2 if args.toy else max(1, torch.cuda.device_count())
    if args.toy:
        for name in ("data", "audio_dir", "mmau", "mmau_audio_dir"):
            if getattr(args, name):
                parser.error(f"--{name} needs --model")
        args.out = args.out or "runs/reproduce_toy"
        args.data, args.mmau = (os.path.join(args.out, "world", name) for name in ("train.jsonl", "heldout.json"))
    else:
        for name in ("data", "mmau"):
            if getattr(args, name) is None:
                parser.error(f"--model needs --{name}, a file of questions")
        if (args.label_noise, args.heldout_noise) != (0.0, 1.0):
            parser.error("--label_noise and --heldout_noise are the toy's: they do not go with --model")
        args.out = args.out or "runs/reproduce"
    args.rows = args.rows.split(",") if args.rows else names
    for name in args.rows:
        if name not in names:
            parser.error(f"--rows: there is no row {name!r}; choose from {', '.join(names)}")
    if args.toy and TOY_PROMPTS % args.nproc_per_node:
        parser.error(f"--nproc_per_node must divide the toy's {TOY_PROMPTS} questions a step")
    return args


# ---- a row ----


class RowFailed(Exception):
    """A script did not do its part of a row; the other rows go on."""


def run_row(args: argparse.Namespace, seed: int, row: Row) -> None:
    """Train and evaluate a row, or go on where it stopped. Raises RowFailed."""
    folder, own = row_folder(args, seed, row), settings(args, seed, row)
    if folder.exists() and not is_own(args, seed, row):
        earlier = first_free(lambda n: folder.with_name(f"{row.name}.earlier_{n}"))
        folder.rename(earlier)
        print(f"{folder} is of other settings; it is now {earlier}", flush=True)
    write_text(folder / "row.json", json.dumps({"settings": own}, indent=2) + "\n")
    if row.script:
        checkpoint = last_checkpoint(args, seed, row)
        if not checkpoint.exists():
            _run_part(args, "training", training_command(args, seed, row), folder / "log.txt")
            if not checkpoint.exists():
                raise RowFailed(f"training ended before {checkpoint} was there")
        _remove_all_but(checkpoint)
    started = time.monotonic()
    _run_part(args, "evaluation", evaluation_command(args, seed, row), folder / "log.txt")
    predictions = predictions_file(args, seed, row)
    if not predictions.exists():
        raise RowFailed(f"evaluation ended without {predictions}")
    seconds = round(time.monotonic() - started, 1)
    done = {"settings": own, "predictions_sha256": sha256(predictions), "evaluation_seconds": seconds}
    write_text(folder / "row.json", json.dumps(done, indent=2) + "\n")


def _remove_all_but(checkpoint: Path) -> None:
    """Remove a run's resume state, most of its size, its other checkpoints, and what an interrupted removal left."""
    run = checkpoint.parent
    for path in run.glob(f"*{UNFINISHED}"):
        remove(path)
    for path in (run / "resume", *step_folders(run)):
        if path.exists() and path != checkpoint:
            remove(path)


def _run_part(args: argparse.Namespace, part: str, command: list[str], log: Path) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if args.toy:
        environment.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other are slower on such a model
    status = run_command(command, log, environment)
    if status:
        raise RowFailed(f"{part} ended with exit status {status}")


def run_command(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a command; what it prints goes to the terminal and is added to `log`. Returns its exit status.

    When this process is interrupted, the command gets a SIGTERM, upon which a training saves, and is waited for; at
    another Ctrl-C it is killed. Raises KeyboardInterrupt after either, and OSError at the end if the log can't be
    written.
    """
    with open(log, "ab") as file:
        file.write(f"\n$ {shlex.join(command)}\n".encode())
        # In a session of its own: Ctrl-C reaches this process alone.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            error = _copy_output(process, file)
            status = process.wait()
        except BaseException:
            try:
                process.terminate()
                with suppress(OSError):  # a terminal that is gone
                    print("\nstopping; what is running saves first (Ctrl-C again: stop at once)", flush=True)
                _copy_output(process, file)
                process.wait()
            except BaseException:
                _kill(process)
            raise
    if error:
        raise error
    return status


def _copy_output(process: subprocess.Popen, log) -> OSError | None:
    """Copy to the terminal as it comes and to the log line by line, of a progress bar only its last state.

    Reads to the end, so that the process never waits, even when the terminal is gone or the log's disk is full.
    Returns what the log could not be written for.
    """
    assert process.stdout is not None
    line, error, chunk = b"", None, None
    while chunk != b"":
        chunk = os.read(process.stdout.fileno(), 65536)
        with suppress(OSError):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        *lines, line = (line + chunk).split(b"\n")
        line = line[line.rfind(b"\r", 0, -1) + 1 :]
        try:
            for text in lines:
                log.write(text.rstrip(b"\r").rpartition(b"\r")[2] + b"\n")
            log.write(b"" if chunk else line)
            log.flush()
        except OSError as failure:
            error = failure
    return error


def _kill(process: subprocess.Popen) -> None:
    """Kill a command at once, and torchrun's workers, which have sessions of their own."""
    groups = [process.pid]
    with suppress(OSError):  # no /proc
        groups += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


# ---- the table ----


def check_inputs(args: argparse.Namespace) -> None:
    """Check the user's files, and that args.out holds no other table. Raises InputError."""
    if args.toy:
        identity = {"model": None, "label_noise": args.label_noise, "heldout_noise": args.heldout_noise}
    else:
        check_model(args.model)
        identity = {"model": os.path.abspath(args.model) if os.path.exists(args.model) else args.model}
        for name, path, folder in (("data", args.data, args.audio_dir), ("mmau", args.mmau, args.mmau_audio_dir)):
            cache = None if args.dry_run else Path(args.out, CACHE)
            identity |= {f"{name}_digest": digest(load_checked(path, folder, args.skip_bad_audio, cache).questions)}
    path = Path(args.out) / "reproduce.json"
    if not path.exists():
        if not args.dry_run:
            write_text(path, json.dumps(identity, indent=2) + "\n")
        return
    try:
        saved = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); name another folder with --out") from None
    different = [name for name in saved | identity if saved.get(name, "") != identity.get(name, "")]
    if different:
        listed = ", ".join(f"{name} {saved.get(name)} (now {identity.get(name)})" for name in different)
        raise InputError(f"{args.out}: holds the rows of another table, {listed}; name another folder with --out")


def make_start(args: argparse.Namespace, seed: int) -> None:
    """The toy's sounds and questions, and the base model of a seed, where they are missing."""
    world, base = Path(args.data).parent, Path(base_model(args, seed))
    toy.make_world(world, heldout_noise=args.heldout_noise, label_noise=args.label_noise)
    if not base.exists():
        torch.set_num_threads(1)  # as the scripts have it: the same base on any number of cores
        toy.make_base(load_questions(args.data), base, seed=seed)


def reproduce(args: argparse.Namespace) -> int:
    """Run all rows that are not finished, and write the table after each. Returns the exit status."""
    check_inputs(args)
    todo = [(seed, row) for seed, row in jobs(args) if not is_finished(args, seed, row)]
    print(f"{args.out}: {len(jobs(args)) - len(todo)} of {len(jobs(args))} rows are finished")
    needed = disk_bytes(args, todo)
    print(f"time: {time_text(args, todo)}\ndisk: {disk_text(args, needed)}", flush=True)
    if args.dry_run:
        for seed, row in todo:
            if row.script:
                print(shlex.join(training_command(args, seed, row)))
            print(shlex.join(evaluation_command(args, seed, row)))
        return 0
    require_disk(args, needed)
    failed = []
    for number, (seed, row) in enumerate(todo, start=1):
        print(f"\n==== {row.name}, seed {seed}: row {number} of {len(todo)}", flush=True)
        started = time.monotonic()
        try:
            if args.toy:
                make_start(args, seed)
            run_row(args, seed, row)
        except RowFailed as error:
            failed.append(f"{row.name} of seed {seed}: {error}; see {row_folder(args, seed, row) / 'log.txt'}")
            print(f"\nfailed: {failed[-1]}", flush=True)
            continue
        write_report(args, finished_rows(args), picture=False)
        print(f"\n{row.name}, seed {seed}: {duration(time.monotonic() - started)}", flush=True)
        if todo[number:]:
            print(f"the {len(todo) - number} rows after it: {time_text(args, todo[number:])}", flush=True)
    finished = finished_rows(args)
    table = write_report(args, finished, picture=True)
    files = "table.md, table.png, results.json" if finished else "table.md, results.json"
    print(f"\n{table}\n{args.out}: {files}", flush=True)
    for reason in failed:
        print(f"reproduce.py: error: {reason}", file=sys.stderr)
    if failed:
        print("reproduce.py: the same command tries the failed rows again", file=sys.stderr)
    return 1 if failed else 0


ENDINGS = (signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed


def interrupt(signum, frame):
    """Upon the first SIGTERM or SIGHUP, stop as upon Ctrl-C. `timeout` sends more than one: those say no more."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    args = parse_args()
    for ending in ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, interrupt)
    try:
        return reproduce(args)
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.exit(f"reproduce.py: interrupted; the same command continues the table in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
