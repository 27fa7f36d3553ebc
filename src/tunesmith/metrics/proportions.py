"""Shares of rows: how sure one is, and how sure the difference of two is."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson(count: float, n: int, confidence: float) -> tuple[float, float] | None:
    """Score interval of a share (Wilson 1927, "Probable inference, the law of succession, and statistical inference").

    ``count`` may be a sum of scores between 0 and 1, such as wins with ties as halves: their variance is at most that
    of wins and losses alone with the same mean, so the interval is then too wide rather than too narrow.

    Args:
        count: of ``n`` independent rows, between 0 and ``n``.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end, both within 0 and 1; None without rows.

    Raises:
        ValueError: for a count outside 0 to ``n``, or a confidence outside (0, 1).
    """
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} rows is no share")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if n == 0:
        return None
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_of_shares(first: tuple[int, int], second: tuple[int, int], confidence: float) -> tuple[float, float]:
    """Interval of the difference of two independent shares, first minus second (Newcombe 1998, "Interval estimation
    for the difference between independent proportions", method 10: from the Wilson intervals of both).

    Args:
        first, second: count and number of rows, at least one row each.

    Raises:
        ValueError: without rows, or as `wilson`.
    """
    mine, others = wilson(*first, confidence), wilson(*second, confidence)
    if mine is None or others is None:
        raise ValueError("a share of no rows has no interval")
    (low, high), (other_low, other_high) = mine, others
    one, other = first[0] / first[1], second[0] / second[1]
    below = sqrt((one - low) ** 2 + (other_high - other) ** 2)
    above = sqrt((high - one) ** 2 + (other - other_low) ** 2)
    return one - other - below, one - other + above
