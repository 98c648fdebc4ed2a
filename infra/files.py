"""Atomic writes of files and folders, free disk space, messages for failed writes.

Files and folders are written under a name that ends in ".unfinished" and renamed when complete. If a process is killed,
readers ignore what it left under such a name, and a resumed run removes it.
"""

import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from infra.errors import InputError
from infra.ownership import require_ownership

UNFINISHED = ".unfinished"

# ---- atomic writes ----


def remove(path: Path) -> None:
    """Remove a file or folder. It is renamed first, so a half-removed folder never looks complete."""
    require_ownership()
    if not path.name.endswith(UNFINISHED):
        path = path.rename(path.with_name(f"{path.name}.removed{UNFINISHED}"))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def begin_folder(folder: Path) -> Path:
    """Make an empty folder for the files of `folder`. finish_folder renames it to `folder`."""
    require_ownership()
    unfinished = folder.with_name(folder.name + UNFINISHED)
    if unfinished.exists():
        remove(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(folder: Path) -> None:
    """Rename the folder of begin_folder to `folder`. Replaces an existing one."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    require_ownership()
    if folder.exists():
        remove(folder)
    unfinished.rename(folder)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power failure cannot leave a complete name on lost data."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as unfinished:` write the file `unfinished`, which then replaces `path`.

    Makes the folder if it is missing. If writing fails, `path` stays as it was and `unfinished` is removed.
    """
    require_ownership()
    unfinished = path.with_name(path.name + UNFINISHED)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file with `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")  # for paths that are not UTF-8


def first_free(name: Callable[[int], Path]) -> Path:
    """Return the first of name(1), name(2), ... that does not exist."""
    return next(path for path in map(name, itertools.count(1)) if not path.exists())


def set_aside(path: Path) -> Path:
    """Rename a file to NAME.old, or if that exists to NAME.old_2, NAME.old_3, ... Returns the new path."""
    require_ownership()
    return path.rename(first_free(lambda n: path.with_name(f"{path.name}.old" + (f"_{n}" if n > 1 else ""))))


def kind_of_file(path: str) -> str:
    """Name what a path is that is not a regular file: "folder", "named pipe", "broken link" or "device"."""
    if os.path.isdir(path):
        return "folder"
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    return "named pipe" if stat.S_ISFIFO(os.stat(path).st_mode) else "device"


# ---- the disk ----


def free_bytes(out: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(out)).free


def check_folder(folder: Path, out: Path | None = None) -> None:
    """Raise InputError if a folder cannot be written to. The folder need not exist yet, and is not made.

    The message names the file `out` that will be written to the folder, or else the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder), buffering=0) as file:
            file.write(bytes(4096))  # a full disk still makes an empty file
    except OSError as error:
        raise InputError(
            f"{out or folder}: cannot be written ({error.strerror}); give another path with --out"
        ) from None


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


@contextmanager
def writing(path: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Inside `with`, turn a failure to write `path` into an InputError, with the free space and the remedy."""
    require_ownership()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        require_ownership()  # another job may have removed an unfinished folder
        reason, free = " ".join(str(error).split())[:300], free_bytes(path.parent) / 1e9
        message = f"{path}: could not be written ({reason}), with {free:.2f} GB free; {remedy()}"
        raise InputError(message) from None
