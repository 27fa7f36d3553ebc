"""`tunesmith evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned, memorisation_lines


def run_evaluation(
    target: str,
    data: list[str],
    *,
    metrics: list[str] | None,
    rows: int,
    as_json: bool,
    only: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Judges a model on each file; what has a base is compared with it, row by row.

    Args:
        only: options that are about benchmarks, where none are asked for.

    Raises:
        InputError: without anything to judge on, and for an option that would do nothing.
    """
    if ignored := next((name for name, value in only.items() if value is not None), None):
        raise InputError(f"{ignored} is about benchmarks, and none are asked for", fix="add --benchmarks hellaswag")
    from tunesmith.data.spec import DataSpec
    from tunesmith.pipeline.loaded import compare_with_base
    from tunesmith.recipe import EvaluateSpec

    if not data:
        raise InputError(
            "there is nothing to judge on",
            where="--data",
            fix="name a file of rows: --data held-out.jsonl, or benchmarks: --benchmarks hellaswag,arc_easy",
        )
    quiet_libraries()
    spec = EvaluateSpec(metrics=[*metrics] if metrics else "auto", rows=rows)
    with Display(as_json) as display:
        results = compare_with_base(target, [DataSpec(train=path) for path in data], spec, display.progress)
    if as_json:
        out(json.dumps({"model": target, "results": results}))
        return
    for path, entries in zip(data, results, strict=True):
        out(f"{target} on {path}")
        out("\n".join(aligned(_table(entries["metrics"]), right={1, 2, 3})))


def run_probe(target: str, *, rows: int, as_json: bool) -> None:
    """Asks a run and its base for training answers."""
    from tunesmith.pipeline.memorised_run import memorisation_of_run

    quiet_libraries()
    with Display(as_json) as display:
        found = memorisation_of_run(target, rows, display.progress)
    if as_json:
        out(json.dumps({"model": target, "memorisation": found}))
        return
    out("\n".join([*memorisation_lines(found), *[f"warning: {text}" for text in found["warnings"]]]))


def _table(entries: list[dict[str, Any]]) -> list[list[str]]:
    compared = bool(entries) and "tuned" in entries[0]
    figures = ["base", "tuned", "difference"] if compared else ["value"]
    rows = [["metric", *figures, "interval", "rows"]]
    for entry in entries:
        rows.append([entry["name"], *[f"{entry[name]:.4f}" for name in figures], _span(entry), str(entry["n"])])
    return rows


def _span(entry: dict[str, Any]) -> str:
    return "none" if entry["low"] is None else f"{entry['low']:.4f} … {entry['high']:.4f}"
