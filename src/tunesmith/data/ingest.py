"""Sources become a file of rows, once for the same content."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError, Progress, Source, silent
from tunesmith.data.aside import running_aside
from tunesmith.data.cache import cached
from tunesmith.data.formats import PROMPTS, preference_advice, unknown_columns
from tunesmith.data.read import STANDARD_INPUT, Reading, content_hash
from tunesmith.data.record import RowErrors
from tunesmith.data.row_file import RowFile, RowFileWriter
from tunesmith.data.rows import RowStream, open_rows
from tunesmith.files import read_json, write_json

SHOWN_EVERY = 8192
"""Rows between two reports of progress."""

_SOURCES, _ERRORS, ALL_ERRORS = "sources.json", "errors.json", "errors.jsonl"


@dataclass(frozen=True)
class SourceRows:
    """One source as it was found.

    Attributes:
        role: `train`, `replay`, `validation` or `test`.
        format: how its rows are written.
        rows: how many there are.
        sha256: hash of the content that was read.
        notes: what a user should know.
    """

    path: str
    role: str
    format: str
    rows: int
    sha256: str
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "notes"}


def ingest(readings: Sequence[tuple[Reading, str]], progress: Progress, *, refused: Collection[str] = ()) -> Ingested:
    """Reads every source and keeps its rows on disk.

    Args:
        readings: how each source is read, and its role.
        refused: formats that cannot be used here.

    Raises:
        InputError: for sources that cannot be read at all; wrong rows are counted beside the others.
    """
    gc.freeze()  # what torch and transformers brought is no garbage, and takes long to look through
    hashes = [_hashed(reading, progress) for reading, _ in readings]
    made_from = [
        {"reading": asdict(reading), "role": role, "sha256": digest}
        for (reading, role), digest in zip(readings, hashes, strict=True)
    ]

    def build(directory: Path) -> None:
        writer, found = RowFileWriter(directory), list[SourceRows]()
        with KeptErrors(directory) as errors:
            for at, (reading, role) in enumerate(readings):
                found.append(_read(reading, role, hashes[at], at, _Reader(writer, errors, progress, refused)))
        writer.close()
        write_json(directory / _SOURCES, [asdict(source) for source in found])

    directory = cached({"rows": made_from, "refused": sorted(refused)}, build)
    sources = [SourceRows(**{**entry, "notes": tuple(entry["notes"])}) for entry in read_json(directory / _SOURCES)]
    return Ingested(RowFile(directory), sources, kept_errors(directory), directory / ALL_ERRORS)


@dataclass(frozen=True)
class Ingested:
    """What was read.

    Attributes:
        errors: rows that are wrong, and are not among the others.
        all_errors: file of JSON lines with every one of them: `source` and `what`.
    """

    rows: RowFile
    sources: list[SourceRows]
    errors: RowErrors
    all_errors: Path

    def refuse_wrong_rows(self) -> None:
        """Raises InputError when rows are wrong, or a source has none."""
        self.errors.raise_any()
        for source in self.sources:
            if not source.rows:
                raise InputError("the file holds no rows", where=source.path, fix="name a file with at least one row")


class KeptErrors(RowErrors):
    """Errors that are also written to a file, all of them."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._file = open(directory / ALL_ERRORS, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 (by __exit__)

    def add(self, source: Source, what: str, fix: str = "") -> None:
        super().add(source, what, fix)
        self._file.write(json.dumps({"source": str(source), "what": what}) + "\n")

    def __enter__(self) -> KeptErrors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        first = self.first and [self.first.file, self.first.line]
        kept = {"count": self.count, "shown": self.shown, "fixes": self.fixes, "first": first}
        write_json(self._directory / _ERRORS, kept)


def kept_errors(directory: Path) -> RowErrors:
    kept, errors = read_json(directory / _ERRORS), RowErrors()
    errors.count, errors.shown, errors.fixes = kept["count"], kept["shown"], kept["fixes"]
    errors.first = Source(*kept["first"]) if kept["first"] else None
    return errors


@dataclass(frozen=True)
class _Reader:
    writer: RowFileWriter
    errors: RowErrors
    progress: Progress
    refused: Collection[str]


def _hashed(reading: Reading, progress: Progress) -> str:
    progress(f"hashing {reading.path}", 0, 1)
    return content_hash(reading)


def _read(reading: Reading, role: str, digest: str, at: int, reader: _Reader) -> SourceRows:
    stream = open_rows(reading, reader.errors)
    if stream.format == PROMPTS[0] and PROMPTS[0] in reader.refused:
        columns = dict(reading.columns) or stream.first.fields
        raise unknown_columns(columns, str(stream.first.source), stream.columns)
    if stream.format in reader.refused:
        raise InputError(
            f"these rows are in the format {stream.format!r}, which this objective does not use",
            where=reading.path,
            fix=_advice(stream, reader.refused),
        )
    before = reader.writer.count
    for count, row in enumerate(stream):
        if count % SHOWN_EVERY == 0:
            reader.progress(f"reading {reading.path}", *stream.position())
        reader.writer.add(row, at)
    rows = reader.writer.count - before
    return SourceRows(reading.path, role, stream.format, rows, digest, tuple(stream.notes))


def _advice(stream: RowStream, refused: Collection[str]) -> str:
    if "text" not in refused and "messages" in refused:
        return (
            "use objective.kind: sft, which trains on conversations and answers; or say which column holds raw text: "
            "data.format: text with data.columns: {text: …}"
        )
    if stream.format == "preference":
        return preference_advice(stream.columns)
    if stream.format == "rated":
        return "use an objective over preferences, such as objective.kind: dpo, or map one answer in data.columns"
    if stream.format == "unpaired":
        return "use objective.kind: kto, or declare data.format: prompt-completion to imitate all completions"
    if stream.format == "token-labels":
        return "use objective.kind: tag, or map columns to a prompt and a completion in data.columns"
    return "map columns to what it needs in data.columns: {text: …, label: …}, or {tokens: …, labels: …} for words"


WORTH_A_PROCESS = 2**23
"""Bytes from which reading in a second process is worth its start."""


@contextmanager
def ingesting_aside(readings: Sequence[tuple[Reading, str]]) -> Iterator[Callable[[Progress], None]]:
    """Lets another process read the sources meanwhile, so that ``ingest`` finds them done.

    For those who have seconds of imports before them. What is yielded waits for that process; when it fails, `ingest`
    does the work itself and says what is wrong.
    """
    sizes = [os.path.getsize(reading.path) if os.path.isfile(reading.path) else 0 for reading, _ in readings]
    if sum(sizes) < WORTH_A_PROCESS or any(reading.path == STANDARD_INPUT for reading, _ in readings):
        yield lambda progress: None
        return
    asked = json.dumps([[asdict(reading), role] for reading, role in readings])
    with running_aside(__name__, asked) as wait:
        yield lambda progress: wait("reading rows", progress)


def _aside(asked: str) -> None:
    with suppress(InputError):
        ingest([(Reading(**reading), role) for reading, role in json.loads(asked)], silent)


if __name__ == "__main__":
    _aside(sys.argv[1])
