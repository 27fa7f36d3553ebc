"""The door to data: a file, a directory, a data set of the hub, a preset or standard input becomes records."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

from tunesmith.base import InputError, nearest
from tunesmith.data.compressed import CHUNK, COMPRESSED, FileBytes
from tunesmith.data.presets import PRESETS, Preset
from tunesmith.data.read_json import json_records, jsonl_records
from tunesmith.data.read_table import dataset_table, directory_table, hub_data, parquet_table
from tunesmith.data.read_text import csv_records, text_records
from tunesmith.data.record import Record, RowErrors
from tunesmith.data.spec import Format
from tunesmith.files import file_sha256
from tunesmith.models.demo import cache_directory

ENDINGS = "use .jsonl, .json, .csv, .tsv, .parquet or .txt (.gz, .bz2, .xz, .zst too)"
STANDARD_INPUT = "-"
NO_ROWS = "the file holds no rows"

TEXT_READERS: dict[str, Callable[[FileBytes, RowErrors], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".ndjson": jsonl_records,
    ".json": json_records,
    ".csv": partial(csv_records, delimiter=","),
    ".tsv": partial(csv_records, delimiter="\t"),
    ".txt": text_records,
    ".md": text_records,
    ".rst": text_records,
}
KINDS = (*TEXT_READERS, ".parquet")


@dataclass(frozen=True)
class Reading:
    """How one source is read.

    Attributes:
        path: a file, a `datasets` directory, a hub id, the name of a preset, or ``-`` for standard input.
        format: how its rows are written.
        columns: which column, or template over columns, holds which part of a row.
        subset: configuration of a data set of the hub.
        split: of a data set of the hub or a directory with several; None is ``train``.
        answer_after: the marker in raw text after which the answer begins.
        system: a system turn for conversations that have none.
        group: field whose value becomes `Row.group`; dots reach into nested objects.
        stratify: field whose value becomes `Row.stratum`.
    """

    path: str
    format: Format = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    answer_after: str | None = None
    system: str | None = None
    group: str | None = None
    stratify: str | None = None


@dataclass
class RecordStream:
    """Records of one source, to be read once.

    Attributes:
        records: in the order of the source.
        position: bytes or rows done, and of how many when that is known.
        notes: what a user should know.
    """

    records: Iterable[Record]
    position: Callable[[], tuple[int, int | None]] = lambda: (0, None)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


Kind = Literal["file", "directory", "hub", "standard input"]


def open_records(reading: Reading, errors: RowErrors) -> RecordStream:
    """Opens a source and streams its records; rows that are none are added to ``errors`` on the way.

    Raises:
        InputError: when it is missing, of an unknown kind, in another encoding, or cannot be fetched.
    """
    reading, _ = preset_of(reading)
    kind, path = _located(reading)
    if kind == "hub":
        table = dataset_table(hub_data(path, reading.subset, reading.split), reading.path)
        return RecordStream(table, table.position)
    if reading.subset is not None or (reading.split is not None and kind != "directory"):
        key = "subset" if reading.subset is not None else "split"
        raise InputError(f"`{key}` is for data sets of the hub", where=reading.path, fix=f"remove `{key}`")
    if kind == "directory":
        table, notes = directory_table(Path(path), reading.path, reading.split)
        return RecordStream(table, table.position, notes)
    if kind == "standard input":
        file = FileBytes(Path(path), "stdin")
        return _text_stream(file, json_records if _begins_list(file) else jsonl_records, errors)
    ending, compression = _endings(Path(path), reading.path)
    file = FileBytes(Path(path), reading.path, compression)
    if ending == ".parquet":
        table = parquet_table(file)
        return RecordStream(table, table.position)
    return _text_stream(file, TEXT_READERS[ending], errors)


def preset_of(reading: Reading) -> tuple[Reading, Preset | None]:
    """The reading with a preset's settings where its path names one; what the reading itself says wins."""
    preset = None if os.path.exists(os.path.expanduser(reading.path)) else PRESETS.get(reading.path)
    if preset is None:
        return reading, None
    own_columns = bool(reading.columns)
    filled = replace(
        reading,
        format=preset.format if reading.format == "auto" and not own_columns else reading.format,
        columns=reading.columns if own_columns or reading.format not in ("auto", preset.format) else preset.columns,
        subset=reading.subset or preset.subset,
        split=reading.split or preset.split,
    )
    return filled, preset


