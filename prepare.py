"""Make clips and a question file from a data set of the Hugging Face Hub, whose parquet files hold both.

    hf download gijs/avqa-processed --repo-type dataset --local-dir data/avqa-processed
    python prepare.py data/avqa-processed --split train --out data/avqa-hub

Clips are written as they are to DIR/clips/. DIR/questions.jsonl has all columns that hold no files, and the clip as
`audio_path`. It appears when everything is complete. After an interruption, the same command reads the parquet files
again and writes only the missing clips. The package pyarrow reads the files (pip install pyarrow).
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infra.errors import InputError, list_names, list_problems
from infra.files import UNFINISHED, check_folder, free_bytes, replacing, write_text, writing
from infra.flags import Parser
from infra.ownership import OWNER, owning
from questions.clips import leaves_folder
from questions.fields import LeftOut

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None

SHARD = r"(?:^|[-_])\d+(?:-of-(\d+))?(?:-[0-9a-f]{16})?$"  # the end of train-00000-of-00012.parquet, train/0000.parquet
SOURCE = "source.json"  # in DIR: the parquet files that its clips are from
BATCH = 2**23  # bytes that are read at once
FORMATS = {rb"RIFF....WAVE": ".wav", rb"fLaC": ".flac", rb"OggS": ".ogg", rb"ID3|\xff[\xe2-\xff]": ".mp3"}

# ---- parquet files ----


def find_files(sources: list[str], split: str | None) -> list[Path]:
    """Return the parquet files of one split, in order. sources: files, or folders of files. Raises InputError."""
    splits = defaultdict(list)
    for source in map(Path, sources):
        if not (source.is_dir() or source.is_file()):
            raise InputError(f"{source}: no such file or folder")
        for path in sorted(source.rglob("*.parquet")) if source.is_dir() else [source]:
            name = path.relative_to(source).parent / re.sub(SHARD, "", path.stem)
            if path.is_file():
                splits[name.as_posix()].append(path)
    if not splits:
        raise InputError(f"{', '.join(sources)}: no .parquet file; give the folder that hf download made")
    chosen = [files for name, files in splits.items() if not split or f"/{name}".endswith(f"/{split}")]
    if len(chosen) != 1:
        found = f"{len(chosen)} splits" + f" named {split}" * bool(split)
        raise InputError(f"{', '.join(sources)}: {found}; choose one with --split: {list_names(list(splits))}")
    announced = re.search(SHARD, chosen[0][0].stem)
    number = int(announced[1] or 0) if announced and os.path.isdir(sources[0]) else 0
    if len(chosen[0]) < number:
        raise InputError(f"{sources[0]}: only {len(chosen[0])} of {number} files are there; run hf download again")
    return chosen[0]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a parquet file. Inside `with`, each failure of pyarrow becomes an InputError."""
    try:
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:  # or it holds whole row groups
            yield file
    except Exception as error:  # pyarrow raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be read as parquet ({reason}); download it again") from None


def holds_files(kind: Any) -> bool:
    """Tell whether a column of this pyarrow type holds files: {bytes, path}, or lists of these."""
    kind = kind.value_type if pyarrow.types.is_list(kind) else kind
    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def sound_column(schema: Any) -> str | None:
    """Return the column that holds the clips, or None. Other columns of files may hold pictures."""
    names = [field.name for field in schema if holds_files(field.type)]
    return next((name for name in ("audio", "context", *names) if name in names), None)


def survey(path: Path) -> tuple[int, int]:
    """Return a parquet file's number of rows and the approximate size of its clips in bytes. Raises InputError."""
    with opened(path) as file:
        rows, sound, columns = file.metadata.num_rows, sound_column(file.schema_arrow), file.schema_arrow.names
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        named = file.read([f"{sound}.path"]).to_pylist()
    if not sound and "audio_path" not in columns:
        raise InputError(f"{path}: has no sound, a column of bytes and path; found {list_names(columns)}")
    paths = [(row.get(sound) or {}).get("path") for row in named]
    return rows, size * (len(set(paths) - {None}) + paths.count(None)) // max(1, rows)  # many rows may have one clip


