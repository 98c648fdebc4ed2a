"""Atomic writes of files and folders, free disk space, messages for failed writes."""

import os
import shutil
import tempfile

import pytest
from training_runs import killed_in, names

from infra import files
from infra.errors import InputError
from infra.files import (
    begin_folder,
    check_folder,
    finish_folder,
    kind_of_file,
    remove,
    replacing,
    set_aside,
    write_text,
    writing,
)
from infra.ownership import OWNER, owning

# ---- atomic writes ----


def test_a_half_removed_folder_does_not_look_complete(tmp_path):
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "file").write_text("")
    with killed_in(shutil, "rmtree"):
        remove(folder)
    assert names(tmp_path) == []
    remove(next(tmp_path.iterdir()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, "as it was"])
def test_a_failed_write_leaves_the_file_as_before(tmp_path, before):
    path = tmp_path / "new folder" / "a.json"
    if before:
        path.parent.mkdir()
        path.write_text(before)
    for failure in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), replacing(path) as unfinished:
            unfinished.write_text("half of i")
            raise failure
        assert [file.read_text() for file in path.parent.iterdir()] == ([before] if before else [])
    with replacing(path) as unfinished:
        unfinished.write_text("all of it")
        assert (path.read_text() if path.exists() else None) == before  # not one moment of less
    assert [file.read_text() for file in path.parent.iterdir()] == ["all of it"]


def test_a_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """So are its files. The remains of an interrupted save and the earlier folder of that name are gone."""
    folder, synced = tmp_path / "step_000002", []
    for made in (folder, tmp_path / "step_000002.unfinished"):
        made.mkdir()
        (made / "earlier").touch()
    unfinished = begin_folder(folder)
    (unfinished / "sub").mkdir()
    (unfinished / "sub" / "weights").touch()
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path, (folder / "earlier").exists())))
    finish_folder(folder)
    assert sorted(synced) == [(path, True) for path in (unfinished, unfinished / "sub", unfinished / "sub" / "weights")]
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "step_000002", "step_000002/sub", "step_000002/sub/weights",
    ]  # fmt: skip


def test_nothing_is_written_once_another_job_has_taken_over(tmp_path):
    """A failed write is then no fault of the disk."""
    folder, file, theirs = tmp_path / "step_000002", tmp_path / "a.json", '{"token": "of another job"}'
    folder.mkdir()
    file.write_text("theirs")
    (begin_folder(folder) / "weights").touch()
    with owning(tmp_path / OWNER):
        (tmp_path / OWNER).write_text(theirs)
        before = set(tmp_path.rglob("*"))
        for write in (
            lambda: begin_folder(folder),
            lambda: finish_folder(folder),
            lambda: set_aside(file),
            lambda: write_text(file, "mine"),
            lambda: writing(file, str).__enter__(),
        ):
            with pytest.raises(InputError, match="owner.json: another job has taken over"):
                write()
        assert set(tmp_path.rglob("*")) == before and file.read_text() == "theirs"
    with owning(tmp_path / OWNER), pytest.raises(InputError, match="taken over"), writing(file, str):
        (tmp_path / OWNER).write_text(theirs)
        raise OSError("No such file or directory")


def test_files_set_aside_are_kept(tmp_path):
    path = tmp_path / "p.json"
    for i, name in enumerate(("p.json.old", "p.json.old_2", "p.json.old_3")):
        path.write_text(str(i))
        assert set_aside(path) == tmp_path / name and not path.exists()
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == ["0", "1", "2"]


def test_kind_of_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    made = {
        tmp_path: "folder",
        tmp_path / "pipe": "named pipe",
        tmp_path / "link": "broken link",
        "/dev/null": "device",
    }
    assert [kind_of_file(str(path)) for path in made] == list(made.values())


# ---- the disk ----


def test_a_folder_is_tried_and_not_made(tmp_path):
    """The nearest existing folder above it decides."""
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/b: cannot be written .*--out"):
        check_folder(tmp_path / "file" / "b")
    with pytest.raises(InputError, match="^mine.json: cannot be written"):
        check_folder(tmp_path / "file", out="mine.json")


def test_a_full_disk_is_found_before_the_first_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir, buffering: open("/dev/full", "wb", buffering))
    with pytest.raises(InputError, match="run: cannot be written .No space left on device.; .* --out"):
        check_folder(tmp_path / "run")
