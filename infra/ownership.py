"""One owner for each run folder, predictions file, table and new model, so that two jobs never write to the same place.

A job owns the folder OUT if it holds a lock on OUT/owner.json, and the file or new folder NAME if it holds a lock on
NAME.owner.json. It writes its host, its process id and a random token into this owner file. A second job is refused.
The system drops the lock of a dead process, so the owner file of a dead job blocks nobody.

Some network disks have no locks, or lose them. There the second job writes its own token into the owner file. The first
job reads the file before each write, finds the other token, and stops.
"""

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from infra.errors import InputError

OWNER = "owner.json"
LEASE = 120  # seconds; servers keep the locks of a dead host for about 90
_tokens: dict[Path, str] = {}  # of this process, by owner file


@contextmanager
def owning(file: Path, patience: int = 0) -> Iterator[None]:
    """Inside `with`, lock an owner file and write this job's name into it. One rank of a job calls this for all ranks.

    Makes the file's folder if it is missing, and removes it at the end if it is empty. If another job holds the lock,
    waits `patience` seconds for its end, and at least LEASE if its host is another one, which may be dead. Raises
    InputError if that job still holds the lock then.
    """
    require_ownership()
    new_folder = not file.parent.exists()
    descriptor, token = _lock(file, patience), uuid.uuid4().hex
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "token": token}
    text = json.dumps(owner).ljust(1000).encode()
    try:
        # All texts have one length: if two jobs write at once, the file holds one of the texts, not parts of both.
        os.ftruncate(descriptor, len(text))
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)
        _tokens[file] = token
        yield
    finally:
        _tokens.pop(file, None)
        if _read(file).get("token") == token:
            file.unlink()
        os.close(descriptor)  # drops the lock
        if new_folder:
            with suppress(OSError):  # not empty
                file.parent.rmdir()


def _lock(file: Path, patience: int) -> int:
    """Open and lock an owner file; only open it if its disk has no locks. Returns the descriptor. Raises InputError."""
    waited = 0
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)  # the previous owner may have removed it
        try:
            descriptor, free = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), True
        except PermissionError:
            fault = f"{_name(_read(file))} of another user writes there; wait for it, or remove this file"
            raise InputError(f"{file}: {fault}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # no locks
            pass
        with suppress(FileNotFoundError):
            if free and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        os.close(descriptor)
        if free:  # the previous owner has just removed this file: open the new one
            continue
        owner = _read(file)
        if waited >= (patience if owner.get("host") == socket.gethostname() else max(patience, LEASE)):
            raise InputError(
                f"{file}: {_name(owner)} writes there; wait for it, stop it, or name another path with --out "
                "(if you remove this file, that job stops before its next write)"
            )
        if not waited:
            print(f"{file}: waiting for {_name(owner)}", flush=True)
        time.sleep(1)
        waited += 1


def owner_file(path: str | Path) -> Path:
    """Return the owner file beside a file or folder that a job makes as a whole."""
    return Path(f"{Path(path)}.{OWNER}")  # Path drops a slash at the end


def require_ownership() -> None:
    """Raise InputError if another job has taken over an owner file of this process. Call this before each write.

    An unreadable owner file does not stop this job. A missing one does: another job may have written there meanwhile.
    """
    for file, token in _tokens.items():
        owner = _read(file)
        if owner.get("token", token) != token:
            raise InputError(f"{file}: {_name(owner)} has taken over; this job stops, so that nothing is mixed")
        try:
            os.stat(file)
        except FileNotFoundError:
            fault = "was removed or moved; this job stops, since another job may have written there"
            raise InputError(f"{file}: {fault}") from None
        except OSError:  # a network disk is out of reach: the write itself will say so
            pass


def _read(file: Path) -> dict:
    """Read an owner file. Returns an empty dict if it is missing or damaged."""
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _name(owner: dict) -> str:
    """Name a job by the content of its owner file."""
    if not {"host", "process", "since"} <= owner.keys():
        return "another job"
    return f"another job (process {owner['process']} on {owner['host']}, since {owner['since']})"
