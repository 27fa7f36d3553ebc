"""Files made on the spot and what is read from them, for the tests of the readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.base import InputError
from tunesmith.data.read import Reading, open_records
from tunesmith.data.record import Record, RowErrors
from tunesmith.data.rows import open_rows

ROWS = [{"prompt": "Say hé", "completion": "HÉ"}, {"prompt": 'with "quotes", commas\nand lines', "completion": "x"}]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def records(path: str, **settings: Any) -> list[Record]:
    errors = RowErrors()
    found = list(open_records(Reading(path, **settings), errors))
    errors.raise_any()
    return found


def fields(path: str, **settings: Any) -> list[dict[str, Any]]:
    return [record.fields for record in records(path, **settings)]


def lines(path: str) -> list[int]:
    return [record.source.line for record in records(path)]


def refusal(path: str, **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        records(path, **settings)
        open_rows(Reading(path, **settings), RowErrors())
    assert caught.value.fix, "every error says what to do"
    return caught.value


JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
