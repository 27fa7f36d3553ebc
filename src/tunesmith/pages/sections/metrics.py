"""Metrics of base and tuned model with intervals, as a table and as a chart."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunesmith.pages.chart import interval_chart, reading
from tunesmith.pages.page import count, fragment, is_number, magnitude, number
from tunesmith.pages.sections.section import Part, Section


def metrics(report: Part) -> Markup:
    """The table of all metrics, and of each task apart."""
    return fragment(
        "sections/metrics.html.j2",
        report=report,
        tests=sorted({row["test"] for row in report["metrics"] or [] if row["test"]}),
        metrics=[metric_cells(row) for row in report["metrics"] or []],
        prompted=[_alone(row) for row in report["prompted"] or []],
        tasks=[
            (task["name"], task["rows"], [metric_cells(row) for row in task["metrics"]])
            for task in report["tasks"] or []
        ],
    )


def intervals(report: Part) -> Markup:
    """The same differences, drawn."""
    rows = report["metrics"] or []
    return fragment("sections/intervals.html.j2", metrics=rows, interval_chart=interval_chart(rows))


def metric_cells(row: Part) -> dict[str, Any]:
    """An entry of `metrics` as texts for a table."""
    decimals = _decimals(row)
    shown = reading(row)
    low, high = (number(row[end], decimals, sign=True) for end in ("low", "high"))
    way = {"higher": "higher is better", "lower": "lower is better"}.get(row["better"], "direction not recorded")
    return {
        "name": row["name"],
        "primary": bool(row["primary"]),
        "way": way,
        "base": number(row["base"], decimals),
        "tuned": number(row["tuned"], decimals),
        "difference": number(row["difference"], decimals, sign=True),
        "interval": "no interval" if shown == "no interval" else f"{low} to {high}",
        "shown": shown,
        "p": _chance(row),
        "n": "n not recorded" if row["n"] is None else f"{count(row['n'])} rows",
    }


def _chance(row: Part) -> str | None:
    """The p-value in words; None where none is recorded."""
    p = row["p"] if row["p_corrected"] is None else row["p_corrected"]
    if not is_number(p):
        return None
    return f"{'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}{', corrected' if p != row['p'] else ''}"


def _decimals(row: Part) -> int:
    """Enough digits to show both ends of the interval apart, and the values to four digits."""
    values = [value for name in ("base", "tuned") if is_number(value := row[name])]
    scale = max((magnitude(value) for value in values if value), default=0)
    spread = [value for name in ("low", "high", "difference") if is_number(value := row[name]) and value]
    finest = magnitude(max(spread, key=abs)) if spread else 0
    return min(6, max(3 - max(0, scale), 1 - finest, 0))


def _alone(row: Part) -> tuple[Any, str | None, str]:
    """Name, value and interval of one model's metric."""
    low, high = (number(row[end], 3) for end in ("low", "high"))
    return row["name"], number(row["value"], 3), "no interval" if row["low"] is None else f"{low} to {high}"


METRICS = Section("metrics", "Metrics", metrics)
INTERVALS = Section("intervals", "Differences", intervals)
