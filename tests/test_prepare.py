"""prepare.py: parquet files with the schemas of the Hub become clips and question files that the loader reads."""

import datetime
import decimal
import errno
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from forked import ROOT, another_owner

import prepare
from data import load_questions
from infra import files
from infra.audio import load_audio
from infra.errors import InputError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

AUDIO = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})  # as datasets.Audio is stored


def clip(number=0, form="WAV", channels=1):
    """Return the bytes of an audio file. Each number gives another tone."""
    file, times = io.BytesIO(), np.arange(1600) / 16_000
    tone = 0.5 * np.sin(2 * np.pi * (300 + 50 * number) * times)
    soundfile.write(file, np.stack([tone] * channels, axis=1), 16_000, format=form)
    return file.getvalue()


def sound(number=0, path=None, **kwargs):
    return {"bytes": clip(number, **kwargs), "path": path}


def write(path, rows, rows_per_group=1000, **types):
    """Write a parquet file. types: of the columns that pyarrow would guess wrong."""
    guessed = pyarrow.Table.from_pylist(rows)
    known = {"audio": AUDIO, "context": AUDIO} | types
    schema = pyarrow.schema([(field.name, known.get(field.name, field.type)) for field in guessed.schema])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def questions_of(*sounds):
    """Return rows with these sounds."""
    row = {"question": "What?", "choices": ["a dog", "a bell"], "answer": "a bell"}
    return [row | {"audio": sound} for sound in sounds]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the command with --out `out`, and returns the records of the question file."""

    def run(*argv, out=tmp_path / "out"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv), "--out", str(out)])
        prepare.main()
        return [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]

    return run


def names(folder):
    return sorted(os.listdir(folder))


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the schemas of the Hub ----

MMAU_ATTRIBUTES = {"id": "m1", "task": "sound", "category": "Reasoning", "sub-category": "Scenes", "difficulty": "easy"}
SCHEMAS = {
    "AVQA": ({"audio": sound(), "question": "What is in the video?\nChoices:\nA. a dog\nB. a bell",
              "answer": "B. a bell"},
             {"question": "What is in the audio?"}),
    "MMAU": ({"context": sound(form="MP3"), "instruction": "What?", "choices": ["(A) a dog", "(B) a bell"],
              "answer": "(B) a bell", "other_attributes": json.dumps(MMAU_ATTRIBUTES)},
             {"id": "m1", "task": "sound", "sub_category": "Scenes", "difficulty": "easy"}),
    "gijs/mmau-processed": ({"id": "g1", "audio": sound(path="g1.wav"), "question": "What?\nA. a dog\nB. a bell",
                             "question_only": "What?", "choices": "A. a dog\nB. a bell", "answer": "B. a bell",
                             "file_name": "./test-mini-audios/g1.wav", "domain": "speech"},
                            {"id": "g1", "task": "speech"}),
    "lmms-lab/mmau": ({"id": "l1", "audio_id": "./test-mini-audios/l1.wav", "audio": sound(), "question": "What?",
                       "choices": '["a dog", "a bell"]', "answer": "a bell", "task": "music", "difficulty": "hard"},
                      {"id": "l1", "task": "music", "difficulty": "hard"}),
    "MMSU": ({"id": "s1", "audio": sound(path="s1.wav"), "question": "What?", "choice_a": "a dog", "choice_b": "a bell",
              "choice_c": "", "choice_d": None, "answer_gt": "a bell", "category": "Perception"},
             {"id": "s1", "task": "Perception"}),
}  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_loader_reads_what_is_written(schema, run, tmp_path):
    row, expected = SCHEMAS[schema]
    run(write(tmp_path / "test.parquet", [row], choice_d=pyarrow.string()))
    (question,) = load_questions(str(tmp_path / "out" / "questions.jsonl"))
    assert question.choices == ["a dog", "a bell"] and question.answer == "a bell"
    found = {name: getattr(question, name) for name in expected}
    assert found == expected
    assert Path(question.audio).read_bytes() == (row.get("audio") or row["context"])["bytes"]


def test_clips_beside_the_parquet_file(run, tmp_path, capsys):
    """As in MMAU-Pro: audio_path is a list, and stays one."""
    for i in (1, 2):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.wav").write_bytes(clip(i))
    paths = [["data/1.wav"], ["data/1.wav", "data/2.wav"], ["data/3.wav"], [], None, ["data\\2.wav"]]
    row = {"question": "What?", "choices": ["a dog", "a bell"], "answer": "a bell"}
    source = write(tmp_path / "test.parquet", [row | {"id": f"p{i}", "audio_path": paths[i]} for i in range(6)])
    records = run(source)
    assert [record["audio_path"] for record in records] == [["clips/1.wav"], ["clips/2.wav"]]
    assert snapshot(tmp_path / "out" / "clips") == {"1.wav": clip(1), "2.wav": clip(2)}
    printed = capsys.readouterr().out
    assert f"1 left out: several clips\n  {source}, row 2\n" in printed
    assert f"1 left out: no bytes, and no file of that name beside the parquet file\n  {source}, row 3\n" in printed
    assert f"2 left out: no sound\n  {source}, row 4\n  {source}, row 5\n" in printed
    assert "2 questions, 2 clips\n1 left out" in printed and str(tmp_path / "out" / "questions.jsonl") in printed
    assert [question.id for question in load_questions(str(tmp_path / "out" / "questions.jsonl"))] == ["p0", "p5"]


def test_all_columns_become_json(run, tmp_path):
    values = {
        "id": 7, "none": None, "texts": ["ä", None], "nested": {"a": [{"b": math.nan}], "c": b"\xff"}, "inf": math.inf,
        "day": datetime.date(2026, 1, 2), "price": decimal.Decimal("1.50"), "ok": True, "share": 0.5,
        "at": np.datetime64("2026-01-02T03:04:05.000000001"), "picture": {"bytes": b"PNG", "path": "x.png"},
        "other_attributes": '{"task": "sound", "none": 1, "id": 8, "half": "\\ud800", "nan": NaN}',
    }  # fmt: skip
    (record,) = run(write(tmp_path / "x.parquet", [values | questions_of(sound())[0]], at=pyarrow.timestamp("ns")))
    expected = values | {
        "nested": {"a": [{"b": None}], "c": "\\xff"}, "inf": None, "day": "2026-01-02", "price": "1.50", "none": 1,
        "at": "2026-01-02 03:04:05.000000001", "task": "sound", "half": "\ud800", "nan": None,
        "audio_path": "clips/7.wav", "question": "What?", "choices": ["a dog", "a bell"], "answer": "a bell",
    }  # fmt: skip
    assert expected.pop("picture") and record == expected


def test_attributes_that_are_no_json(run, tmp_path):
    rows = [row | {"other_attributes": text} for row, text in zip(questions_of(sound(), sound()), ("{'id", "[1]"))]
    assert [record["other_attributes"] for record in run(write(tmp_path / "x.parquet", rows))] == ["{'id", "[1]"]


def test_lists_of_clips(run, tmp_path, capsys):
    rows = questions_of([sound(1, "a.wav")], [sound(1, "a.wav"), sound(2, "b.wav")], [], [sound(1)], [{"bytes": b""}])
    rows = [{"audio_path": None} | row for row in rows]
    rows[3]["audio_path"] = ["a.wav", "b.wav"]
    texts = pyarrow.list_(pyarrow.string())
    assert len(run(write(tmp_path / "x.parquet", rows, audio=pyarrow.list_(AUDIO), audio_path=texts))) == 1
    printed = capsys.readouterr().out
    assert "2 left out: several clips" in printed and "2 left out: no sound" in printed


# ---- clips ----


def test_clips_stay_as_they_are(run, tmp_path):
    """A suffix is added only if there is none. All are read by infra.audio, which looks at the content."""
    made = {
        None: ("x_1.wav", sound()),
        "": ("x_2.flac", sound(form="FLAC")),
        "a": ("a.ogg", sound(form="OGG")),
        "b.5": ("b.5.mp3", sound(form="MP3")),
        "mp3.wav": ("mp3.wav", sound(1, form="MP3")),
        "dir/six.wav": ("six.wav", sound(channels=6)),
        "c": ("c.bin", {"bytes": b"something", "path": None}),
    }
    rows = questions_of(*[content | {"path": path} for path, (_, content) in made.items()])
    records = run(write(tmp_path / "x.parquet", rows))
    clips = snapshot(tmp_path / "out" / "clips")
    assert clips == {name: content["bytes"] for name, content in made.values()}
    assert [record["audio_path"] for record in records] == [f"clips/{name}" for name, _ in made.values()]
    for name in set(clips) - {"c.bin"}:
        assert len(load_audio(str(tmp_path / "out" / "clips" / name))) >= 1600


def test_a_name_is_given_once(run, tmp_path):
    """Equal clips share a file. Names that differ in case or in the form of an accent count as one, as on macOS."""
    paths = ["a.wav", "x/a.wav", "A.wav", "a.wav", "\u00e9.wav", "e\u0301.wav", "a.wav"]
    numbers = [0, 0, 1, 2, 3, 4, 1]
    records = run(write(tmp_path / "x.parquet", questions_of(*map(sound, numbers, paths))))
    written = [record["audio_path"].removeprefix("clips/") for record in records]
    assert written[0] == written[1] == "a.wav"
    clips = {(unicodedata.normalize("NFC", name).casefold(), number) for name, number in zip(written, numbers)}
    assert len(clips) == len(dict(clips)) == 5
    assert [(tmp_path / "out" / "clips" / name).read_bytes() for name in written] == [
        clip(number) for number in numbers
    ]
    digests = {name.casefold(): b"of another clip" for name in written}  # the name with a hash is not free, either
    assert prepare.write_clip(tmp_path, "a.wav", clip(2), digests) not in written


HOSTILE = ["../x.wav", "/etc/x.wav", "..", ".", "/", "\\..\\y.wav", "C:\\y.wav", "a\0b.wav", ".hidden", " ",
           "ü" * 300 + ".wav", "a" * 300, "....wav", "x/../..", "~", "-rf", "x\n.wav", "\u202e.wav", "a/"]  # fmt: skip


def test_no_name_leaves_the_folder_of_clips(run, tmp_path):
    before = set(tmp_path.rglob("*"))
    source = write(tmp_path / "x.parquet", questions_of(*[sound(i, path) for i, path in enumerate(HOSTILE)]))
    records = run(source)
    new = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before - {source}}
    assert new == {"out", "out/clips", "out/source.json", "out/questions.jsonl"} | {
        f"out/{record['audio_path']}" for record in records
    }
    questions = load_questions(str(tmp_path / "out" / "questions.jsonl"))
    assert [Path(question.audio).read_bytes() for question in questions] == [clip(i) for i in range(len(HOSTILE))]
    for name in names(tmp_path / "out" / "clips"):
        assert name.isprintable() and not name.startswith(".")


def test_no_path_without_bytes_leaves_the_folder_of_the_source(run, tmp_path, capsys):
    (tmp_path / "secret").write_bytes(clip())
    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / "pipe")
    paths = [str(tmp_path / "secret"), "../secret", "a/..\\..\\secret", "pipe", "a\0b", ".", "x" * 5000]
    with pytest.raises(InputError, match="no row has a usable clip\n7 left out: no bytes"):
        run(write(tmp_path / "source" / "x.parquet", questions_of(*[{"bytes": None, "path": path} for path in paths])))
    assert names(tmp_path / "out" / "clips") == []


# ---- interruptions ----


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with two files of 7 rows in groups of 2. Two rows have one clip, one has none."""
    folder = tmp_path_factory.mktemp("several")
    for part in range(2):
        sounds = [sound(part + i // 2, f"{i}.wav") for i in range(6)] + [{"bytes": None, "path": None}]
        write(folder / "data" / f"train-0000{part}-of-00002.parquet", questions_of(*sounds), rows_per_group=2)
    return folder


@pytest.mark.parametrize("stop", range(1, 13))
def test_killed_at_any_clip(stop, several, run, tmp_path, monkeypatch):
    """A clip is half written then, or after a power failure has zeros. The same command repairs it, and it alone."""
    run(several, out=tmp_path / "undisturbed")
    left, write_bytes = [stop], Path.write_bytes

    def killed(path, content):
        left[0] -= 1
        half = content[: len(content) // 2]
        write_bytes(path, content if left[0] else half.ljust(len(content), b"\0") if stop % 2 else half)
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # kill -9: nothing is cleaned up
        distinct = len(names(tmp_path / "undisturbed" / "clips"))
        if stop > distinct:
            return
        with pytest.raises(KeyboardInterrupt):
            run(several)
    assert not (tmp_path / "out" / "questions.jsonl").exists()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "clips").iterdir()}
    run(several)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")
    assert sum(path.stat().st_mtime_ns == time for path, time in written.items()) == len(written) - 1


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signals(signal, several, run, tmp_path):
    """A real process ends with one line, and its successor continues."""
    driver = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
sys.path.insert(0, {str(ROOT)!r})
from infra import files
left, writing = [3], files.writing
def interrupted(*args):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.{signal})
    return writing(*args)
