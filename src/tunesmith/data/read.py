"""Files become records: one dict a row with the line it stands on, or one error that names file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.base import InputError, nearest
from tunesmith.batch import Source

SHOWN_ERRORS = 20
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ENDINGS = "use .jsonl, .json, .csv, .tsv, .parquet or .txt (.gz, .bz2, .xz too)"


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
        self.first: Source | None = None

    def add(self, source: Source, what: str) -> None:
        self.count += 1
        self.first = self.first or source
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
    # The functions of os.path take any text for a path; those of pathlib raise for names that are too long or unknown.
    file = Path(os.path.expanduser(path))
    if os.path.isdir(file):
        records = _dataset_records(file, path)
    elif os.path.isfile(file):
        records = _file_records(file, path)
    elif _may_be_hub_id(path):
        records = _hub_records(path)
    else:
        beside = sorted(os.listdir(file.parent)) if os.path.isdir(file.parent) else []
        near = nearest(file.name, beside)
        raise InputError(
            f"no such file{near}", where=path, fix="check the path; it is read relative to where you run the command"
        )
    if not records:
        raise InputError("the file holds no rows", where=path, fix="name a file with at least one row")
    return records


def _may_be_hub_id(path: str) -> bool:
    """Whether a name that is no file here looks like `owner/name`; a folder that is here settles it."""
    owner, _, name = path.partition("/")
    suffix = Path(path).suffix.lower()
    looks = re.fullmatch(r"\w[\w.-]*", owner) is not None and re.fullmatch(r"\w[\w.-]*", name) is not None
    return looks and suffix not in READERS and suffix not in COMPRESSED and not Path(owner).is_dir()


def _file_records(file: Path, shown: str) -> list[Record]:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    opener = COMPRESSED.get(suffixes[-1]) if suffixes else None
    kind = suffixes[-2] if opener and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise InputError(f"unknown kind of file {kind or '(no ending)'!r}", where=shown, fix=ENDINGS)
    try:
        with cast(IO[bytes], opener(file, "rb") if opener else open(file, "rb")) as stream:
            content = stream.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"cannot be read: {said}", where=shown, fix="check that the file is whole") from error
    return READERS[kind](content, shown)


def _decoded(content: bytes, shown: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"not UTF-8: byte 0x{content[error.start]:02x}", where=f"{shown}:{line}", fix="save the file as UTF-8"
        ) from error


class _BrokenJson(ValueError):
    """What is wrong with a piece of JSON, and the line in which it is, counted from 1."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _BrokenJson(f"not JSON: {error.msg} at column {error.colno}", error.lineno) from error
    except UnicodeEncodeError as error:
        raise _BrokenJson("half of a surrogate pair (\\ud800 to \\udfff) stands alone, which is no text") from error
    except RecursionError as error:
        raise _BrokenJson("the value is nested too deeply") from error
    except ValueError as error:
        raise _BrokenJson(str(error)) from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a name twice in an object, and every reader then keeps another one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return found


def _jsonl_records(content: bytes, shown: str) -> list[Record]:
    records, errors = [], RowErrors()
    text = _decoded(content, shown)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        source = Source(shown, number)
        try:
            value = _parsed(line)
        except _BrokenJson as error:
            errors.add(source, str(error))
            continue
        if isinstance(value, dict):
            records.append(Record(value, source))
        else:
            errors.add(source, f"expected an object with named fields, found {type(value).__name__}")
    advice = "; this looks like one JSON value over several lines: name the file .json"
    whole = text.lstrip().startswith("[") or (not records and text.lstrip().startswith("{\n"))
    errors.raise_any(f"every line of a JSONL file is one JSON object{advice if whole else ''}")
    return records


def _json_records(content: bytes, shown: str) -> list[Record]:
    text = _decoded(content, shown)
    if not text.strip():
        return []
    try:
        value = _parsed(text)
    except _BrokenJson as error:
        if "Extra data" in str(error):
            return _jsonl_records(content, shown)
        where = f"{shown}:{error.line}" if error.line else shown
        raise InputError(str(error), where=where, fix="a JSON file is a list of objects") from error
    if isinstance(value, dict):
        value = _rows_of_object(value, shown)
    if not isinstance(value, list):
        raise InputError(f"expected a list of objects, found {type(value).__name__}", where=shown, fix=ENDINGS)
    errors, records = RowErrors(), []
    for number, item in enumerate(value, start=1):
        source = Source(shown, number)
        if isinstance(item, dict):
            records.append(Record(item, source))
        else:
            errors.add(source, f"expected an object with named fields, found {type(item).__name__}")
    errors.raise_any("a JSON file is a list of objects; the number counts objects from 1")
    return records


