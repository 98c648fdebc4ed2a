"""Files and folders that are complete or not there, the room on their disk, and what is said when writing them fails.

They are written under a name that ends in ".unfinished" and renamed when complete. What a killed process leaves under
such a name is ignored, and removed when the run continues.
"""

import itertools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from errors import InputError

UNFINISHED = ".unfinished"

# ---- complete or not there ----


def step_folders(folder: Path) -> list[Path]:
    """The complete step_000100/, step_000200/, ... in a folder, by step."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove(path: Path) -> None:
    """Remove a file or folder, which looks incomplete from the first moment on."""
    if not path.name.endswith(UNFINISHED):
        path = path.rename(path.with_name(f"{path.name}.removed{UNFINISHED}"))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def begin_folder(folder: Path) -> Path:
    """A new empty folder for the files of `folder`, until finish_folder gives it its name."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    if unfinished.exists():
        remove(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def finish_folder(folder: Path) -> None:
    """Give begin_folder's folder its name, in place of one that has it already."""
    unfinished = folder.with_name(folder.name + UNFINISHED)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if folder.exists():
        remove(folder)
    unfinished.rename(folder)


def sync(path: Path) -> None:
    """Have a file or folder on the disk before it counts as complete: a machine may lose power, too."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as unfinished:` the file `unfinished` is written, and then takes the place of `path`, in a
    folder that is made if it is missing. Where writing fails, `path` is as it was before and nothing is beside it."""
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
    """Write a text file as `replacing` does."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths that are not UTF-8


def first_free(name: Callable[[int], Path]) -> Path:
    """The first of name(1), name(2), ... where nothing is yet."""
    return next(path for path in map(name, itertools.count(1)) if not path.exists())


def set_aside(path: Path) -> Path:
    """Rename a file to NAME.old, or where that is taken to NAME.old_2, NAME.old_3, ... Returns where it is now."""
    return path.rename(first_free(lambda n: path.with_name(f"{path.name}.old" + (f"_{n}" if n > 1 else ""))))


def kind_of_file(path: str) -> str:
    """What a path is that is not a regular file: "folder", "named pipe", "broken link" or "device"."""
    if os.path.isdir(path):
        return "folder"
    if os.path.islink(path) and not os.path.exists(path):
        return "broken link"
    return "named pipe" if stat.S_ISFIFO(os.stat(path).st_mode) else "device"


# ---- the disk ----


def free_bytes(out: Path) -> int:
    """The bytes that are free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(out)).free


def check_folder(folder: Path, out: Path | None = None) -> None:
    """Raise InputError if files could not be written to a folder, which need not exist yet and is not made. The message
    names `out`, what is to be written there, or else the folder."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        raise InputError(
            f"{out or folder}: cannot be written ({error.strerror}); name another place with --out"
        ) from None


def _existing(folder: Path) -> Path:
    """A folder, or else the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def what_is_saved(out: Path) -> str:
    """For messages: the run's newest checkpoint, and where --resume would go on."""
    checkpoints, states = step_folders(out), step_folders(out / "resume")
    last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return f"{last}, and --resume continues after step {step_of(states[-1])}" if states else last


@contextmanager
def writing(path: Path, remedy: Callable[[], str]) -> Iterator[None]:
    """Inside `with`, what fails to be written to `path` ends in an InputError, with what to do when there is room."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: of torch.save
        reason, free = " ".join(str(error).split())[:300], free_bytes(path.parent) / 1e9
        message = f"{path}: could not be written ({reason}), with {free:.2f} GB free; {remedy()}"
        raise InputError(message) from None


def writing_answers(path: Path):
    """`writing` of a file of an evaluation."""
    return writing(path, lambda: "see to the disk; the same command continues from what is answered")


def writing_run(path: Path, out: Path):
    """`writing` of a file of the run folder `out`."""
    return writing(path, lambda: f"{what_is_saved(out)}; see to the disk, then continue with --resume")
