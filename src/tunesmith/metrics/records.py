"""Metrics of answers that are JSON: whether they are any, and how many fields are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tunesmith.base import InputError
from tunesmith.metrics.statistics import RowStatistics, mean_rows
from tunesmith.metrics.text import Metric, References, check_rows
from tunesmith.metrics.verifiers import json_value


def json_fields(answer: str, reference: Any) -> float:
    """The share of fields that answer and reference have in common, out of all that either has; 0 for no JSON.

    A field is a value that holds no others, known by the keys and positions that lead to it. Numbers are equal when
    they are (1 and 1.0), everything else when type and value are.

    Args:
        reference: the parsed value.
    """
    try:
        given = dict(_fields(json_value(answer)))
    except ValueError:
        return 0.0
    wanted = dict(_fields(reference))
    right = sum(place in given and _same(given[place], value) for place, value in wanted.items())
    return right / len(given.keys() | wanted.keys())


def _fields(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not value or not isinstance(value, dict | list):  # an empty object is a field too
        yield place, value
    for name, item in inner:
        yield from _fields(item, (*place, name))


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _validity_rows(predictions: Sequence[str], references: References) -> RowStatistics:
    check_rows(predictions, references)
    return mean_rows([_is_json(text) for text in predictions])


def _is_json(text: str) -> float:
    try:
        json_value(text)
    except ValueError:
        return 0.0
    return 1.0


def _field_rows(predictions: Sequence[str], references: References) -> RowStatistics:
    check_rows(predictions, references)
    values = [[_reference(text) for text in texts] for texts in references]
    return mean_rows(
        [max(json_fields(text, value) for value in row) for text, row in zip(predictions, values, strict=True)]
    )


def _reference(text: str) -> Any:
    try:
        return json_value(text)
    except ValueError as error:
        raise InputError(
            f"json_fields compares JSON, and the reference {text[:60]!r} is none",
            where="evaluate.metrics",
            fix="choose another metric, or correct the row",
        ) from error


RECORD_METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "json_valid",
            "higher",
            "0 to 1: the share of rows",
            "The answer, as a whole, is JSON (RFC 8259: no NaN, no text around it).",
            _validity_rows,
        ),
        Metric(
            "json_fields",
            "higher",
            "0 to 1: mean over rows",
            "Fields that are right out of all that answer and reference have between them, so that a missing and an "
            "invented field count alike; 0 for an answer that is no JSON.",
            _field_rows,
        ),
    )
}
"""Metrics of answers that are JSON, by name."""
