"""`tunesmith runs`, `tunesmith runs verify` and `tunesmith rerun`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned
from tunesmith.resolved import Plan
from tunesmith.run import PLAN, SEEDS, Run, find_runs

COLUMNS = ("run", "state", "steps", "model", "method", "verdict")
SIGNS = {"ok": "✓", "changed": "✗", "gone": "!", "not checked": "·"}


def show_runs(root: Path, *, as_json: bool) -> None:
    """Lists runs, each below the one that it comes from, or below the chain that it is a stage of."""
    from tunesmith.pipeline.chain import Chain

    found = [run for run in find_runs(root) if (run.path / PLAN).is_file() or Chain.is_here(run.path)]
    found += [Run(path.parent) for path in sorted(root.rglob(SEEDS))]
    listed = _as_tree([_summary(run) for run in found])
    if as_json:
        out(json.dumps([summary for _, summary in listed]))
    elif not listed:
        out(f"no runs in {root}")
    else:
        rows = []
        for depth, summary in listed:
            cells = [str(summary[name] if summary[name] is not None else "–") for name in COLUMNS]
            rows.append([f"{'  ' * (depth - 1)}└ {cells[0]}" if depth else cells[0], *cells[1:]])
        out("\n".join(aligned([list(COLUMNS), *rows])))


def _summary(run: Run) -> dict[str, Any]:
    """One line about a run, with its parents; one that cannot be read is listed as such."""
    import yaml

    from tunesmith.base import InputError
    from tunesmith.pipeline.chain import Chain, chain_of

    try:
        if Chain.is_here(run.path):
            return {**Chain.open(run.path).summary(), "parents": []}
        if (run.path / SEEDS).is_file():
            from tunesmith.pipeline.seeds import Seeds

            return {**Seeds.open(run.path).summary(), "parents": []}
        above = chain_of(run)
        seeds = [Path(os.path.abspath(run.path)).parent] if (run.path.parent / SEEDS).is_file() else []
        parents = [*_parents(run), *([] if above is None else [above]), *seeds]
        return {**run.summary(), "parents": [str(path) for path in parents]}
    except (InputError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {**dict.fromkeys(COLUMNS), "run": str(run.path), "state": "damaged", "parents": []}


def _parents(run: Run) -> list[Path]:
    from tunesmith.pipeline.lineage import parent_directory, read_lineage

    lineage = read_lineage(run)
    return [] if lineage is None else [parent_directory(run, parent) for parent in lineage["parents"]]


def _as_tree(summaries: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Depth and summary of every run: parents before their children, which else keep their order."""
    places = {os.path.abspath(summary["run"]): summary for summary in summaries}
    above = {place: next((one for one in item["parents"] if one in places), None) for place, item in places.items()}
    listed: list[tuple[int, dict[str, Any]]] = []
    left = dict.fromkeys(places)

    def put(place: str, depth: int) -> None:
        del left[place]
        listed.append((depth, places[place]))
        for child, parent in above.items():
            if parent == place and child in left:
                put(child, depth + 1)

    for place in places:
        if above[place] is None:
            put(place, 0)
    while left:  # parents that are each other's can only come from directories that changed places
        put(next(iter(left)), 0)
    return listed


def show_verification(path: Path, *, as_json: bool) -> int:
    """Says of every part of a run whether it is what it was; returns the exit code: 0, or 2 when something changed."""
    from tunesmith.pipeline.chain import Chain
    from tunesmith.pipeline.verifying import verify_run

    if Chain.is_here(path):
        begun = [stage.run.path for stage in Chain.open(path).stages if stage.begun]
        return max([0, *(show_verification(one, as_json=as_json) for one in begun)])
    run = Run.open(path)
    with Display(as_json) as display:
        parts = verify_run(run, display.progress)
    changed = [part for part in parts if part.state == "changed"]
    if as_json:
        out(json.dumps({"run": str(path), "changed": bool(changed), "parts": [part.as_json() for part in parts]}))
        return 2 if changed else 0
    rows = aligned([[f"{SIGNS[part.state]} {part.state}", part.name, part.detail] for part in parts])
    for part, line in zip(parts, rows, strict=True):
        out(line)
        for finding in part.findings[1:]:
            out(f"    {finding}")
        if part.fix:
            out(f"  → {part.fix}")
    unsure = [part.name for part in parts if part.state != "ok"]
    if changed:
        out(f"\n{path}: {len(changed)} of {len(parts)} parts changed: {', '.join(part.name for part in changed)}")
    else:
        out(f"\n{path}: all that is here is as it was" + (f"; not checked: {', '.join(unsure)}" if unsure else ""))
    return 2 if changed else 0


def run_again(path: Path, overrides: Sequence[str], *, resume: bool, as_json: bool) -> int:
    """Trains a run's recipe again and compares; returns the exit code: 0, or 3 when a gate said no."""
    from tunesmith.cli.tables import plan_lines, report_lines
    from tunesmith.pipeline.finetune import Watcher
    from tunesmith.pipeline.rerun import plan_rerun, rerun
    from tunesmith.train.parallel import is_main

    quiet_libraries()
    again = plan_rerun(path, overrides, resume=resume)
    with Display(as_json) as display:

        def planned(plan: Plan) -> None:
            display.planned_steps(plan.steps)
            if not as_json and is_main():
                display.line(f"{again.old.path} again, into {again.recipe.output}\n")
                display.line("\n".join(plan_lines(plan, again.recipe.model.path)) + "\n")

        run, comparison = rerun(again, Watcher(display.progress, display.event, planned))
    if comparison is None:
        return 0
    report: dict[str, Any] = run.report or {}
    if as_json:
        out(json.dumps({"event": "comparison", **comparison}))
    else:
        out("\n".join([*report_lines(report), "", *comparison_lines(comparison)]))
        out(f"report: {run.page}")
    return 3 if report["gate"] and report["verdict"] != "ship" else 0


def comparison_lines(comparison: dict[str, Any]) -> list[str]:
    """Two runs side by side, as they are printed."""
    lines = [comparison["sentence"]]
    lines += [f"changed: {key} {_shown(old)} → {_shown(new)}" for key, (old, new) in comparison["changed"].items()]
    if comparison["metrics"]:
        rows = [["metric", "old", "new", "difference", "interval", "rows", "better"]]
        for entry in comparison["metrics"]:
            span = "none" if entry["low"] is None else f"{entry['low']:+.4f} … {entry['high']:+.4f}"
            figures = [f"{entry['old']:.4f}", f"{entry['new']:.4f}", f"{entry['difference']:+.4f}"]
            rows.append([entry["name"], *figures, span, str(entry["n"]), entry["better"]])
        lines += aligned(rows, right={1, 2, 3, 5})
    elif not comparison["same_rows"]:
        lines += aligned([["run", "metric", "base", "tuned", "rows"], *_own_rows(comparison)], right={2, 3, 4})
    return [*lines, *[f"warning: {text}" for text in comparison["warnings"]]]


def _own_rows(comparison: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in ("old", "new"):
        result = comparison["results"][name]
        if result is None or not result["metrics"]:
            rows.append([comparison[name], "nothing was measured", "–", "–", "–"])
        for entry in result["metrics"] if result is not None else []:
            figures = [f"{entry['base']:.4f}", f"{entry['tuned']:.4f}", str(entry["n"])]
            rows.append([comparison[name], entry["name"], *figures])
    return rows


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
