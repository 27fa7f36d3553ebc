"""Whether a difference between two systems on the same rows may be chance, and what several tests at once allow.

An interval says how large a difference may be; a test says how often chance alone would make one as large. On few rows
the percentile bootstrap is too narrow, and these tests are not: with three rows no answer can prove anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.metrics.intervals import DRAWS_AT_ONCE
from tunesmith.metrics.statistics import RowStatistics

EXACT_UP_TO = 12
"""Rows up to which every exchange of answers is tried instead of some drawn ones."""

EXACT, PERMUTATION = "exact McNemar", "paired permutation"


def paired_test(base: RowStatistics, tuned: RowStatistics, *, resamples: int, seed: int) -> tuple[float, str]:
    """The two-sided p-value of a difference, and the test that gives it: exact where rows are right or wrong.

    Args:
        base, tuned: statistics ``[n, k]`` of the same rows and metric.
        resamples: exchanges drawn by the permutation test.
    """
    if base.is_binary and tuned.is_binary:
        before, after = base.values[:, 1], tuned.values[:, 1]
        return mcnemar_exact(int(np.sum(before > after)), int(np.sum(after > before))), EXACT
    return paired_permutation(base, tuned, resamples=resamples, seed=seed), PERMUTATION


def mcnemar_exact(only_base: int, only_tuned: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947; binomial form): rows that both get right, or both wrong, say nothing.

    Args:
        only_base, only_tuned: rows that only one of the two gets right.
    """
    count, fewer = only_base + only_tuned, min(only_base, only_tuned)
    # sum of binomials over 2^count as whole numbers: no rounding, however many rows
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def paired_permutation(base: RowStatistics, tuned: RowStatistics, *, resamples: int, seed: int) -> float:
    """Two-sided paired permutation test, also called approximate randomisation (Noreen 1989; Riezler & Maxwell 2005).

    If the two systems were alike, any row's answers could be exchanged between them; the p-value is the share of
    exchanges whose difference is at least as large. Exact up to twelve rows; above, the exchange that was seen counts
    as one of those drawn, so that p is never zero (Phipson & Smyth 2010).

    Raises:
        ValueError: unequal numbers of rows, or none.
    """
    n = len(base)
    if n != len(tuned) or not n:
        raise ValueError(f"paired systems need the same rows: base has {n}, tuned has {len(tuned)}")
    seen = abs(tuned.corpus() - base.corpus())
    total, apart = base.values.sum(axis=0), tuned.values - base.values
    at_least = drawn = 0
    for swapped in _exchanges(n, resamples, seed):
        moved = swapped @ apart
        after, before = total + apart.sum(axis=0) - moved, total + moved
        with np.errstate(all="ignore"):
            found = np.abs(tuned.value(after) - base.value(before))
        # an exchange whose metric is not finite cannot speak against chance; equal sums may differ in the last digit
        at_least += int(np.sum(~(found < seen - 1e-12 * max(1.0, seen))))
        drawn += len(swapped)
    return at_least / drawn if n <= EXACT_UP_TO else (at_least + 1) / (drawn + 1)


def _exchanges(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yields ``[some, n]``: 1 where a row's answers are exchanged."""
    if n <= EXACT_UP_TO:
        yield ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    chunk = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, chunk):
        yield rng.integers(2, size=(min(chunk, resamples - start), n)).astype(np.float64)


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for being several (Holm 1979): below alpha, the chance of any false finding is at most alpha.

    Args:
        values: p-values of one family of tests, in any order.
    """
    order = sorted(range(len(values)), key=lambda at: values[at])
    found, highest = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[at]))
        found[at] = highest
    return found
