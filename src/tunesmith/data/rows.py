"""From a source to rows, streamed: records are read, told apart by format, converted and checked one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from tunesmith.base import InputError, nearest
from tunesmith.data.convert import CONVERTERS, text_split_at
from tunesmith.data.formats import LAYOUTS, PROMPTS, choose_format, columns_of, mapped, other_format
from tunesmith.data.openassistant import Gathered, tree_notes, tree_row
from tunesmith.data.read import NO_ROWS, Reading, RecordStream, open_records, preset_of
from tunesmith.data.record import BadRow, Record, RowErrors
from tunesmith.data.row import Row
from tunesmith.data.turns import with_system

PEEKED = 1000
"""Records of which the columns are known before the first row is made."""

SHOWN_COLUMNS = 8


def open_rows(reading: Reading, errors: RowErrors) -> RowStream:
    """Opens a source and streams its rows; what is wrong with single ones is added to ``errors`` on the way.

    The caller iterates over all of its sources and then calls ``errors.raise_any()``.

    Raises:
        InputError: when the source is missing, empty or of an unknown kind, when no format fits, when a mapping names
            no column, or when no record of it can be read.
    """
    reading, preset = preset_of(reading)
    records = open_records(reading, errors)
    if preset is not None:
        records.notes.append(f"{reading.path} is {preset.path}: {preset.about}; licence: {preset.licence}")
    return RowStream(records, reading, errors)


class RowStream:
    """Rows of one source, to be iterated over once.

    Attributes:
        format: how the rows are written, for example ``messages``.
        first: the first record as the source has it.
        columns: the fields of the first rows.
        notes: what a user should know; complete when the iteration has ended.

    Args:
        records: of the source.
        reading: how they are read, a preset's settings filled in.
        errors: where what is wrong with rows is added.

    Raises:
        InputError: as `open_rows` does.
    """

    def __init__(self, records: RecordStream, reading: Reading, errors: RowErrors) -> None:
        self.notes = records.notes
        self._reading, self._errors, self._position = reading, errors, records.position
        rest = iter(records)
        head = list(islice(rest, PEEKED))
        if not head:
            errors.raise_any()
            raise InputError(NO_ROWS, where=reading.path, fix="name a file with at least one row")
        self.first = head[0]
        self.columns = sorted({name for record in head for name in record.fields})
        self.format, self._parts = choose_format(head, reading.format, dict(reading.columns))
        self._told_apart = reading.format == "auto" and not reading.columns
        self._convert = self._converter()
        self._check_fields()
        self._note_unused()
        self._records = chain(head, rest)

    def position(self) -> tuple[int, int | None]:
        """Bytes of the file (or rows of the table) done, and of how many."""
        return self._position()

    def __iter__(self) -> Iterator[Row]:
        if self.format == "openassistant":
            yield from self._trees()
            return
        for record in self._records:
            row = self._made(record, lambda record: self._convert(self._by_parts(record)))
            if row is not None:
                yield row

    def _converter(self) -> Callable[[Record], Row]:
        marker = self._reading.answer_after
        if marker is None:
            return CONVERTERS.get(self.format, CONVERTERS["messages"])
        if self.format != "text":
            raise InputError(
                f"applies to raw text only, and these rows are {self.format}",
                where="data.answer_after",
                fix="remove it, or say data.format: text",
            )
        return text_split_at(marker)

    def _by_parts(self, record: Record) -> Record:
        return mapped(record, self._parts) if self._parts else record

    def _made(self, record: Record, convert: Callable[[Record], Row | None]) -> Row | None:
        """The finished row, or None when it is wrong (which is counted) or when the record is none."""
        try:
            if self._told_apart and (other := other_format(frozenset(record.fields), self.format)):
                raise BadRow(
                    f"mixed formats: this row ({', '.join(sorted(record.fields))}) is {other}, "
                    f"the first one is in {self.format!r}"
                )
            row = convert(record)
            return None if row is None else self._finished(row, record)
        except BadRow as error:
            self._wrong(record, error)
            return None

    def _wrong(self, record: Record, error: BadRow) -> None:
        declared = "" if self._reading.format != "auto" else ", which the first row has; declare another in data.format"
        self._errors.add(record.source, str(error), f"every row must be in the format {self.format!r}{declared}")

    def _finished(self, row: Row, record: Record) -> Row:
        system, reading = self._reading.system, self._reading
        if system and row.messages:
            rejected = with_system(row.rejected, system)
            row = replace(row, messages=with_system(row.messages, system), rejected=rejected)
        for text in (row.text, *row.words, *(turn["content"] for turn in (*row.messages, *row.rejected[-1:]))):
            if "\0" in text:
                raise BadRow("a NUL character (\\u0000) stands in the text, which is no text")
        if reading.group or reading.stratify:
            row = replace(row, group=_value(record, reading.group), stratum=_value(record, reading.stratify))
        return row

    def _trees(self) -> Iterator[Row]:
        unanswered, gathered = 0, Gathered()
        for record in self._records:
            parts = self._by_parts_or_none(record)
            if parts is None:
                continue
            if "message_id" not in parts.fields:
                wrong = self._errors.count
                row = self._made(record, lambda _, parts=parts: tree_row(parts))
                unanswered += row is None and self._errors.count == wrong
                if row is not None:
                    yield row
                continue
            try:
                gathered.add(parts, Record(self._kept(record.fields), record.source))
            except BadRow as error:
                self._wrong(record, error)
        for record, row in gathered.rows():
            if isinstance(row, BadRow):
                self._wrong(record, row)
            elif row is None:
                unanswered += 1
            elif (finished := self._made(record, lambda _, row=row: row)) is not None:
                yield finished
        self.notes += tree_notes(self._reading.path, unanswered, gathered.orphans)

    def _by_parts_or_none(self, record: Record) -> Record | None:
        try:
            return self._by_parts(record)
        except BadRow as error:
            self._wrong(record, error)
            return None

    def _kept(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Of the first message of a tree only what its row is grouped by: all trees are held at once."""
        wanted = {field.partition(".")[0] for field in (self._reading.group, self._reading.stratify) if field}
        wanted |= {field for field in (self._reading.group, self._reading.stratify) if field}
        return {name: value for name, value in fields.items() if name in wanted}

    def _check_fields(self) -> None:
        present = self.columns
        for key, path in (("group", self._reading.group), ("stratify", self._reading.stratify)):
            if path and path not in present and path.partition(".")[0] not in present:
                raise InputError(
                    f"there is no field {path!r}{nearest(path, present)}, which `{key}` names",
                    where=self._reading.path,
                    fix=f"fields: {', '.join(present)}",
                )

    def _note_unused(self) -> None:
        if self.format == "openassistant":
            return
        used = {
            part
            for name, required, optional in (*LAYOUTS, PROMPTS)
            if name == self.format
            for part in required + optional
        }
        if self._parts:
            used = set().union(*(columns_of(value) for value in self._parts.values()))
        used |= {field.partition(".")[0] for field in (self._reading.group, self._reading.stratify) if field}
        unused = sorted(set(self.columns) - used)
        if unused:
            more = f" and {len(unused) - SHOWN_COLUMNS} more" if len(unused) > SHOWN_COLUMNS else ""
            self.notes.append(f"{self._reading.path}: columns not used: {', '.join(unused[:SHOWN_COLUMNS])}{more}")


def _value(record: Record, path: str | None) -> str | None:
    """What stands at a field, as text; dots reach into nested objects.

    Raises:
        BadRow: when nothing stands there.
    """
    if path is None:
        return None
    value: Any = record.fields.get(path)
    if path not in record.fields:
        value = record.fields
        for name in re.split(r"\.", path):
            value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise BadRow(f"there is no {path!r}, by which rows are put together")
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
