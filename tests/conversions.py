"""Records made on the spot and the rows that they become, for the tests of formats and of the stream."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.base import InputError, Source
from tunesmith.data.read import Reading, RecordStream
from tunesmith.data.record import Record, RowErrors
from tunesmith.data.rows import Row, RowStream

Turns = list[tuple[str, str]]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, Source("rows.jsonl", line)) for line, row in enumerate(rows, start=1)]


def stream(*rows: dict[str, Any], errors: RowErrors | None = None, **settings: Any) -> RowStream:
    return RowStream(RecordStream(records(*rows)), Reading("rows.jsonl", **settings), errors or RowErrors())


def convert(*rows: dict[str, Any], **settings: Any) -> tuple[str, list[Row]]:
    errors = RowErrors()
    opened = stream(*rows, errors=errors, **settings)
    found = list(opened)
    errors.raise_any()
    return opened.format, found


def refusal(*rows: dict[str, Any], **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        convert(*rows, **settings)
    assert caught.value.fix, "every error says what to do"
    return caught.value


def turns(row: Row) -> Turns:
    return [(message["role"], message["content"]) for message in row.messages]
