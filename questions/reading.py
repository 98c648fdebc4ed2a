"""Read the records of a question file: one JSON list, one JSON object per line, or CSV with a header."""

import csv
import io
import json
import os
from pathlib import Path

from infra.errors import InputError, list_problems
from infra.files import kind_of_file
from questions.fields import NAMES

Placed = list[tuple[str, dict]]  # records with their place, for messages: "FILE, line 3"
FORMATS = "one JSON list, one JSON object per line, or CSV with a header (audio,question,choices,answer)"


def require(found: tuple[list, list[str]]) -> list:
    """Return the list that one of the `find` functions found. Raises one InputError for all of its problems."""
    records_or_questions, problems = found
    if problems:
        raise InputError(list_problems(problems))
    return records_or_questions


def find_records(path: str) -> tuple[Placed, list[str]]:
    """Read the records of a file as (place, record) in file order, and list a problem for each unusable one.

    The content tells the format of the file. Raises InputError if the file cannot be read or has no records.
    """
    text = _read_text(path)
    if delimiter := _csv_delimiter(text):
        values, problems = _csv_records(path, text, delimiter)
    elif text.lstrip().startswith("["):
        values, problems = _json_list(path, text), []
    else:
        values, problems = _json_lines(path, text)
    problems += [
        f"{place}: expected a JSON object, found {type(value).__name__}"
        for place, value in values
        if not isinstance(value, dict)
    ]
    if not values and not problems:
        raise InputError(f"{path}: has no questions")
    return [(place, value) for place, value in values if isinstance(value, dict)], problems


def _read_text(path: str) -> str:
    """Read the text of a file, with or without a byte-order mark. Raises InputError."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such question file")
    if not os.path.isfile(path):  # reading a pipe would wait, and a second reading would find nothing
        raise InputError(f"{path}: is a {kind_of_file(path)}; name a file of questions")
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"PAR1"):
            raise InputError(f"{path}: is a parquet file; convert it with python prepare.py {path} --out FOLDER")
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


# ---- JSON ----


def _json_list(path: str, text: str) -> list:
    try:
        return [(f"{path}, record {i}", value) for i, value in enumerate(_parse_json(text), start=1)]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); give {FORMATS}") from None
    except ValueError as error:
        raise InputError(f"{path}: not usable as JSON ({error})") from None


def _json_lines(path: str, text: str) -> tuple[list, list[str]]:
    values, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                values.append((place, _parse_json(line)))
            except ValueError as error:
                problems.append(f"{place}: not valid JSON ({getattr(error, 'msg', error)}); give {FORMATS}")
    if problems and not any(isinstance(value, dict) for _, value in values):  # the file has another format
        raise InputError(problems[0])
    return values, problems


def _parse_json(text: str):
    """Call json.loads. Raises ValueError for every failure."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# ---- CSV ----


def _csv_delimiter(text: str) -> str | None:
    """Return the delimiter if the first line is a CSV header with one of the names of a clip, else None."""
    header = text.lstrip().partition("\n")[0]
    if header.startswith(("{", "[")):
        return None
    for delimiter in ",;\t":
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        if len(names) > 1 and set(names) & set(NAMES["clip"]):
            return delimiter
    return None


def _csv_records(path: str, text: str, delimiter: str) -> tuple[Placed, list[str]]:
    """Read the rows as (place, record), and list a problem for each unusable row. An empty cell is an absent field."""
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True, strict=True)
    values, problems = [], []
    try:
        names = [name.strip() for name in next(filter(None, rows))]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}, line {rows.line_num}: has the field {twice[0]!r} twice; rename one")
        end = rows.line_num
        for row in rows:
            place, end = f"{path}, line {end + 1}", rows.line_num  # a cell may have several lines
            if row and len(row) != len(names):
                problems.append(
                    f"{place}: has {len(row)} cells, but the header has {len(names)}; quote cells with commas"
                )
            elif any(row):
                values.append((place, {name: cell for name, cell in zip(names, row) if cell}))
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from None
    return values, problems
