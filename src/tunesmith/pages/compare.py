"""The page of `tunesmith compare`: what differs between runs, and what that did."""

from __future__ import annotations

from typing import Any

from tunesmith.pages.chart import Line, Style, interval_chart, line_chart
from tunesmith.pages.page import duration, number, plain, render, size
from tunesmith.pages.sections.metrics import metric_cells
from tunesmith.pages.sections.section import as_part
from tunesmith.pages.series import Point

STYLES: tuple[Style, ...] = ("solid", "marked", "dotted", "dashed")
SHOWN = {"better": "Better", "worse": "Worse", "no_difference": "No difference shown", None: "Not compared"}
FORMS = {"better": "ship", "worse": "dont_ship"}


def compare_page(found: dict[str, Any]) -> str:
    """Renders a comparison of runs to one HTML page that needs nothing beside itself.

    Args:
        found: what `pipeline.comparing.compare` gives.
    """
    part = as_part(found)
    comparisons = [
        {
            **one,
            "shown": SHOWN[one["verdict"]],
            "form": FORMS.get(one["verdict"], "no_difference"),
            "metrics": [metric_cells(row) for row in one["metrics"]],
            "chart": _intervals(one, at),
        }
        for at, one in enumerate(part["comparisons"])
    ]
    names = [run["name"] for run in part["runs"]]
    return render(
        "compare.html.j2",
        found=part,
        names=names,
        heading=" and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names),
        comparisons=comparisons,
        runs=[_run(run) for run in part["runs"]],
        settings=[(key, [_setting(value) for value in values]) for key, values in found["settings"].items()],
        curves=_curves(part["curves"]),
    )


def _setting(value: Any) -> str:
    return "not set" if value is None else str(plain(value))


def _run(run: Any) -> dict[str, Any]:
    values = {name: ", ".join(str(number(value)) for value in found) for name, found in run["values"].items()}
    return {**run, "values": values, "seconds": duration(run["seconds"]), "peak": size(run["peak_bytes"])}


def _intervals(one: Any, at: int) -> Any:
    return interval_chart(one["metrics"], identity=f"intervals-{at}", title=f"{one['run']}: difference of each metric")


def _curves(curves: list[Any]) -> list[tuple[str, Any]]:
    """A chart of each loss with a line for each run; the first four, for whom there are styles to tell them apart."""
    charts = []
    unlike = len({one["objective"] for one in curves}) > 1
    for key, name in (("validation", "Validation loss"), ("train", "Training loss")):
        drawn = [one for one in curves if one[key]]
        lines = [Line(one["run"], _points(one[key]), style) for one, style in zip(drawn, STYLES, strict=False)]
        beyond = [one["run"] for one in drawn[len(STYLES) :]]
        notes = [f"Not drawn, for want of room: {', '.join(beyond)}."] if beyond else []
        if unlike:
            notes.append("These runs minimise different things: their losses are not comparable.")
        if lines:
            desc = " ".join(f"{line.name} ends at {number(line.points[-1][1])}." for line in lines)
            chart = line_chart(lines, title=f"{name} by step", desc=desc, notes=notes, identity=f"compare-{key}")
            charts.append((name, chart))
    return charts


def _points(pairs: list[list[float | None]]) -> list[Point]:
    return [(float(x), y) for x, y in pairs if x is not None]
