"""CSV, TSV and plain text, line by line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator

from tunesmith.base import InputError, Source
from tunesmith.data.compressed import FileBytes
from tunesmith.data.record import Record, RowErrors

UTF8 = "save the file as UTF-8"
LONGEST_CELL = 1 << 27
"""Characters of a cell of a table. It may hold a whole document; a quote that is never closed would hold the file."""

_NO_UTF8 = re.compile("[\udc80-\udcff]")


def text_defect(text: str) -> str | None:
    """What makes a piece of a file no text: a byte that is no UTF-8, or a NUL."""
    if "\0" in text:
        return "a NUL byte, which is no text (UTF-16 saved without its mark looks like this)"
    if not text.isascii() and (found := _NO_UTF8.search(text)):
        return f"not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x}"
    return None


class _Checked:
    """Lines that remember which of them are no text; those are counted once and their rows left out."""

    def __init__(self, lines: Iterable[str], shown: str, errors: RowErrors) -> None:
        self._lines, self._shown, self._errors = lines, shown, errors
        self.last_bad = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._lines, start=1):
            if defect := text_defect(line):
                self._errors.add(Source(self._shown, number), defect, UTF8)
                self.last_bad = number
            yield line


def csv_records(file: FileBytes, errors: RowErrors, *, delimiter: str) -> Iterator[Record]:
    """Rows of a table with a header; a row's line is the one in which it begins.

    Raises:
        InputError: when the header is doubled, broken, or seems to have another delimiter.
    """
    csv.field_size_limit(LONGEST_CELL)
    header: list[str] | None = None
    with file.text("") as stream:
        lines = _Checked(stream, file.shown, errors)
        reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
        while True:
            source = Source(file.shown, reader.line_num + 1)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                errors.add(
                    source,
                    f"not well-formed CSV: {error}",
                    'put cells that contain quotes into quotes, and write a quote in them as ""',
                )
                continue
            if not cells:
                continue
            if header is None:
                header = _checked_header(cells, source, delimiter)
            elif lines.last_bad >= source.line:
                continue
            elif len(cells) != len(header):
                errors.add(
                    source,
                    f"{len(cells)} cells where the header has {len(header)} columns",
                    "every row needs as many cells as the header; quote cells that contain the delimiter",
                )
            else:
                yield Record(dict(zip(header, cells, strict=True)), source)


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


def text_records(file: FileBytes, errors: RowErrors) -> Iterator[Record]:
    """Documents of plain text, separated by blank lines; a file without any is one document, and held whole."""
    start, lines = 1, list[str]()
    with file.text(None) as stream:
        checked = _Checked(stream, file.shown, errors)
        for number, line in enumerate(checked, start=1):
            if line.strip():
                start = start if lines else number
                lines.append(line.rstrip("\n"))
                continue
            if lines and checked.last_bad < start:
                yield Record({"text": "\n".join(lines)}, Source(file.shown, start))
            lines = []
        if lines and checked.last_bad < start:
            yield Record({"text": "\n".join(lines)}, Source(file.shown, start))
