"""Files become records: one dict a row with the line it stands on, or one error that names file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.base import InputError
from tunesmith.batch import Source

SHOWN_ERRORS = 20
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Record:
    """A row as the file has it."""

    fields: dict[str, Any]
    source: Source


class RowErrors:
    """Collects what is wrong with single rows, counts all of it and shows the first twenty."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, source: Source, what: str) -> None:
        self.count += 1
        if self.count <= SHOWN_ERRORS:
            self.shown.append(f"{source}: {what}")

    def raise_any(self, fix: str) -> None:
        if not self.count:
            return
        more = f"\n… and {self.count - SHOWN_ERRORS} more" if self.count > SHOWN_ERRORS else ""
        noun = "row is" if self.count == 1 else "rows are"
        raise InputError("\n".join(self.shown) + more + f"\n{self.count} {noun} wrong", fix=fix)


def read_records(path: str) -> list[Record]:
    """Reads JSONL, JSON, CSV, TSV, Parquet or plain text (compressed or not), a `datasets` directory, or a hub id.

    Raises:
        InputError: when the file is missing, empty, not UTF-8, or has broken rows (all of them are counted).
    """
    file = Path(path).expanduser()
    if file.is_dir():
        records = _dataset_records(path)
    elif file.is_file():
        records = _file_records(file, path)
    elif "/" in path and path.count("/") == 1 and not path.startswith((".", "/", "~")) and not file.suffix:
        records = _hub_records(path)
    else:
        raise InputError(
            "no such file", where=path, fix="check the path; it is read relative to where you run the command"
        )
    if not records:
        raise InputError("the file holds no rows", where=path)
    return records


def _file_records(file: Path, shown: str) -> list[Record]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    opener = COMPRESSED.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2] if opener and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        return _parquet_records(file, shown)
    try:
        with cast(IO[bytes], opener(file, "rb") if opener else open(file, "rb")) as stream:
            content = stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"cannot be read: {error}", where=shown) from error
    if kind in (".jsonl", ".ndjson"):
        return _jsonl_records(content, shown)
    if kind == ".json":
        return _json_records(content, shown)
    if kind in (".csv", ".tsv"):
        return _csv_records(content, shown, "\t" if kind == ".tsv" else ",")
    if kind in (".txt", ".md", ".rst"):
        return _text_records(content, shown)
    raise InputError(
        f"unknown kind of file {kind or '(no ending)'!r}",
        where=shown,
        fix="use .jsonl, .json, .csv, .tsv, .parquet or .txt (.gz, .bz2, .xz too)",
    )


def _decoded(content: bytes, shown: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"not UTF-8: byte 0x{content[error.start]:02x}", where=f"{shown}:{line}", fix="save the file as UTF-8"
        ) from error


def _jsonl_records(content: bytes, shown: str) -> list[Record]:
    records, errors = [], RowErrors()
    for number, line in enumerate(_decoded(content, shown).split("\n"), start=1):
        if not line.strip():
            continue
        source = Source(shown, number)
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            errors.add(source, f"not JSON: {error.msg} at column {error.colno}")
            continue
        if isinstance(value, dict):
            records.append(Record(value, source))
        else:
            errors.add(source, f"expected an object with named fields, found {type(value).__name__}")
    errors.raise_any("every line of a JSONL file is one JSON object")
    return records


def _json_records(content: bytes, shown: str) -> list[Record]:
    text = _decoded(content, shown)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl_records(content, shown)
        raise InputError(f"not JSON: {error.msg}", where=f"{shown}:{error.lineno}") from error
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) == 1 and not any(isinstance(item, (str, dict)) for item in value.values()):
            value = value[lists[0]]
        else:
            value = [value]
    errors, records = RowErrors(), []
    for number, item in enumerate(cast(list[Any], value), start=1):
        source = Source(shown, number)
        if isinstance(item, dict):
            records.append(Record(item, source))
        else:
            errors.add(source, f"expected an object with named fields, found {type(item).__name__}")
    errors.raise_any("a JSON file is a list of objects; the number counts objects from 1")
    return records


def _csv_records(content: bytes, shown: str, delimiter: str) -> list[Record]:
    reader = csv.DictReader(io.StringIO(_decoded(content, shown), newline=""), delimiter=delimiter, strict=True)
    errors, records = RowErrors(), []
    start = 2
    try:
        for row in reader:
            source = Source(shown, start)
            start = reader.line_num + 1
            if None in row:
                errors.add(source, f"more cells than the {len(reader.fieldnames or [])} columns of the header")
            elif None in row.values():
                missing = [name for name, value in row.items() if value is None]
                errors.add(source, f"no cell for column {missing[0]!r}")
            else:
                records.append(Record(dict(row), source))
    except csv.Error as error:
        raise InputError(f"not well-formed CSV: {error}", where=f"{shown}:{reader.line_num}") from error
    errors.raise_any("every row needs as many cells as the header; quote cells that contain the delimiter")
    return records


def _text_records(content: bytes, shown: str) -> list[Record]:
    """Paragraph groups of plain text: documents are separated by blank lines."""
    records, start, lines = [], 1, list[str]()
    for number, line in enumerate([*_decoded(content, shown).split("\n"), ""], start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line)
        elif lines:
            records.append(Record({"text": "\n".join(lines)}, Source(shown, start)))
            lines = []
    return records


def _parquet_records(file: Path, shown: str) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"not a Parquet file: {error}", where=shown) from error
    return [Record(row, Source(shown, number)) for number, row in enumerate(rows, start=1)]


def _dataset_records(path: str) -> list[Record]:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a directory written by datasets: {error}",
            where=path,
            fix="name a file inside the directory, or a directory from save_to_disk",
        ) from error
    if not isinstance(data, Dataset):
        raise InputError(
            f"the directory holds several splits: {', '.join(map(str, data))}",
            where=path,
            fix=f"name one, for example {path}/{next(iter(data))}",
        )
    return [Record(dict(row), Source(path, number)) for number, row in enumerate(cast(Any, data), start=1)]


def _hub_records(path: str) -> list[Record]:
    from datasets import load_dataset

    try:
        data = load_dataset(path, split="train")
    except Exception as error:  # the hub client raises dozens of unrelated classes for "not there" and "no network"
        raise InputError(
            f"neither a file here nor a data set that can be fetched: {str(error).splitlines()[0]}",
            where=path,
            fix="check the path, or the hub id and the network",
        ) from error
    return [Record(dict(row), Source(path, number)) for number, row in enumerate(cast(Any, data), start=1)]