def _rows_of_object(value: dict[str, Any], shown: str) -> list[Any]:
    """The rows of a file that is one object: its only list of objects, or the object itself as the only row."""
    lists = [
        name
        for name, item in value.items()
        if isinstance(item, list) and item and all(isinstance(row, dict) for row in item)
    ]
    if any({"role", "from"} & value[name][0].keys() for name in lists):  # the turns of one conversation
        return [value]
    if len(lists) > 1:
        raise InputError(
            f"the object holds several lists of rows: {', '.join(lists)}",
            where=shown,
            fix="write each into a file of its own",
        )
    return cast(list[Any], value[lists[0]]) if lists else [value]


def _csv_records(content: bytes, shown: str, delimiter: str) -> list[Record]:
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document; the default is 128 KiB
    reader = csv.reader(io.StringIO(_decoded(content, shown), newline=""), delimiter=delimiter, strict=True)
    errors, records = RowErrors(), []
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            source, start = Source(shown, start), reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, source, delimiter)
            elif len(cells) != len(header):
                errors.add(source, f"{len(cells)} cells where the header has {len(header)} columns")
            else:
                records.append(Record(dict(zip(header, cells, strict=True)), source))
    except csv.Error as error:
        raise InputError(
            f"not well-formed CSV: {error}",
            where=f"{shown}:{start}",
            fix='put cells that contain quotes into quotes, and write a quote in them as ""',
        ) from error
    errors.raise_any("every row needs as many cells as the header; quote cells that contain the delimiter")
    return records


def _checked_header(names: list[str], source: Source, delimiter: str) -> list[str]:
    others = [mark for mark in ",;\t|" if mark != delimiter and mark in names[0]]
    if len(names) == 1 and others:
        raise InputError(
            f"the header is one column, {names[0]!r}: its columns seem to be separated by {others[0]!r}",
            where=str(source),
            fix="separate columns by commas in a .csv file and by tabs in a .tsv file",
        )
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the column {twice!r} stands twice", where=str(source), fix="give every column its own name")
    return names


def _text_records(content: bytes, shown: str) -> list[Record]:
    """Paragraph groups of plain text: documents are separated by blank lines."""
    records, start, lines = [], 1, list[str]()
    text = _decoded(content, shown).replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line)
        elif lines:
            records.append(Record({"text": "\n".join(lines)}, Source(shown, start)))
            lines = []
    return records


def _parquet_records(content: bytes, shown: str) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        rows = table.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"not a Parquet file: {error}", where=shown, fix=ENDINGS) from error
    stored = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = (stored.get("info") or {}).get("features") or {}
    names = {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and "names" in feature
    }
    return _table_records(rows, names, shown)


def _table_records(rows: Iterable[Mapping[str, Any]], names: Mapping[str, list[str]], shown: str) -> list[Record]:
    """Rows of a table whose class labels are numbers; the names are what a model should learn to say."""
    records = []
    for number, row in enumerate(rows, start=1):
        fields = dict(row)
        for column, known in names.items():
            value = fields.get(column)
            if isinstance(value, int):
                fields[column] = known[value] if 0 <= value < len(known) else None
        records.append(Record(fields, Source(shown, number)))
    return records


def _dataset_records(file: Path, shown: str) -> list[Record]:
    from datasets import ClassLabel, Dataset, load_from_disk

    try:
        data = load_from_disk(str(file))
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a directory written by datasets: {str(error).splitlines()[0]}",
            where=shown,
            fix="name a file inside the directory, or a directory from save_to_disk",
        ) from error
    if not isinstance(data, Dataset):
        raise InputError(
            f"the directory holds several splits: {', '.join(map(str, data))}",
            where=shown,
            fix=f"name one, for example {shown.rstrip('/')}/{next(iter(data))}",
        )
    names = {column: list(feature.names) for column, feature in data.features.items() if type(feature) is ClassLabel}
    return _table_records(cast(Any, data), names, shown)


def _hub_records(path: str) -> list[Record]:
    from datasets import ClassLabel, load_dataset

    try:
        data = cast(Any, load_dataset(path, split="train"))
    except Exception as error:  # the hub client raises dozens of unrelated classes for "not there" and "no network"
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"neither a file here nor a data set that can be fetched: {said}",
            where=path,
            fix="check the path, or the hub id and the network",
        ) from error
    names = {column: list(feature.names) for column, feature in data.features.items() if type(feature) is ClassLabel}
    return _table_records(data, names, path)


READERS: dict[str, Callable[[bytes, str], list[Record]]] = {
    ".jsonl": _jsonl_records,
    ".ndjson": _jsonl_records,
    ".json": _json_records,
    ".csv": partial(_csv_records, delimiter=","),
    ".tsv": partial(_csv_records, delimiter="\t"),
    ".parquet": _parquet_records,
    ".txt": _text_records,
    ".md": _text_records,
    ".rst": _text_records,
}
