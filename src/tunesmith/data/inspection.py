"""Stored rows looked through by every check, once for the same rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tunesmith.base import InputError, Progress
from tunesmith.data.aside import running_aside
from tunesmith.data.cache import cached, entry_of
from tunesmith.data.check import Checks, Finding, Instance
from tunesmith.data.ingest import SHOWN_EVERY
from tunesmith.data.read import Reading, content_hash, open_records
from tunesmith.data.record import RowErrors
from tunesmith.data.row_file import RowFile
from tunesmith.files import read_json, write_json

WORTH_A_PROCESS = 20_000
"""Rows from which a second process, which takes seconds to start, is faster."""

_FOUND = "findings.json"


@dataclass(frozen=True)
class Inspection:
    """What the checks found.

    Attributes:
        flagged: for each kind of finding the training rows that a cleaned file would not have.
    """

    findings: list[Finding]
    flagged: dict[str, list[int]]


def inspect(
    rows: RowFile, splits: Mapping[str, np.ndarray], benchmarks: Sequence[str], progress: Progress
) -> Inspection:
    """Looks through rows.

    Args:
        splits: numbers of the rows of `train`, and of `validation` and `test`, which they are compared with.
        benchmarks: files whose texts training rows should not hold.

    Raises:
        InputError: when a benchmark's file cannot be read.
    """

    def build(directory: Path) -> None:
        checks = Checks(benchmarks=[(path, benchmark_texts(path)) for path in benchmarks])
        total, done = sum(map(len, splits.values())), 0
        for split, numbers in splits.items():
            for number, row in rows.read(numbers):
                if done % SHOWN_EVERY == 0:
                    progress("checking rows", done, total)
                checks.add(row, split, number)
                done += 1
        progress("comparing rows", 0, total)
        found = [finding.as_json() for finding in checks.findings()]
        write_json(directory / _FOUND, {"findings": found, "flagged": checks.flagged()})

    kept = read_json(cached(_made_from(rows, splits, benchmarks), build) / _FOUND)
    return Inspection([_finding(entry) for entry in kept["findings"]], kept["flagged"])


def _made_from(rows: RowFile, splits: Mapping[str, np.ndarray], benchmarks: Sequence[str]) -> dict[str, Any]:
    return {
        "inspected": rows.identity,
        "splits": {name: sha256(numbers.astype("<i8").tobytes()).hexdigest() for name, numbers in splits.items()},
        "benchmarks": [[path, content_hash(Reading(path))] for path in benchmarks],
    }


@contextmanager
def inspecting_aside(
    rows: RowFile,
    splits: Mapping[str, np.ndarray],
    benchmarks: Sequence[str],
    progress: Progress,
    *,
    first: bool = False,
) -> Iterator[None]:
    """Lets another process look through the same rows meanwhile, so that ``inspect`` finds them done.

    Python runs one thread at a time; a second process takes the other core. When it fails, `inspect` does the work
    itself and says what is wrong.

    Args:
        first: whatever the number of rows, and before anything else goes on: what the checks need is then never in this
            process's memory.
    """
    few = sum(map(len, splits.values())) < WORTH_A_PROCESS or (os.cpu_count() or 1) < 2
    if (few and not (first and splits)) or entry_of(_made_from(rows, splits, benchmarks)).is_dir():
        yield
        return
    with TemporaryDirectory(prefix="tunesmith-") as place:
        for name, numbers in splits.items():
            np.save(Path(place) / f"{name}.npy", numbers)
        with running_aside(__name__, str(rows.directory), place, *benchmarks) as wait:
            if first:
                wait("checking rows", progress)
            yield
            wait("checking rows", progress)


def _finding(entry: dict[str, Any]) -> Finding:
    return Finding(**{**entry, "instances": tuple(Instance(**instance) for instance in entry["instances"])})


def benchmark_texts(path: str) -> Iterator[str]:
    """Every row of a benchmark as one text: all that its columns say.

    Raises:
        InputError: when the file cannot be read or has wrong rows.
    """
    errors = RowErrors()
    for record in open_records(Reading(path), errors):
        yield "\n".join(_texts(record.fields))
    errors.raise_any()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _aside(directory: str, place: str, *benchmarks: str) -> None:
    files = [(name, Path(place) / f"{name}.npy") for name in ("train", "validation", "test")]
    splits = {name: np.load(file) for name, file in files if file.is_file()}
    with suppress(InputError):
        inspect(RowFile(Path(directory)), splits, benchmarks, lambda *_: None)


if __name__ == "__main__":
    _aside(*sys.argv[1:])