files.writing = interrupted
sys.argv = ["prepare.py", {str(several)!r}, "--out", {str(tmp_path / "out")!r}]
runpy.run_path({str(ROOT / "prepare.py")!r}, run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True)
    assert ended.returncode == (-9 if signal == "SIGKILL" else 1) and "Traceback" not in ended.stderr
    last = "prepare.py: interrupted; the same command writes the missing clips\n"
    assert ended.stderr.endswith(last) or signal == "SIGKILL"
    left = set(names(tmp_path / "out")) - {"owner.json", "questions.jsonl.unfinished"}
    assert left == {"source.json", "clips"} and len(names(tmp_path / "out" / "clips")) == 2
    assert run(several) == run(several, out=tmp_path / "undisturbed")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "undisturbed")


def test_a_finished_folder(several, run, tmp_path, capsys, monkeypatch):
    synced = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sync", lambda: synced.append("questions.jsonl" not in names(tmp_path / "out")))
        records = run(several)
    assert len(records) == 12 and synced == [True]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", None)
        run(several)
    printed = capsys.readouterr().out
    assert "already there" in printed
    assert printed.count(f"python grpo_aqa.py --model Qwen/Qwen2-Audio-7B-Instruct --data {tmp_path}/out/q") == 2
    other = write(tmp_path / "other.parquet", questions_of(sound(9, "0.wav")))
    with pytest.raises(InputError, match="questions.jsonl: is from other parquet files; name a new folder with --out"):
        run(other)
    (tmp_path / "out" / "questions.jsonl").unlink()
    assert len(run(other)) == 1 and (tmp_path / "out" / "clips" / "0.wav").read_bytes() == clip(9)
    (tmp_path / "out" / "questions.jsonl").unlink()
    assert run(several) == records and (tmp_path / "out" / "clips" / "0.wav").read_bytes() == clip(0)


