"""How sure a metric is, and how sure the difference between two systems on the same rows is.

The bootstrap draws n rows out of n with replacement, many times, and reads the interval off the percentiles of the
metric (Efron, 1979, "Bootstrap methods: another look at the jackknife"; Efron and Tibshirani, 1993, section 13.3). For
two systems both are scored on the same drawn rows, so that what makes a row hard for both cancels out (Koehn, 2004,
"Statistical significance tests for machine translation evaluation").

What it cannot do: it sees only the rows that were scored. On few rows (below about 30) the interval is too narrow, and
where all rows score alike it has width zero, which is no proof of certainty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.metrics.statistics import RowStatistics

DRAWS_AT_ONCE = 2**21
"""Rows drawn at once: bounds memory to some 60 MB; from about two million rows on it grows with their number."""


@dataclass(frozen=True)
class Estimate:
    """A metric of one system, in the metric's own unit; every number is finite, so that it can be written as JSON.

    Attributes:
        value: the metric over all rows.
        low: lower end of the interval; None where none can be stated: a single row, or a resample whose metric is not
            finite.
        high: upper end; None when ``low`` is.
        n: number of rows.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Interval:
    """The difference between two systems on the same rows, in the metric's own unit; finite like `Estimate`.

    Attributes:
        base: the metric of the base system over all rows.
        tuned: the metric of the tuned system over all rows.
        difference: ``tuned - base``; whether more is better is the metric's to say.
        low: lower end of the difference's interval; None as in `Estimate`.
        high: upper end; None when ``low`` is.
        n: number of rows.
    """

    base: float
    tuned: float
    difference: float
    low: float | None
    high: float | None
    n: int


def bootstrap(stat: RowStatistics, *, resamples: int, confidence: float, seed: int) -> Estimate:
    """Percentile bootstrap interval of one system's metric (Efron, 1979).

    Args:
        stat: statistics ``[n, k]``.
        resamples: how many times n rows are drawn.
        confidence: the share of the resamples that the interval holds, between 0 and 1, 0.95 for example.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: no rows, fewer than one resample, a confidence outside (0, 1), or a metric that is not finite.
    """
    _check(len(stat), resamples, confidence)
    value = _finite(stat.corpus(), "the metric")
    drawn = np.concatenate([_resampled(stat, counts) for counts in _counts(len(stat), resamples, seed)])
    low, high = _percentiles(drawn, confidence, len(stat))
    return Estimate(value, low, high, len(stat))


def paired_bootstrap(
    base: RowStatistics, tuned: RowStatistics, *, resamples: int, confidence: float, seed: int
) -> Interval:
    """Percentile bootstrap interval of ``tuned - base``, both scored on the same drawn rows (Koehn, 2004).

    Args:
        base: statistics ``[n, k]`` of the base system.
        tuned: statistics ``[n, k]`` of the tuned system: the same rows in the same order, the same metric.
        resamples: how many times n rows are drawn.
        confidence: the share of the resamples that the interval holds, between 0 and 1, 0.95 for example.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: unequal numbers of rows, no rows, fewer than one resample, a confidence outside (0, 1), or a metric
            that is not finite.
    """
    if len(base) != len(tuned):
        raise ValueError(f"paired systems need the same rows: base has {len(base)}, tuned has {len(tuned)}")
    _check(len(base), resamples, confidence)
    before, after = _finite(base.corpus(), "the base metric"), _finite(tuned.corpus(), "the tuned metric")
    difference = _finite(after - before, "the difference")
    drawn = np.concatenate(
        [_resampled(tuned, counts) - _resampled(base, counts) for counts in _counts(len(base), resamples, seed)]
    )
    low, high = _percentiles(drawn, confidence, len(base))
    return Interval(before, after, difference, low, high, len(base))


def bootstrap_over_seeds(
    base: Sequence[RowStatistics], tuned: Sequence[RowStatistics], *, resamples: int, confidence: float, seed: int
) -> tuple[Interval, float]:
    """Interval of the difference of two means over seeds, and its two-sided p-value.

    Rows and seeds are drawn independently, each with replacement, and all drawn seeds are scored on all drawn rows: the
    pigeonhole bootstrap of crossed data (Owen 2007), which is a little too wide. With three seeds an interval of 95 %
    covers what the best and the worst of them show, so that no verdict hangs on one lucky seed. The p-value is the
    share of draws on the other side of zero, twice, none counting as one (Davison & Hinkley 1997, section 4.2.3).

    Args:
        base: statistics ``[n, k]`` of each seed of the base system; a single one where that has no seeds.
        tuned: the same of the tuned system: the same rows in the same order.

    Raises:
        ValueError: as `paired_bootstrap`, and for no seeds.
    """
    every = [*base, *tuned]
    if not base or not tuned or len({len(stat) for stat in every}) > 1:
        raise ValueError("systems of several seeds need at least one each, and the same rows")
    n = len(every[0])
    _check(n, resamples, confidence)
    before, after = (float(np.mean([stat.corpus() for stat in stats])) for stats in (base, tuned))
    difference = _finite(_finite(after, "the tuned metric") - _finite(before, "the base metric"), "the difference")
    rng = np.random.default_rng([seed, 1])

    def drawn_mean(stats: Sequence[RowStatistics], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.stack([_resampled(stat, counts) for stat in stats], axis=-1)
        which = rng.integers(len(stats), size=values.shape)
        return np.take_along_axis(values, which, axis=-1).mean(axis=-1)

    drawn = np.concatenate(
        [drawn_mean(tuned, counts) - drawn_mean(base, counts) for counts in _counts(n, resamples, seed)]
    )
    low, high = _percentiles(drawn, confidence, n)
    beyond = min(int(np.sum(~(drawn > 0))), int(np.sum(~(drawn < 0))))
    return Interval(before, after, difference, low, high, n), min(1.0, 2 * (beyond + 1) / (resamples + 1))


def _check(n: int, resamples: int, confidence: float) -> None:
    if n == 0:
        raise ValueError("there are no rows to draw from")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def _counts(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yields ``[some, n]``: how often each row was drawn, multinomial; the draws do not depend on the chunking."""
    rng = np.random.default_rng(seed)
    chunk = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, chunk):
        some = min(chunk, resamples - start)
        # counting uniform draws is a multinomial draw, and much faster than Generator.multinomial's n binomials
        drawn = rng.integers(n, size=(some, n))
        drawn += np.arange(some)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=some * n).reshape(some, n).astype(np.float64)


def _resampled(stat: RowStatistics, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    # an undefined metric of one resample is an answer here (no interval), not an accident to warn about
    with np.errstate(all="ignore"):
        return stat.value(counts @ stat.values)


def _percentiles(drawn: NDArray[np.float64], confidence: float, n: int) -> tuple[float | None, float | None]:
    # one row gives the same resample every time, and [v, v] would claim certainty; percentiles of the finite resamples
    # alone would leave out exactly the extremes
    if n == 1 or not np.isfinite(drawn).all():
        return None, None
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    if not (np.isfinite(low) and np.isfinite(high)):
        return None, None
    return float(low), float(high)


def _finite(value: float, name: str) -> float:
    if not np.isfinite(value):
        raise ValueError(f"{name} over all rows is {value}, not a finite number")
    return value
