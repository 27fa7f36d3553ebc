"""The page of ``data check --html``: whether training would take the rows, and everything found in them."""

from __future__ import annotations

from typing import Any

from tunesmith.data.check.finding import counted, share
from tunesmith.pages.histogram import histogram_chart, span
from tunesmith.pages.page import render

LEVELS = (
    ("problem", "Problems", "Wrong, and training may refuse the rows for it."),
    ("warning", "Warnings", "Training takes these rows or leaves them out; the model may suffer."),
    ("note", "Notes", "Worth knowing, and often meant."),
)
FORMS = {"problem": "failed", "warning": "unsure", "note": "calm"}
"""How the state of each level is drawn: filled, broken line, plain line."""

OPEN = 5
"""Instances that are seen without a click."""


def check_page(found: dict[str, Any]) -> str:
    """Renders what a check found to one HTML page that needs nothing beside itself.

    Args:
        found: ``Checked.as_json()``; ``fixed`` too when a cleaned file was written: ``path``, ``dropped_list``,
            ``rows_kept`` and ``rows_dropped``.
    """
    groups = []
    for level, name, lead in LEVELS:
        findings = [_finding(finding) for finding in found["findings"] if finding["level"] == level]
        groups.append({"level": level, "name": name, "lead": lead, "form": FORMS[level], "findings": findings})
    lengths = found["lengths"]
    return render(
        "check.html.j2",
        heading=", ".join(source["path"] for source in found["sources"]),
        verdict=_verdict(found["ok"], bool(groups[0]["findings"])),
        sentence=_sentence(found["ok"], [(group["level"], len(group["findings"])) for group in groups]),
        groups=groups,
        open=OPEN,
        rows=found["rows"],
        sources=found["sources"],
        notes=found["notes"],
        lengths=lengths,
        bins=[{"span": span(entry), "rows": entry["rows"]} for entry in lengths["histogram"]],
        chart=histogram_chart(lengths["histogram"], unit=lengths["unit"], limit=lengths["limit"]),
        fixed=found.get("fixed"),
    )


def _verdict(ok: bool, problems: bool) -> tuple[str, str]:
    """In words, and how they are drawn."""
    if not ok:
        return "Refused", "refused"
    return ("Taken, with problems", "doubtful") if problems else ("Taken", "taken")


def _sentence(ok: bool, counts: list[tuple[str, int]]) -> str:
    said = [counted(number, level) for level, number in counts if number]
    what = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
    if not ok:
        return f"Training would refuse these rows: {what}."
    if dict(counts)["problem"]:
        return f"Training would take these rows, but look at what was found: {what}."
    return f"Training would take these rows: {what or 'nothing was found'}."


def _finding(finding: dict[str, Any]) -> dict[str, Any]:
    rows, of, instances = finding["rows"], finding["of"], finding["instances"]
    told = f"{counted(rows, 'row')} of {of:,} ({share(rows, of)})" if rows and of else ""
    beyond = rows - len(instances)
    return {
        "kind": finding["kind"],
        "title": finding["title"][:1].upper() + finding["title"][1:],
        "told": told,
        "instances": instances,
        "beyond": f"The first {len(instances)} are shown, of {rows:,}." if instances and beyond > 0 else "",
        "fix": finding["fix"],
    }
