"""`tunesmith evaluate --benchmarks` and `tunesmith runs forgetting`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned


def run_benchmark_evaluation(
    target: str, names: Sequence[str], *, limit: int | None, shots: int | None, data: str | None, as_json: bool
) -> None:
    """Judges a model on benchmarks; what has a base is compared with it, item by item."""
    from tunesmith.evaluation.benchmarks import Asked
    from tunesmith.pipeline.benchmarks import benchmarks_of

    quiet_libraries()
    with Display(as_json) as display:
        found = benchmarks_of(target, Asked(tuple(dict.fromkeys(names)), limit, shots, data), display.progress)
    if as_json:
        out(json.dumps({"model": target, **found}))
        return
    out(f"{target} on benchmarks" + (f" (at most {limit} items of each task)" if limit else ""))
    out("\n".join(aligned(_table(found["benchmarks"]), right={3, 4, 5, 6})))
    for note in found["notes"]:
        out(f"note: {note}")
    out("items: " + ", ".join(sorted(set(found["sources"].values()))))


def show_forgetting(path: Path, *, as_json: bool) -> None:
    """Measures every checkpoint of a run, and writes the table and the page into it."""
    from tunesmith.pages.forgetting import forgetting_page
    from tunesmith.pipeline.forgetting_curve import CURVE, CURVE_PAGE, forgetting_curve
    from tunesmith.run import Run

    run = Run.open(path)
    quiet_libraries()
    with Display(as_json) as display:
        curve = forgetting_curve(run, display.progress)
    run.write(CURVE, curve)
    run.write_text(CURVE_PAGE, forgetting_page(run.path.name, curve))
    if as_json:
        out(json.dumps({"run": str(path), **curve}))
        return
    rows = [["step", curve["metric"], "general text", "interval"]]
    for point in curve["points"]:
        span = "" if point["low"] is None else f"{point['low']:+.1%} … {point['high']:+.1%}"
        rows.append([str(point["step"]), f"{point['score']:.4f}", f"{point['change']:+.1%}", span])
    out("\n".join(aligned(rows, right={0, 1, 2})))
    out(curve["sentence"])
    out(f"page: {run.path / CURVE_PAGE}")


def _table(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    compared = bool(entries) and "tuned" in entries[0]
    names = ("base", "tuned", "difference") if compared else ("value",)
    rows = [["benchmark", "skill", "metric", *names, "interval", "items", "shots"]]
    for entry in entries:
        low, high = entry["low"], entry["high"]
        sign = "+" if compared else ""
        span = "none" if low is None else f"{low:{sign}.4f} … {high:{sign}.4f}"
        figures = [f"{entry[name]:{'+' if name == 'difference' else ''}.4f}" for name in names]
        head = [entry["name"], entry["skill"], entry["metric"]]
        rows.append([*head, *figures, span, str(entry["n"]), str(entry["shots"])])
    return rows
