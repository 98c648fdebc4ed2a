"""Commands of a job: build their command lines, run them with a log, stop them."""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from paper.rows import HELDOUT_EVERY, Job

ROOT = Path(__file__).resolve().parents[1]  # the folder of the scripts

# ---- command lines ----


def training_command(job: Job) -> list[str]:
    """Build the command that starts the training of a job, or continues it."""
    paths = {"model": job.base_model, "data": job.args.data, "audio_dir": job.args.audio_dir, "out": job.run_folder}
    saving = {"save_every": 100, "keep_last": 1}
    scoring = {"heldout": job.args.validation, "heldout_every": HELDOUT_EVERY} if job.args.variants else {}
    return [*_command(job, job.row.script, paths | job.training_flags() | saving | scoring), "--resume"]


def evaluation_command(job: Job, predictions: Path) -> list[str]:
    """Build the command that writes one of the job's predictions files."""
    data, audio_dir = job.evaluations()[predictions]
    paths = {"ckpt": job.evaluated, "data": data, "audio_dir": audio_dir, "out": predictions}
    return _command(job, "eval_mmau.py", paths | job.evaluation_flags())


def _command(job: Job, script: str, flags: dict) -> list[str]:
    """Build the command that runs a script on all ranks. Flags that are None are left out."""
    ranks, launcher = job.args.nproc_per_node, []
    if ranks > 1:
        # --standalone finds a free port. The timeout is long enough to save the real model after an interruption.
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher += ["--shutdown_timeout=600"]
    texts = [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
    texts += ["--skip_bad_audio"] * job.args.skip_bad_audio
    return [sys.executable, *launcher, str(ROOT / script), *texts]


# ---- running and stopping ----


def run_command(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a command, print its output and append the output to `log`. Return its exit status.

    If this process is interrupted, it sends SIGTERM to the command and waits; a training saves first. A second
    interruption kills the command. Raises KeyboardInterrupt after either. Raises OSError after the command has ended
    if the log could not be written.
    """
    with open(log, "ab") as file:
        file.write(os.fsencode(f"\n$ {shlex.join(command)}\n"))
        # A session of its own: Ctrl-C reaches this process only.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            error = _copy_output(process, file)
            status = process.wait()
        except BaseException:
            try:
                process.terminate()
                with suppress(OSError):  # the terminal may be gone
                    print("\nstopping: the running script saves first (Ctrl-C again stops it at once)", flush=True)
                _copy_output(process, file)
                process.wait()
            except BaseException:
                _kill(process)
            raise
    if error:
        raise error
    return status


def _copy_output(process: subprocess.Popen, log: IO[bytes]) -> OSError | None:
    """Copy the output to the terminal as it comes, and to the log line by line, with only the last state of each bar.

    Reads to the end even if the terminal is gone or the log's disk is full, because the process would wait for a full
    pipe. Returns the last error of writing the log, or None.
    """
    assert process.stdout is not None
    line, error, chunk = b"", None, None
    while chunk != b"":
        chunk = os.read(process.stdout.fileno(), 65536)
        with suppress(OSError):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
        *lines, line = (line + chunk).split(b"\n")
        line = line[line.rfind(b"\r", 0, -1) + 1 :]  # a progress bar returns to the start of its line and writes again
        try:
            for text in lines:
                log.write(text.rstrip(b"\r").rpartition(b"\r")[2] + b"\n")
            log.write(b"" if chunk else line)
            log.flush()
        except OSError as failure:
            error = failure
    return error


def _kill(process: subprocess.Popen) -> None:
    """Kill a command at once, together with torchrun's workers, which have sessions of their own."""
    groups = [process.pid]
    with suppress(OSError):  # no /proc outside Linux
        groups += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    process.wait()
