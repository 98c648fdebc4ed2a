"""Files and folders that are complete or not there."""

import os
import shutil
from types import SimpleNamespace

import pytest
from training_runs import killed_in, names

import files
from errors import InputError
from files import (
    begin_folder,
    check_folder,
    finish_folder,
    kind_of_file,
    remove,
    replacing,
    set_aside,
    what_is_saved,
    writing_run,
)

# ---- complete or not there ----


def test_step_folders_are_the_complete_ones_by_step(tmp_path):
    for name in ("step_1000000", "step_999999", "step_000002.unfinished", "step_000003.removed.unfinished", "step_x"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["step_999999", "step_1000000"]


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
def test_a_file_that_fails_to_be_written_is_as_before(tmp_path, before):
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


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """With all that is in it; what an interrupted save has left is gone, and so is the folder that had the name."""
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


def test_what_is_set_aside_stays(tmp_path):
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
    """The nearest above it that exists decides."""
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/b: cannot be written .*--out"):
        check_folder(tmp_path / "file" / "b")
    with pytest.raises(InputError, match="^mine.json: cannot be written"):
        check_folder(tmp_path / "file", out="mine.json")


def test_what_fails_to_be_written_is_said_with_what_is_safe(tmp_path, monkeypatch):
    """The file, the reason in one line, the room on the disk, the newest checkpoint, and where the run would go on."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_230_000_000))

    def said():
        with pytest.raises(InputError) as error, writing_run(tmp_path / "x.pt", tmp_path):
            raise RuntimeError("failed\n  at position 7")
        return str(error.value)

    assert said().startswith(
        f"{tmp_path}/x.pt: could not be written (failed at position 7), with 1.23 GB free; there is"
    )
    assert what_is_saved(tmp_path) == "there is no checkpoint yet"
    (tmp_path / "step_000100").mkdir()
    assert what_is_saved(tmp_path) == f"the last checkpoint is {tmp_path}/step_000100"
    (tmp_path / "resume" / "step_000120").mkdir(parents=True)
    assert f"the last checkpoint is {tmp_path}/step_000100, and --resume continues after step 120; see to" in said()
