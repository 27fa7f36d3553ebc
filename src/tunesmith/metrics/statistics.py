"""Metrics as sums over rows, so that one resampling serves every metric, corpus-level ones included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """What each row contributes to a metric, and the metric as a function of the contributions' sums.

    A corpus metric such as BLEU is no mean of row scores, but it is a function of sums over rows; so is every mean,
    with the row count as one of the sums. sacrebleu's significance tests rest on the same idea.

    Attributes:
        values: float64 ``[n, k]``, finite. Where the metric is a mean, the first column is the row count, 1.
        value: maps sums ``[..., k]`` over rows, each counted a whole number of times, to the metric ``[...]``.

    Raises:
        ValueError: ``values`` is not two-dimensional, or a row is not finite (it would spoil every sum that it is in,
            and leaving it out in silence would score a different set of rows).
    """

    values: NDArray[np.float64]
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"row statistics must have shape [n, k], not {list(self.values.shape)}")
        bad = np.flatnonzero(~np.isfinite(self.values).all(axis=1))
        if bad.size:
            raise ValueError(f"{bad.size} of {len(self)} rows have a statistic that is not finite, first row {bad[0]}")

    def __len__(self) -> int:
        """Number of rows, n."""
        return self.values.shape[0]

    @property
    def is_binary(self) -> bool:
        """Whether the metric is the share of rows that are right, each being right or wrong."""
        return self.value is _mean and bool(np.isin(self.values[:, 1], (0.0, 1.0)).all())

    def corpus(self) -> float:
        """The metric over all rows. Raises ValueError where there are none."""
        if not len(self):
            raise ValueError("a metric over no rows has no value")
        return float(self.value(self.values.sum(axis=0)))

    def per_row(self) -> NDArray[np.float64]:
        """The metric of each row alone, ``[n]``; its mean is the corpus metric only where that is a mean."""
        return self.value(self.values)


def mean_rows(scores: ArrayLike) -> RowStatistics:
    """Statistics of a metric that is the mean of one score a row.

    Args:
        scores: ``[n]``, finite.
    """
    column = np.asarray(scores, dtype=np.float64)
    return RowStatistics(np.stack([np.ones_like(column), column], axis=-1), _mean)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 1] / sums[..., 0]


BINS = 10


def calibration_rows(margins: ArrayLike) -> RowStatistics:
    """Expected calibration error of the better answer's probability, sigmoid(margin), in ten equal bins of confidence
    (Guo et al. 2017, equation 3).

    Args:
        margins: ``[n]``, in nats: by how much the better answer of each pair is found better.
    """
    given = np.asarray(margins, dtype=np.float64)
    return confidence_rows(1 / (1 + np.exp(-np.abs(given))), (given > 0) + 0.5 * (given == 0))


def confidence_rows(confidences: ArrayLike, right: ArrayLike) -> RowStatistics:
    """Expected calibration error: how far confidence and share of right answers lie apart, in ten equal bins of
    confidence, weighted by their rows (Guo et al. 2017, equation 3; Naeini et al. 2015).

    Args:
        confidences: ``[n]``, the probability that the model gives its own answer.
        right: ``[n]``, whether it is right: 1 or 0.
    """
    confidence, right = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    values = np.zeros((len(confidence), 1 + BINS))
    values[:, 0] = 1.0
    values[np.arange(len(confidence)), 1 + which] = confidence - right
    return RowStatistics(values, lambda sums: np.abs(sums[..., 1:]).sum(axis=-1) / sums[..., 0])
