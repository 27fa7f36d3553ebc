"""The numbers behind a chart: nice ticks, smoothing, and fewer points without losing what matters."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, fsum, log10

from tunesmith.pages.page import magnitude, number

Point = tuple[float, float | None]
"""A step and its value; ``None`` is a value that was not finite, and breaks the line."""

BUCKETS = 400
"""Columns that a long series is reduced to: finer than any screen shows, and each keeps its extremes."""


def ticks(low: float, high: float, target: int = 5, whole: bool = False) -> list[float]:
    """About ``target`` multiples of 1, 2 or 5 times a power of ten between ``low`` and ``high``."""
    power = 10.0 ** floor(log10((high - low) / target))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - target))
    if whole:
        step = max(1.0, float(round(step)))
    return [k * step for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def smoothed(points: Sequence[Point], places: int = BUCKETS) -> tuple[list[Point], int]:
    """A centred mean and the points it spans; empty for a short series.

    Centred, because a mean over the past alone lags behind a falling loss and draws it too high.
    """
    if sum(y is not None for _, y in points) < 12:
        return [], 0
    half = max(2, len(points) // 50)
    last = len(points) - 1
    result: list[Point] = []
    for index in range(0, last + 1, max(1, len(points) // places)):
        reach = min(half, index, last - index)
        window = [y for _, y in points[index - reach : index + reach + 1] if y is not None]
        gap = points[index][1] is None or not window
        result.append((points[index][0], None if gap else fsum(window) / len(window)))
    return result, 2 * half + 1


def downsampled(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most four points a bucket, first, last, lowest and highest, and every gap that lay between two of them."""
    if len(points) <= 4 * buckets:
        return list(points)
    result: list[Point] = []
    gaps = [0]
    for _, y in points:
        gaps.append(gaps[-1] + (y is None))
    before = 0
    for bucket in range(buckets):
        start, stop = len(points) * bucket // buckets, len(points) * (bucket + 1) // buckets
        finite = [(y, index) for index in range(start, stop) if (y := points[index][1]) is not None]
        chosen = {finite[0][1], finite[-1][1], min(finite)[1], max(finite)[1]} if finite else set()
        for index in sorted(chosen):
            if gaps[index] > gaps[before]:
                result.append((points[index][0], None))
            result.append(points[index])
            before = index
    return result


def widened(low: float, high: float, pad: float) -> tuple[float, float]:
    """A range that is never empty: ``pad`` is the share added at both ends."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or largest < 1e-200:
        half = largest * 0.1 if pad and largest >= 1e-200 else max(1.0, largest * 1e-6)
        return low - half, high + half
    return low - pad * (high - low), high + pad * (high - low)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with the digits that its distance from the next one asks for."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(abs(value), 1.0)
    if abs(value) < step * 1e-6:
        return "0"
    if max(abs(value), step) >= 1e6 or step < 1e-4:
        return f"{value:.3g}".replace("-", "−")
    if step >= 1000 and abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k".replace("-", "−")
    return str(number(value, max(0, -magnitude(step * 1.0001))))
