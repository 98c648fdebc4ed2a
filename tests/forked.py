"""Start processes fast: forks of one process that has imported torch, and jobs that do not need torch."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # equal sums in every run
multiprocessing.set_forkserver_preload(["transformers.models.qwen2_audio.modeling_qwen2_audio", "peft"])


def run_processes(function, args, nprocs):
    """Call function(rank, *args) in `nprocs` new processes and wait for them. Raises if one fails."""
    mp.start_processes(function, args, nprocs, start_method="forkserver")


# ---- another job ----

NO_LOCKS = """
import errno, fcntl
def flock(*args): raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""
JOB = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from infra.ownership import owning
with owning(Path(sys.argv[2])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.readline()
    child.kill()
"""


@contextmanager
def another_owner(file, locks=True):
    """Inside `with`, another process holds an owner file. Yields this process; `communicate()` ends it.

    It also has a child, which must not inherit the lock.
    """
    command = [sys.executable, "-c", JOB if locks else NO_LOCKS + JOB, str(ROOT), str(file)]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if process.poll() is None:
                process.communicate()


# ---- commands ----

Ended = namedtuple("Ended", "returncode stdout stderr")
SERVER = """
import json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
import eval_mmau, grpo_aqa, sft_aqa
for line in sys.stdin:
    folder, argv, code = json.loads(line)
    if (pid := os.fork()) == 0:
        os.setsid()
        os.chdir(folder)
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = argv
        status = 0
        try:
            exec(compile(code, "<command>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forker:
    """Run commands as forks of one process that has imported the scripts. Use it in a `with`."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(ROOT)], env=os.environ | ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()

    def run(self, folder, argv, code=None) -> Ended:
        """Run the script argv[0] of this project in `folder`, or `code` in its place."""
        code = code or f"import runpy; runpy.run_path({str(ROOT / argv[0])!r}, run_name='__main__')"
        self.process.stdin.write(json.dumps([str(folder), list(map(str, argv)), code]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return Ended(status, *(Path(folder, name).read_text() for name in ("stdout", "stderr")))