def test_a_folder_with_other_files_is_refused(several, run, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("mine", "owner.json", "source.json.unfinished"):  # the last two are left after a kill
        (tmp_path / "out" / name).touch()
    with pytest.raises(InputError, match="out: is not empty; name a new folder with --out"):
        run(several)
    (tmp_path / "out" / "mine").unlink()
    assert len(run(several)) == 12


def test_two_jobs_with_one_out(several, run, tmp_path):
    (tmp_path / "out").mkdir()
    with another_owner(tmp_path / "out" / "owner.json"), pytest.raises(InputError, match="another job .process"):
        run(several)
    assert names(tmp_path / "out") == []


# ---- splits ----


def make_files(folder, *paths):
    for i, path in enumerate(paths):
        write(folder / path, questions_of(sound(i, f"{i}.wav")))
    return folder


def test_splits(run, tmp_path):
    folder = make_files(
        tmp_path / "hub", "data/test-00000-of-00001.parquet", "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002-0123456789abcdef.parquet", "en/train/0000.parquet", "en/train/0001.parquet",
    )  # fmt: skip
    (folder / ".cache").mkdir()  # of hf download
    (folder / ".cache" / "x.parquet.metadata").touch()
    (folder / "folder.parquet").mkdir()
    cases = {None: "3 splits", "train": "2 splits named train", "valid": "0 splits named valid"}
    for split, found in cases.items():
        with pytest.raises(InputError, match=f"hub: {found}; choose one with --split: .*data/test, data/train, en/tr"):
            run(folder, *(["--split", split] if split else []))
    for split, clips in {"test": [0], "data/train": [2, 1], "en/train": [3, 4]}.items():
        records = run(folder, "--split", split, out=tmp_path / split.replace("/", "_"))
        assert [record["audio_path"] for record in records] == [f"clips/{i}.wav" for i in clips]
    shards = [folder / "en" / "train" / "0001.parquet", folder / "en" / "train" / "0000.parquet"]
    assert [record["audio_path"] for record in run(*shards)] == ["clips/4.wav", "clips/3.wav"]
    with pytest.raises(InputError, match="2 splits; choose one with --split: test, train"):
        run(*sorted((folder / "data").glob("*")), out=tmp_path / "mixed")


def test_an_incomplete_download(run, tmp_path):
    folder = make_files(tmp_path / "hub", "data/train-00000-of-00012.parquet", "data/train-00003-of-00012.parquet")
    with pytest.raises(InputError, match="hub: only 2 of 12 files are there; run hf download again"):
        run(folder)
    assert len(run(folder / "data" / "train-00003-of-00012.parquet")) == 1  # to try one is fine


# ---- bad input ----


def refused(argv):
    """Run the command in a process. Return its last line, after checking that it is one line and leaves no file."""
    ended = subprocess.run([sys.executable, ROOT / "prepare.py", *argv], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def test_bad_sources(run, tmp_path):
    (tmp_path / "text.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    whole = write(tmp_path / "whole.parquet", questions_of(sound())).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-100])
    write(tmp_path / "silent.parquet", [{"question": "What?", "audio": {"array": [0.0], "rate": 16_000}}],
          audio=pyarrow.struct({"array": pyarrow.list_(pyarrow.float64()), "rate": pyarrow.int64()}))  # fmt: skip
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")  # reading it would wait
    for name, message in {
        "text.parquet": "text.parquet: cannot be read as parquet (.*magic bytes.*); download it again",
        "cut.parquet": "cut.parquet: cannot be read as parquet",
        "silent.parquet": "silent.parquet: has no sound, a column of bytes and path; found question, audio",
        "empty": "empty: no .parquet file; give the folder that hf download made",
        "missing": "missing: no such file or folder",
        "pipe.parquet": "pipe.parquet: no such file or folder",
    }.items():
        with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
            run(tmp_path / name)
        assert not (tmp_path / "out").exists()
    line = refused([tmp_path / "missing", "--out", tmp_path / "out"])
    assert line == f"prepare.py: error: {tmp_path / 'missing'}: no such file or folder\n"


def test_damaged_files(run, tmp_path):
    """With any bytes changed, the file is refused in one line or read: pyarrow has no other end."""
    whole = write(tmp_path / "x.parquet", questions_of(*map(sound, range(4))), rows_per_group=2).read_bytes()
    source, rng, refusals = tmp_path / "damaged.parquet", random.Random(0), 0
    for i in range(40):
        damaged = bytearray(whole)
        for at in rng.sample(range(len(whole)), 1 + i):
            damaged[at] ^= 1 << rng.randrange(8)
        source.write_bytes(damaged)
        try:
            run(source, out=tmp_path / str(i))
        except InputError as error:
            assert str(error).startswith((f"{source}: ", f"{tmp_path / str(i)}: no row has a usable clip")), error
            assert "questions.jsonl" not in names(tmp_path / str(i)) if (tmp_path / str(i)).exists() else True
            refusals += 1
    assert refusals > 5


def test_without_pyarrow(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "pyarrow", None)
    with pytest.raises(InputError, match="parquet files need the package pyarrow: pip install pyarrow"):
        run(tmp_path)


def test_too_little_space(several, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "free_bytes", lambda path: 20_000)
        with pytest.raises(InputError, match=r"out: the clips take 0.00 GB, but 0.00 GB are free"):
            run(several)
        assert not (tmp_path / "out").exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # a clip has 3,244 bytes
    try:
        with pytest.raises(InputError, match=r"clips/0.wav: could not be written \(.*too large.*free some space"):
            run(several)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "questions.jsonl" not in names(tmp_path / "out")
    assert len(run(several)) == 12
    (tmp_path / "out" / "questions.jsonl").unlink()
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 30_000)
    assert len(run(several)) == 12  # all clips are there


def test_clips_of_many_rows_need_little_space(run, tmp_path, monkeypatch):
    source = write(tmp_path / "x.parquet", questions_of(*[sound(0, "a.wav")] * 200), rows_per_group=2)
    monkeypatch.setattr(prepare, "free_bytes", lambda path: 30_000)
    assert source.stat().st_size > 300_000 and len(run(source)) == 200


def test_a_folder_that_cannot_be_written(several, run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/out: cannot be written .Not a directory"):
        run(several, out=tmp_path / "file" / "out")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        run(several)
    assert not (tmp_path / "out").exists()


# ---- memory ----


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 80 MB with two row groups in pages of 8 MB is read with memory for a few pages."""
    rng = np.random.default_rng(0)
    parts = [questions_of(*[{"bytes": rng.bytes(1_000_000), "path": f"{i}.wav"} for i in range(8)]) for _ in range(10)]
    table = pyarrow.concat_tables(map(pyarrow.Table.from_pylist, parts))
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=40, use_dictionary=False)
    driver = """
import prepare, pyarrow, sys
prepare.main()
print(pyarrow.default_memory_pool().max_memory())
"""
    argv = [sys.executable, "-c", driver, tmp_path / "x.parquet", "--out", tmp_path / "out"]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert len(names(tmp_path / "out" / "clips")) == 80
    assert 8e6 < int(ended.stdout.split()[-1]) < 50e6, ended.stdout
