"""`tunesmith advise --measure`: the ladder as a table, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.importing import importing
from tunesmith.cli.tables import aligned, duration
from tunesmith.files import write_text

OVER = ("target", "output", "prices")
"""Flags that go before settings of the section `ladder`."""
OTHERS = ("measure", "html", "as_json", *OVER)


def run_ladder(recipe: Path, flags: Mapping[str, Any]) -> int:
    """Measures the ladder and shows it; the exit code is 3 when there is a target and no rung reaches it.

    Args:
        flags: the options of `tunesmith advise`, by name.

    Raises:
        InputError: when one of them is about the advice alone.
    """
    for name, value in flags.items():
        if name not in OTHERS and value not in (None, False, []):
            flag = "the file of answers" if name == "answers" else f"--{name.replace('_', '-')}"
            raise InputError(
                "this is for the advice or --cost, and --measure reads everything from the recipe",
                where=flag,
                fix="leave it out; settings of the ladder stand in the recipe's section `ladder`",
            )
    from tunesmith.recipe_ladder import read_ladder

    given = {name: flags[name] if name == "target" else str(flags[name]) for name in OVER if flags[name] is not None}
    spec, asked = read_ladder(recipe, given)
    if flags["html"] is not None and not Path(flags["html"]).parent.is_dir():
        raise InputError(
            "the page cannot be written: there is no such directory",
            where=flags["html"],
            fix="name a file in a directory that is there",
        )
    with importing():
        from tunesmith.pages.ladder import ladder_page
        from tunesmith.pipeline.finetune import Watcher
        from tunesmith.pipeline.ladder.measure import measure_ladder
    quiet_libraries()
    as_json = bool(flags["as_json"])
    with Display(as_json) as display:
        watcher = Watcher(display.progress)
        if not as_json:  # else the answer is one object, and training's events go nowhere
            watcher = Watcher(display.progress, display.event, lambda plan: display.planned_steps(plan.steps))
        report = measure_ladder(spec, asked, watcher)
    if flags["html"] is not None:
        write_text(flags["html"], ladder_page(report))
    if as_json:
        out(json.dumps(report, ensure_ascii=False))
    else:
        out("\n".join(ladder_lines(report)))
        out(f"\npage: {flags['html'] or Path(report['directory']) / 'report.html'}")
    return 3 if report.get("target") is not None and report["answer"]["by_value"] is None else 0


def ladder_lines(report: dict[str, Any]) -> list[str]:
    """The ladder as plain lines."""
    from tunesmith.pages.ladder import settings_text

    lines: list[str] = []
    if report["rungs"]:
        currency = report["prices"]["currency"]
        head = ["rung", report["metric"], "interval", "to zero-shot", "interval", "prompt", "answer", "median", "p90"]
        rows = [[*head, f"{currency}/1,000"], *(_cells(entry) for entry in report["rungs"])]
        lines += aligned(rows, right={1, 3, 5, 6, 7, 8, 9})
        lines += ["", report["answer"]["sentence"]]
        chosen = [(entry["name"], settings_text(entry["settings"])) for entry in report["rungs"]]
        lines += ["", *(f"{name}: {text}" for name, text in chosen if text)]
    if (facts := report["facts"]) is not None:
        rows = [["facts", "asked as trained", "interval", "in other words", "interval"]]
        for row in facts["rows"]:
            seen, other = row["as_trained"], row["in_other_words"]
            rows.append(
                [row["name"].replace("_", " + "), f"{seen['value']:.3f}", _span(seen)]
                + [f"{other['value']:.3f}", _span(other)]
            )
        lines += ["", *aligned(rows, right={1, 3}), "", facts["sentence"]]
    lines += [f"note: {text}" for text in report["notes"]]
    if report["rungs"]:
        lines.append(f"{report['rows']} held-out rows; prices of {report['prices']['date']}, training not in them")
    return lines


def _cells(entry: dict[str, Any]) -> list[str]:
    difference, latency, cost = entry["difference"], entry["latency"], entry["cost_per_1000"]
    return [
        entry["name"],
        f"{entry['value']:.4f}",
        _span(entry),
        "" if difference is None else f"{difference['difference']:+.4f}",
        "" if difference is None else _span(difference, "+"),
        f"{entry['prompt_tokens']:,.0f}",
        f"{entry['completion_tokens']:,.0f}",
        "" if latency["median"] is None else duration(latency["median"]),
        "" if latency["p90"] is None else duration(latency["p90"]),
        "" if cost is None else f"{cost:.4f}",
    ]


def _span(entry: dict[str, Any], sign: str = "") -> str:
    return "none" if entry["low"] is None else f"{entry['low']:{sign}.3f} … {entry['high']:{sign}.3f}"
