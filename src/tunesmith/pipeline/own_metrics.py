"""Metrics that a recipe brings along, at work: a function of the user's, and SQL that is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.base import InputError
from tunesmith.evaluation.answers import Judged
from tunesmith.metrics.spec import OF_PROMPT, SQL_EXECUTION, OwnMetric, PythonMetric
from tunesmith.metrics.sql import (
    SqlError,
    Wanted,
    database_image,
    reference_result,
    result_in_database,
    schema_in,
    sql_match,
)
from tunesmith.pipeline.user_function import file_hash, loaded_function

KEY = "evaluate.metrics"
DATABASES = (".db", ".sqlite", ".sqlite3")

OfRow = Callable[[Judged], float | None]
"""What an answered row is worth; None where it cannot be said."""


@dataclass(frozen=True)
class OwnMetrics:
    """The own metrics of a recipe, ready to score rows.

    Attributes:
        of_row: each by its name.
        record: hashes of the files that they come from.
    """

    of_row: dict[str, OfRow]
    record: dict[str, str]

    @classmethod
    def of(cls, asked: Sequence[OwnMetric]) -> OwnMetrics:
        """Raises InputError when a file or function is not there, or cannot be read."""
        of_row: dict[str, OfRow] = {}
        record: dict[str, str] = {}
        for metric in asked:
            if isinstance(metric, PythonMetric):
                of_answer, record[metric.python] = loaded_function(metric.python, "metric", KEY)
                of_row[metric.name] = lambda row, of_answer=of_answer: of_answer(
                    row.prompt, row.answer or "", row.references
                )
                continue
            if metric.sql != OF_PROMPT:
                record[metric.sql] = file_hash(Path(metric.sql), KEY)
            of_row[metric.name] = _sql(metric.sql)
        return cls(of_row, record)

    def scored(self, rows: Sequence[Judged]) -> list[Judged]:
        """The rows, each with what every own metric says of its answer; rows without an answer as they are.

        Raises:
            InputError: when the user's function fails, or a metric can say nothing of any row.
        """
        if not self.of_row or not any(row.answer is not None for row in rows):
            return list(rows)
        found: list[Judged] = []
        for row in rows:
            said = {} if row.answer is None else {name: of_row(row) for name, of_row in self.of_row.items()}
            found.append(replace(row, scores={name: value for name, value in said.items() if value is not None}))
        return found


def _sql(source: str) -> OfRow:
    """Executes answers and references where the tables of ``source`` are."""
    wanted = _references_in(source)

    def of_row(row: Judged) -> float | None:
        """1 when the answer gives what a reference gives; None where no reference gives anything to compare with."""
        found = []
        for query in row.references:
            try:
                found.append(wanted(row, query))
            except SqlError:
                continue
        known = [one for one in found if one.says]
        return max(sql_match(row.answer or "", one) for one in known) if known else None

    return of_row


def _references_in(source: str) -> Callable[[Judged, str], Wanted]:
    """What a reference query of a row gives."""
    if source == OF_PROMPT:
        return lambda row, query: reference_result(query, schema_in(row.prompt))
    if source.endswith(DATABASES):
        image = _file(lambda: database_image(source), source)
        return lambda row, query: result_in_database(query, image)
    schema = Path(source).read_text(encoding="utf-8")
    return lambda row, query: reference_result(query, schema)


def _file(read: Callable[[], bytes], path: str) -> bytes:
    try:
        return read()
    except SqlError as error:
        raise InputError(f"this is no SQLite database: {error}", where=f"{KEY} {path}") from error


NO_METRICS = OwnMetrics({}, {})


def unscored(rows: Sequence[Judged], names: Sequence[str]) -> list[str]:
    """A warning for each own metric that says nothing of some rows."""
    found = []
    for name in names:
        missing = [row for row in rows if row.answer is not None and name not in row.scores]
        if missing:
            why = (
                "their reference query does not run, or gives nothing to compare with"
                if name == SQL_EXECUTION
                else "it was not measured on them"
            )
            found.append(f"{name} leaves out {len(missing)} of {len(rows)} rows, the first {missing[0].source}: {why}")
    return found
