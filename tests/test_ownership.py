"""One owner for each place: a second job is refused, a dead owner blocks nobody, without locks the newer job wins."""

import errno
import fcntl
import json
import os
import re
import socket
import time
from contextlib import ExitStack

import pytest
from forked import another_owner

from infra import ownership
from infra.errors import InputError
from infra.ownership import OWNER, owning, require_ownership


def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / OWNER


def test_a_second_job_is_refused_until_the_first_ends(file, tmp_path, monkeypatch):
    """One line names the file, the job, since when it runs, and what to do. Other names of the folder do not help."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("not on the same host"))
    with another_owner(file) as job:
        written = file.read_bytes()
        (tmp_path / "link").symlink_to("run")
        line = rf"{re.escape(f'(process {job.pid} on {socket.gethostname()}, since ')}\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        for name in (file, tmp_path / "link" / OWNER):
            with pytest.raises(InputError, match=f"^{name}: another job {line}.* writes there; wait for it, stop it"):
                with owning(file.parent / f"p.json.{OWNER}"), owning(name):
                    pytest.fail("two owners")
        assert file.read_bytes() == written and [path.name for path in file.parent.iterdir()] == [OWNER]
        with owning(tmp_path / "other" / OWNER):
            job.communicate()
            with owning(file):
                assert json.loads(file.read_bytes())["process"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("left", [None, b"", b"[" * 100_000])
def test_a_killed_owner_blocks_nobody(file, left):
    """Even if its file is damaged, and if a process that it started still runs."""
    with another_owner(file) as job:
        job.kill()
        job.wait()
        assert file.exists()
        if left is not None:
            file.write_bytes(left)
        with owning(file):
            require_ownership()
            assert json.loads(file.read_bytes())["process"] == os.getpid()
    assert not file.exists()


def test_folders_are_removed_if_they_were_made_and_are_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    open_files = len(os.listdir("/proc/self/fd"))
    with owning(tmp_path / "mine" / OWNER), owning(tmp_path / "empty" / OWNER), owning(tmp_path / "used" / OWNER):
        (tmp_path / "used" / "p.json").touch()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"file", "mine", "used", "used/p.json"}
    with pytest.raises(OSError), owning(tmp_path / "new" / OWNER), owning(tmp_path / "file" / OWNER):
        pass
    assert not (tmp_path / "new").exists() and len(os.listdir("/proc/self/fd")) == open_files


# ---- waiting ----


@pytest.mark.parametrize("case", ["patience", "another host", "an unreadable file"])
def test_a_job_may_wait_for_another_one(file, case, monkeypatch, capsys):
    """A lock of another host may be of a dead job: network disks drop it after a while."""
    with another_owner(file) as job:
        owner = json.loads(file.read_bytes())
        if case != "patience":
            file.write_text(json.dumps(owner | {"host": "elsewhere"}) if case == "another host" else "")
        naps = []
        monkeypatch.setattr(time, "sleep", naps.append)
        with pytest.raises(InputError, match="another job"), owning(file, patience=2):
            pass
        assert len(naps) == (2 if case == "patience" else ownership.LEASE)
        assert capsys.readouterr().out.count(f"{file}: waiting for another job") == 1
        monkeypatch.setattr(time, "sleep", lambda seconds: job.communicate())
        with owning(file, patience=2):
            assert json.loads(file.read_bytes())["process"] == os.getpid()


def test_the_lock_is_on_the_file_that_has_the_name(file, monkeypatch):
    """The first owner may remove the file after the second one has opened it and before it locks it."""
    flock, removed = fcntl.flock, []

    def late(*args):
        if not removed:
            removed.append(file.unlink())
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    with owning(file), pytest.raises(BlockingIOError):
        flock(os.open(file, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- disks without locks ----


def test_without_locks_the_newer_job_wins(file, monkeypatch):
    """The older one stops, also if the newer one has come and gone. It leaves the newer one's file alone."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with owning(file):
        require_ownership()
        with another_owner(file, locks=False) as job:
            line = rf"^{file}: another job \(process {job.pid} on .* has taken over; this job stops, so that nothing is"
            for _ in range(2):
                with pytest.raises(InputError, match=line):
                    require_ownership()
            with pytest.raises(InputError, match=line), owning(file.parent / "more" / OWNER):
                pass
        assert not file.exists()
        with pytest.raises(InputError, match="was removed or moved; this job stops"):
            require_ownership()
    require_ownership()  # owns nothing any more

    with another_owner(file, locks=False), owning(file):
        require_ownership()
    with ExitStack() as newer:
        with owning(file):
            job = newer.enter_context(another_owner(file, locks=False))
        assert json.loads(file.read_bytes())["process"] == job.pid


def test_two_jobs_that_write_at_once_do_not_mix_their_texts(file, monkeypatch):
    """A job of a host with a long name writes its text just before one of a host with a short name."""
    truncate, other = os.ftruncate, ExitStack()

    def late(descriptor, size):
        truncate(descriptor, size)
        if socket.gethostname() == "h":
            monkeypatch.setattr(socket, "gethostname", lambda: "h" * 200)
            other.enter_context(owning(file))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(socket, "gethostname", lambda: "h")
    monkeypatch.setattr(os, "ftruncate", late)
    with other, owning(file):
        assert json.loads(file.read_bytes())["host"] == "h"


def test_a_link_is_not_followed(tmp_path):
    """A run folder from elsewhere may have one."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / OWNER).symlink_to("mine")
    with pytest.raises(OSError, match=OWNER), owning(tmp_path / OWNER):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_cannot_be_read_is_no_other_owner(file):
    with owning(file):
        for damaged in (b"", b'{"token": "half of i', b"[3]", b"3", b"\xff", b"[" * 100_000):
            file.write_bytes(damaged)
            require_ownership()
