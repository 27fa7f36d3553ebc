"""Work that a second process does meanwhile is found done; what it could not do is done, or told, by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError, silent
from tunesmith.data import ingest as ingesting
from tunesmith.data import inspection
from tunesmith.data.ingest import Ingested, ingest, ingesting_aside
from tunesmith.data.inspection import inspect, inspecting_aside
from tunesmith.data.read import Reading


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / "cache"))
    for module in (ingesting, inspection):
        monkeypatch.setattr(module, "WORTH_A_PROCESS", 0)
    return tmp_path


def read_aside(path: Path) -> Sequence[tuple[Reading, str]]:
    readings = [(Reading(str(path), columns={"prompt": "prompt", "completion": "completion"}), "train")]
    with ingesting_aside(readings) as wait:
        wait(silent)
    return readings


def never(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("done once more")


def test_what_was_read_aside_is_not_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = read_aside(write_jsonl(place / "rows.jsonl", colour_rows(40)))
    monkeypatch.setattr(ingesting, "_read", never)
    assert len(ingest(readings, silent).rows) == 40


def test_what_could_not_be_read_aside_is_told_by_the_caller(place: Path) -> None:
    (place / "rows.jsonl").write_text("")
    readings = read_aside(place / "rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        ingest(readings, silent).refuse_wrong_rows()


def test_what_was_looked_through_aside_is_not_looked_through_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(
        place / "rows.jsonl", [*colour_rows(40), {"prompt": "Write to anna.kern@gmx.de?", "completion": "Yes."}]
    )
    found: Ingested = ingest([(Reading(str(path)), "train")], silent)
    splits = {"train": np.arange(41)}
    monkeypatch.setattr(inspection.os, "cpu_count", lambda: 2)
    with inspecting_aside(found.rows, splits, (), silent):
        pass
    monkeypatch.setattr(inspection, "Checks", never)
    assert "personal-data" in {finding.kind for finding in inspect(found.rows, splits, (), silent).findings}