def content_hash(reading: Reading) -> str:
    """SHA-256 (hex) over what would be read: a file's bytes, every file of a directory, a hub data set's fingerprint.

    Raises:
        InputError: when the source is missing.
    """
    reading, _ = preset_of(reading)
    kind, path = _located(reading)
    if kind in ("file", "standard input"):
        return file_sha256(Path(path))
    digest = sha256()
    if kind == "hub":
        data = hub_data(path, reading.subset, reading.split)
        digest.update(str(getattr(data, "_fingerprint", "")).encode())
    else:
        for file in sorted(item for item in Path(path).rglob("*") if item.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\0".encode())
        digest.update((reading.split or "").encode())
    return digest.hexdigest()


def _located(reading: Reading) -> tuple[Kind, str]:
    """What kind of source a path is, and where it really is."""
    path = reading.path
    # The functions of os.path take any text for a path; those of pathlib raise for names that are too long or unknown.
    file = os.path.expanduser(path)
    if path == STANDARD_INPUT:
        return "standard input", str(standard_input())
    if os.path.isdir(file):
        return "directory", file
    if os.path.isfile(file):
        return "file", file
    if os.path.exists(file):
        raise InputError(
            "this is no regular file, and what is in it can be read only once",
            where=path,
            fix="write it into a file first, or pipe it in and name - as the path",
        )
    if path in PRESETS:
        return "hub", PRESETS[path].path
    if _may_be_hub_id(path):
        return "hub", path
    folder = os.path.dirname(file) or "."
    beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    near = nearest(os.path.basename(file), beside) or ("" if os.sep in path else nearest(path, list(PRESETS)))
    raise InputError(
        f"no such file{near}",
        where=path,
        fix="check the path; it is read relative to where you run the command. "
        f"Names of public data sets: {', '.join(PRESETS)}",
    )


def _may_be_hub_id(path: str) -> bool:
    """Whether a name that is no file here looks like `owner/name`; a folder that is here settles it."""
    owner, _, name = path.partition("/")
    suffix = Path(path).suffix.lower()
    looks = re.fullmatch(r"\w[\w.-]*", owner) is not None and re.fullmatch(r"\w[\w.-]*", name) is not None
    return looks and suffix not in KINDS and suffix not in COMPRESSED and not Path(owner).is_dir()


def _endings(file: Path, shown: str) -> tuple[str, str]:
    """The kind of a file and its compression, by its name."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = suffixes[-1] if suffixes and suffixes[-1] in COMPRESSED else ""
    ending = suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if ending not in KINDS:
        raise InputError(f"unknown kind of file {ending or '(no ending)'!r}", where=shown, fix=ENDINGS)
    return ending, compression


def _text_stream(
    file: FileBytes, reader: Callable[[FileBytes, RowErrors], Iterator[Record]], errors: RowErrors
) -> RecordStream:
    notes = [f"{file.shown}: its UTF-8 byte-order mark was passed over"] if file.marked() else []
    return RecordStream(reader(file, errors), file.position, notes)


def _begins_list(file: FileBytes) -> bool:
    with file.text(None) as stream:
        while block := stream.read(CHUNK):
            if begins := block.lstrip()[:1]:
                return begins == "["
    return False


@functools.cache
def standard_input() -> Path:
    """Copies standard input into Tunesmith's cache, once, so that it can be read again and hashed.

    Raises:
        InputError: when nothing is piped in, or the cache cannot be written.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "nothing is piped into standard input", where=STANDARD_INPUT, fix="pipe JSONL in, or name a file"
        )
    folder = cache_directory() / "stdin"
    digest = sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as copy:
            while block := sys.stdin.buffer.read(CHUNK):
                digest.update(block)
                copy.write(block)
        final = folder / digest.hexdigest()
        os.replace(copy.name, final)
    except OSError as error:
        raise InputError(
            f"standard input cannot be stored: {error.strerror or error}",
            where=str(folder),
            fix="set TUNESMITH_CACHE to a directory that can be written",
        ) from error
    return final
