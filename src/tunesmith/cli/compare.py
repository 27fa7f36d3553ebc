"""`tunesmith compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.cli.display import out, quiet_libraries
from tunesmith.cli.tables import aligned
from tunesmith.files import write_text

SHOWN = {"better": "better", "worse": "worse", "no_difference": "no difference shown", "no_interval": "no interval"}
SHORT = 160
"""Characters of an answer that a terminal shows."""


def run_comparison(paths: Sequence[Path], *, html: Path | None, samples: int, as_json: bool) -> None:
    """Compares runs with the first of them, or one with its base."""
    from tunesmith.pages.compare import compare_page
    from tunesmith.pipeline.comparing import compare

    quiet_libraries()
    found = compare(paths)
    if html is not None:
        try:
            write_text(html, compare_page(found))
        except OSError as error:
            raise InputError(
                f"the page cannot be written: {error.strerror}", where=html, fix="name another file"
            ) from error
    if as_json:
        out(json.dumps(found))
        return
    out("\n".join(compare_lines(found, samples)))
    if html is not None:
        out(f"page: {html}")


def compare_lines(found: dict[str, Any], samples: int) -> list[str]:
    """A comparison as it is printed."""
    lines = [one["sentence"] for one in found["comparisons"]]
    names = [run["name"] for run in found["runs"]]
    if len(names) > 1:
        rows = [[key, *[_setting(value) for value in values]] for key, values in found["settings"].items()]
        lines += ["", *(aligned([["setting", *names], *rows]) if rows else ["no setting differs"])]
    table = [["run", "metric", found["against"], "here", "difference", "interval", "p", "shown"]]
    for one in found["comparisons"]:
        for entry in one["metrics"]:
            span = "none" if entry["low"] is None else f"{entry['low']:+.4f} … {entry['high']:+.4f}"
            figures = [f"{entry['base']:.4f}", f"{entry['tuned']:.4f}", f"{entry['difference']:+.4f}", span]
            table.append([one["run"], entry["name"], *figures, f"{entry['p_corrected']:.3f}", SHOWN[entry["shown"]]])
    lines += ["", *aligned(table, right={2, 3, 4})]
    lines += [
        f"{run['name']}: seeds {', '.join(map(str, run['seeds']))}: {name} {', '.join(f'{v:.4f}' for v in values)}"
        for run in found["runs"]
        if len(run["seeds"]) > 1
        for name, values in list(run["values"].items())[:1]
    ]
    for row in found["samples"][:samples]:
        lines += ["", row["source"], *(f"  reference: {_short(text)}" for text in row["references"][:1])]
        lines += [f"  {one['run']} ({one['score']:.3g}): {_short(one['answer'])}" for one in row["answers"]]
    lines.append("")
    return [*lines, *[f"warning: {text}" for text in found["warnings"]]]


def _short(text: str | None) -> str:
    if text is None:
        return "no answer is written"
    told = " ".join(text.split())
    return told if len(told) <= SHORT else f"{told[: SHORT - 1]}…"


def _setting(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