def read_rows(path: Path) -> Iterator[tuple[dict, Any]]:
    """Yield each row of a parquet file, and its sound. Needs memory for up to three pages. Raises InputError."""
    with opened(path) as file:
        sound, size = sound_column(file.schema_arrow), path.stat().st_size
        for batch in file.iter_batches(max(1, min(16, BATCH * file.metadata.num_rows // size)), use_threads=False):
            for i, field in enumerate(batch.schema):
                if pyarrow.types.is_temporal(field.type):  # Python's datetime has no nanoseconds
                    batch = batch.set_column(i, field.name, batch.column(i).cast("string"))
            others = [field.name for field in batch.schema if holds_files(field.type) and field.name != sound]
            for row in batch.drop_columns(others).to_pylist():
                yield row, row.pop(sound, None)


# ---- records ----


def with_attributes(row: dict) -> dict:
    """Add the fields of MMAU's column `other_attributes`, a JSON text, to a row that lacks them."""
    attributes = row.get("other_attributes")
    with suppress(ValueError, RecursionError):  # no JSON
        attributes = json.loads(attributes) if isinstance(attributes, str) else attributes
    if not isinstance(attributes, dict):
        return row
    return row | {name: value for name, value in attributes.items() if row.get(name) is None}


def as_json(value: Any) -> Any:
    """Convert a value to what JSON has: NaN and infinity to null; dates, decimals and bytes to text."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value if value is None or isinstance(value, str | int) else str(value)


def find_clip(row: dict, sound: Any, folder: Path) -> tuple[bytes, str]:
    """Return the bytes of a row's clip, and its path or "". A path without bytes names a file in `folder`.

    Raises LeftOut.
    """
    paths = row.get("audio_path") or []
    paths = paths if isinstance(paths, list) else [paths]
    sounds = sound if isinstance(sound, list) else [sound] if sound else [{"path": path} for path in paths]
    if max(len(sounds), len(paths)) > 1:
        raise LeftOut("several clips")
    found = (sounds[0] if sounds else None) or {}
    content, path = found.get("bytes"), str(found.get("path") or "").replace("\\", "/")
    if content is None and path:
        if leaves_folder(path) or os.path.isabs(path) or not os.path.isfile(folder / path):
            raise LeftOut("no bytes, and no file of that name beside the parquet file")
        content = (folder / path).read_bytes()
    if not content:
        raise LeftOut("no sound")
    return content, path


# ---- clips ----


def safe_name(name: str, content: bytes) -> str:
    """Return a file name for a clip: the last part of a path from a data set, with a suffix."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name.replace("\\", "/").split("/")[-1])
    name = name.strip(". ") or "clip"
    stem, suffix = os.path.splitext(name)
    if not re.fullmatch(r"\.[A-Za-z]\w{1,4}", suffix):
        known = (end for start, end in FORMATS.items() if re.match(start, content, re.DOTALL))
        stem, suffix = name, next(known, ".bin")
    encoding = sys.getfilesystemencoding()
    return stem.encode(encoding, "replace")[:200].decode(encoding, "ignore") + suffix


def write_clip(folder: Path, name: str, content: bytes, digests: dict[str, bytes]) -> str:
    """Write a clip unless it is there. Returns its name, which differs from `name` if another clip has that name.

    digests: of the clips so far, by name. Equal clips of one name are one file.
    """
    digest, (stem, suffix) = hashlib.sha256(content).digest()[:16], os.path.splitext(name)
    # On macOS, names that differ only in case or in the form of an accent are one file.
    while digests.setdefault(unicodedata.normalize("NFC", name).casefold(), digest) != digest:
        stem = f"{stem}_{digest[:4].hex()}"
        name = stem + suffix
    path = folder / name
    if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
        with writing(path, lambda: "free some space; the same command then writes the missing clips"):
            path.write_bytes(content)
    return name


# ---- the command ----


def prepare(files: list[Path], out: Path, identity: str) -> str:
    """Write the clips and the question file to a folder. Returns a summary. Raises InputError.

    identity: names, sizes and times of the files, for source.json.
    """
    surveys, clips = [survey(path) for path in files], out / "clips"
    needed = sum(size for _, size in surveys) - sum(clip.stat().st_size for clip in clips.glob("*"))
    if needed > free_bytes(out):
        free = f"{free_bytes(out) / 1e9:.2f} GB are free; name another disk with --out, or free some space"
        raise InputError(f"{out}: the clips take {needed / 1e9:.2f} GB, but {free}")
    write_text(out / SOURCE, identity)
    clips.mkdir(exist_ok=True)
    digests, left_out, count = {}, defaultdict(list), 0
    bar = tqdm(desc="clips", unit="row", total=sum(rows for rows, _ in surveys))
    with replacing(out / "questions.jsonl") as unfinished, open(unfinished, "w", encoding="ascii") as lines, bar:
        for path in files:
            for number, (row, sound) in enumerate(read_rows(path), start=1):
                row = with_attributes(row)
                try:
                    content, name = find_clip(row, sound, path.parent)
                except LeftOut as reason:
                    left_out[str(reason)].append(f"{path}, row {number}")
                else:
                    name = safe_name(name or str(row.get("id") or f"{path.stem}_{number}"), content)
                    clip = f"clips/{write_clip(clips, name, content, digests)}"
                    row["audio_path"] = [clip] if isinstance(row.get("audio_path"), list) else clip  # as in MMAU-Pro
                    lines.write(json.dumps(as_json(row)) + "\n")
                    count += 1
                bar.update()
        reasons = [list_problems(rows, f"{len(rows)} left out: {reason}") for reason, rows in left_out.items()]
        if not count:
            raise InputError("\n".join([f"{out}: no row has a usable clip", *reasons]))
        os.sync()  # after a power failure, a question file without its clips would look complete
    return "\n".join([f"{count} questions, {len(digests)} clips", *reasons])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make clips and a question file from a data set's parquet files.")
    parser.add_argument("source", nargs="+", help="the folder that hf download made, or parquet files")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder, for questions.jsonl and clips/")
    parser.add_argument("--split", metavar="NAME", help="the split to take if the folder has several")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if pyarrow is None:
        raise InputError("parquet files need the package pyarrow: pip install pyarrow")
    files, out = find_files(args.source, args.split), Path(args.out)
    identity = json.dumps([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    check_folder(out)
    with owning(out / OWNER):
        source, questions = out / SOURCE, out / "questions.jsonl"
        if not source.exists() and any(not name.endswith((OWNER, UNFINISHED)) for name in os.listdir(out)):
            raise InputError(f"{out}: is not empty; name a new folder with --out")
        if not questions.exists():
            print(prepare(files, out, identity))
        elif source.read_bytes() == identity.encode():
            print("already there; to make it again, remove questions.jsonl")
        else:
            raise InputError(f"{questions}: is from other parquet files; name a new folder with --out")
    for use in ("grpo_aqa.py --model", "eval_mmau.py --ckpt"):
        print(f"python {use} Qwen/Qwen2-Audio-7B-Instruct --data {shlex.quote(str(questions))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"prepare.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; the same command writes the missing clips")
