"""Metrics of labels, of entities in labelled words, and of numbers; predictions are given as texts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tunesmith.base import InputError
from tunesmith.metrics.statistics import RowStatistics, mean_rows
from tunesmith.metrics.text import Metric, References, check_rows

BETWEEN = " | "
"""Stands between the labels of a row that has several."""


def _f1_rows(predictions: Sequence[str], references: References, *, macro: bool) -> RowStatistics:
    """Hits, predictions and references of every label: ``[n, 3 × labels]``."""
    check_rows(predictions, references)
    said = [_labels(text) for text in predictions]
    wanted = [set().union(*map(_labels, texts)) for texts in references]
    known = sorted(set().union(*said, *wanted))
    column = {label: at for at, label in enumerate(known)}
    values = np.zeros((len(said), 3, len(known)))
    for row, (given, right) in enumerate(zip(said, wanted, strict=True)):
        for kind, labels in enumerate((given & right, given, right)):
            values[row, kind, [column[label] for label in labels]] = 1
    if not macro:
        return RowStatistics(values.sum(axis=2), _micro_f1)
    return RowStatistics(values.reshape(len(said), -1), partial(_macro_f1, len(known)))


def _labels(text: str) -> set[str]:
    return {label.strip() for label in text.split(BETWEEN) if label.strip()}


def _micro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    hits, given, right = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.where(given + right > 0, 2 * hits / np.maximum(given + right, 1), 1.0)


def _macro_f1(labels: int, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    hits, given, right = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, labels), -2, 0)
    there = given + right > 0
    each = np.where(there, 2 * hits / np.maximum(given + right, 1), 0.0)
    return each.sum(-1) / np.maximum(there.sum(-1), 1)


def confusion(
    predictions: Sequence[str], references: References, most: int = 30
) -> tuple[list[str], NDArray[np.int64]] | None:
    """How often each label was given for each right one, as `accuracy` compares them.

    Args:
        most: with more labels than this there is no table to be read.

    Returns:
        The right labels, sorted, and counts ``[labels, labels + 1]``: a row for each right label, the last column for
        answers that are no label; None where answers are no single labels.
    """
    check_rows(predictions, references)
    spelled = {texts[0].strip().casefold(): texts[0].strip() for texts in references}
    several = any(len(texts) > 1 or BETWEEN in texts[0] for texts in references)
    if several or not 1 < len(spelled) <= most or len(spelled) > len(references) / 2:
        return None
    place = {label: at for at, label in enumerate(sorted(spelled))}
    counts = np.zeros((len(place), len(place) + 1), dtype=np.int64)
    for given, texts in zip(predictions, references, strict=True):
        counts[place[texts[0].strip().casefold()], place.get(given.strip().casefold(), -1)] += 1
    return [spelled[label] for label in place], counts


def _entity_rows(predictions: Sequence[str], references: References) -> RowStatistics:
    """Hits, predictions and references among the entities of each row: ``[n, 3]``."""
    from seqeval.metrics.sequence_labeling import get_entities

    check_rows(predictions, references)
    values = np.zeros((len(predictions), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns of every tag that names no entity
        for row, (given, texts) in enumerate(zip(predictions, references, strict=True)):
            found, right = set(get_entities(given.split())), set(get_entities(texts[0].split()))
            values[row] = len(found & right), len(found), len(right)
    return RowStatistics(values, _micro_f1)


def _word_rows(predictions: Sequence[str], references: References) -> RowStatistics:
    check_rows(predictions, references)
    values = np.zeros((len(predictions), 2))
    for row, (given, texts) in enumerate(zip(predictions, references, strict=True)):
        words = texts[0].split()
        values[row] = len(words), sum(a == b for a, b in zip(given.split(), words, strict=False))
    return RowStatistics(values, lambda sums: sums[..., 1] / np.maximum(sums[..., 0], 1))


def _numbers(name: str, predictions: Sequence[str], references: References) -> tuple[np.ndarray, np.ndarray]:
    check_rows(predictions, references)
    return np.array([_number(name, text) for text in predictions]), np.array(
        [_number(name, texts[0]) for texts in references]
    )


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"{name} compares numbers, and {text[:40]!r} is none", where="evaluate.metrics", fix="choose another metric"
        )
    return value


def _rmse(predictions: Sequence[str], references: References) -> RowStatistics:
    given, right = _numbers("rmse", predictions, references)
    squares = (given - right) ** 2
    return RowStatistics(
        np.stack([np.ones_like(squares), squares], axis=-1), lambda sums: np.sqrt(sums[..., 1] / sums[..., 0])
    )


def _mae(predictions: Sequence[str], references: References) -> RowStatistics:
    given, right = _numbers("mae", predictions, references)
    return mean_rows(np.abs(given - right))


def _pearson(predictions: Sequence[str], references: References) -> RowStatistics:
    x, y = _numbers("pearson", predictions, references)
    x, y = x - x.mean(), y - y.mean()  # sums of squares of large numbers would lose their digits
    return RowStatistics(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=-1), _correlation)


def _correlation(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
    return np.where(spread > 0, (xy - x * y / n) / np.maximum(spread, 1e-300), 0.0)


_UNIT = "0 to 1"

LABEL_METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "macro_f1",
            "higher",
            f"{_UNIT}: mean over labels",
            "F1 of each label, averaged over the labels that occur, so that rare ones count as much as common ones "
            "(scikit-learn's f1_score with average='macro').",
            partial(_f1_rows, macro=True),
        ),
        Metric(
            "micro_f1",
            "higher",
            f"{_UNIT}: of all labels together",
            "F1 over all pairs of rows and labels (scikit-learn's f1_score with average='micro').",
            partial(_f1_rows, macro=False),
        ),
        Metric(
            "entity_f1",
            "higher",
            f"{_UNIT}: of all entities",
            "F1 of entities, right when type, first and last word are (Tjong Kim Sang & De Meulder 2003; library "
            "seqeval, its default mode).",
            _entity_rows,
        ),
        Metric(
            "word_accuracy", "higher", f"{_UNIT}: of all words", "The share of words with the right label.", _word_rows
        ),
        Metric("rmse", "lower", "0 at best", "Root of the mean squared difference of two numbers.", _rmse),
        Metric("mae", "lower", "0 at best", "Mean absolute difference of two numbers.", _mae),
        Metric(
            "pearson",
            "higher",
            "-1 to 1",
            "Correlation of predicted and right numbers; 0 where all predictions are the same.",
            _pearson,
        ),
    )
}
