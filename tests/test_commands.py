"""Run a command with a log, and stop it."""

import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from paper import commands


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C interrupt, as in a terminal: shells start background commands with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def no_terminal(monkeypatch):
    """Make standard output fail, as it does when `tee` has ended."""

    def fail(*_):
        raise BrokenPipeError

    gone = types.SimpleNamespace(write=fail, flush=fail)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=fail, flush=fail, buffer=gone))


def test_command_ends_well_without_terminal_or_log(tmp_path, monkeypatch):
    """More output than a pipe holds is still read to the end. A full disk is reported after that."""
    code = "import sys; print('x' * 300_000); print('end'); open(sys.argv[1], 'w').close(); sys.exit(3)"
    command, environment = [sys.executable, "-c", code, str(tmp_path / "done")], dict(os.environ)
    with monkeypatch.context() as patch:
        no_terminal(patch)
        assert commands.run_command(command, tmp_path / "log", environment) == 3
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["x" * 300_000, "end"]
    (tmp_path / "done").unlink()
    with pytest.raises(OSError, match="No space left"):
        commands.run_command(command, Path("/dev/full"), environment)
    assert (tmp_path / "done").exists()


WAIT = """
import signal, subprocess, sys, time
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("worker", worker.pid, flush=True)
while not ended:
    time.sleep(0.01)
print("saving", flush=True)
time.sleep(float(sys.argv[1]))
worker.kill()
print("saved")
"""


def interrupted(log, seconds, *awaited):
    """Run WAIT and send Ctrl-C each time one of the awaited texts is in the log. Return the log's lines."""

    def interrupt():
        for text in awaited:
            while not log.exists() or text not in log.read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    log.parent.joinpath("wait.py").write_text(WAIT)
    command = [sys.executable, str(log.parent / "wait.py"), str(seconds)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        commands.run_command(command, log, dict(os.environ))
    thread.join()
    return log.read_text().splitlines()[2:]


def test_interruption_without_terminal_saves(tmp_path, monkeypatch):
    no_terminal(monkeypatch)
    assert interrupted(tmp_path / "log", 0, "worker ")[1:] == ["saving", "saved"]


def test_second_interruption_kills_workers_in_their_own_sessions(tmp_path):
    worker, *rest = interrupted(tmp_path / "log", 60, "worker ", "saving")
    assert rest == ["saving"]
    pid = worker.removeprefix("worker ")
    state = Path(f"/proc/{pid}/stat")
    for _ in range(500):  # the kernel takes a moment; Z: a zombie that nobody has collected
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    os.kill(int(pid), signal.SIGKILL)
    pytest.fail("the worker is still running")


def test_log_keeps_the_last_state_of_a_progress_bar(tmp_path):
    code = r"import sys; sys.stderr.write('\r10%\r50%\r100%\nnext\r\n'); sys.stderr.write('x\r\ry'); sys.exit(3)"
    assert commands.run_command([sys.executable, "-c", code], tmp_path / "log", dict(os.environ)) == 3
    assert (tmp_path / "log").read_text().splitlines()[2:] == ["100%", "next", "y"]


def test_log_keeps_the_bytes_of_a_command_that_is_not_utf_8(tmp_path):
    assert commands.run_command(["true", os.fsdecode(b"\xff")], tmp_path / "log", dict(os.environ)) == 0
    assert (tmp_path / "log").read_bytes() == b"\n$ true '\xff'\n"
