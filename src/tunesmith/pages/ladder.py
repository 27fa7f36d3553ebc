"""The page of `advise --measure`: every rung's figures, against zero-shot and against the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.pages.chart import HAIRLINE, SVG, TEXT
from tunesmith.pages.page import duration, number, percent, render
from tunesmith.pages.series import tick_text, ticks, widened

FACTS = {
    "base": "The base, alone",
    "rag": "The base, with retrieval",
    "tuned": "Tuned on the facts",
    "tuned_rag": "Tuned on the facts, with retrieval",
}
ROW = 46
"""Pixels of one rung in the chart."""


def ladder_page(report: dict[str, Any]) -> str:
    """Renders what a ladder came to, to one HTML page that needs nothing beside itself.

    Args:
        report: as `ladder.json` has it.
    """
    facts = report["facts"]
    answer = report.get("answer")
    return render(
        "ladder.html.j2",
        report=report,
        heading=answer["sentence"] if answer is not None else facts["sentence"],
        rungs=[_rung(entry, answer) for entry in report["rungs"]],
        chart=value_chart(report["rungs"], report.get("metric", ""), report.get("target"), report.get("better")),
        facts=facts,
        fact_rows=[_fact_row(row) for row in facts["rows"]] if facts is not None else [],
        differences=_differences(facts) if facts is not None else [],
        confidence=percent(report["confidence"], 0),
    )


def span(entry: dict[str, Any], *, sign: bool = False) -> str:
    """An interval in words."""
    if entry["low"] is None:
        return "no interval"
    return f"{number(entry['low'], 3, sign)} to {number(entry['high'], 3, sign)}"


def settings_text(settings: dict[str, Any]) -> str:
    """What was chosen for a rung, in words."""
    said = []
    if "examples" in settings:
        one = settings["examples"]
        said.append(f"{one} example{'' if one == 1 else 's'} by {settings['similarity']}")
    if tried := settings.get("tried"):
        scores = ", ".join(f"{count}: {score:.3f}" for count, score in tried.items())
        said.append(f"chosen on {settings['chosen_on']} ({scores})")
    if "retrieval" in settings:
        said.append(f"{settings['passages']} of {settings['texts']:,} texts from {settings['corpus']}")
        said.append(f"found by {settings['retrieval']}")
    if "prompts" in settings:
        said.append(f"{settings['prompts']} prompts")
    return "; ".join(said)


def _rung(entry: dict[str, Any], answer: dict[str, Any] | None) -> dict[str, Any]:
    difference, latency = entry["difference"], entry["latency"]
    return {
        "name": entry["name"],
        "first": answer is not None and entry["name"] == answer["by_value"],
        "value": number(entry["value"], 3),
        "span": span(entry),
        "difference": "" if difference is None else number(difference["difference"], 3, True),
        "difference_span": "" if difference is None else span(difference, sign=True),
        "prompt": entry["prompt_tokens"],
        "completion": entry["completion_tokens"],
        "median": "not measured" if latency["median"] is None else duration(latency["median"]),
        "p90": "" if latency["p90"] is None else duration(latency["p90"]),
        "cost": "not known" if entry["cost_per_1000"] is None else number(entry["cost_per_1000"], 4),
        "settings": settings_text(entry["settings"]),
    }


def _fact_row(row: dict[str, Any]) -> tuple[str, list[tuple[str | None, str]]]:
    cells = [(percent(row[key]["value"], 0), _percents(row[key])) for key in ("as_trained", "in_other_words")]
    return FACTS[row["name"]], cells


def _differences(facts: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    names = {
        "tuned_loses_in_other_words": "Tuned: in other words, less as trained",
        "rag_over_tuned_in_other_words": "In other words: retrieval, less tuned",
        "tuned_over_base_in_other_words": "In other words: tuned, less the base",
    }
    found = facts["differences"]
    return [
        (name, percent(found[key]["difference"], 0, True), _percents(found[key], sign=True))
        for key, name in names.items()
    ]


def _percents(entry: dict[str, Any], *, sign: bool = False) -> str:
    if entry["low"] is None:
        return "no interval"
    return f"{percent(entry['low'], 0, sign)} to {percent(entry['high'], 0, sign)}"


def value_chart(
    entries: Sequence[dict[str, Any]], name: str, target: float | None, better: str | None = "higher"
) -> Markup:
    """Each rung's value with its interval, and the target as a line."""
    if not entries:
        return Markup("")
    ends = [end for entry in entries for end in (entry["low"], entry["value"], entry["high"]) if end is not None]
    low, high = widened(min(0.0, *ends, *([] if target is None else [target])), max([*ends, target or 0.0]), pad=0.04)
    bottom = 26 + ROW * len(entries)

    def across(x: float) -> str:
        return f"{100 * (x - low) / (high - low):.2f}%"

    values = ticks(low, high)
    body = HAIRLINE.format(x1="0", x2="100%", y1=bottom, y2=bottom, colour="rule", more="")
    for value in values:
        body += HAIRLINE.format(x1=across(value), x2=across(value), y1=bottom, y2=bottom + 5, colour="soft", more="")
        text = tick_text(value, values)
        body += TEXT.format(x=across(value), y=bottom + 20, anchor="middle", colour="soft", more="", text=text)
    if target is not None:
        x, dashed = across(target), Markup(' stroke-width="1.5" stroke-dasharray="5 4"')
        body += HAIRLINE.format(x1=x, x2=x, y1=18, y2=bottom, colour="ink", more=dashed)
        body += TEXT.format(x=x, y=12, anchor="middle", colour="ink", more="", text=f"target {target:g}")
    for at, entry in enumerate(entries):
        reached = target is None or (entry["value"] <= target if better == "lower" else entry["value"] >= target)
        body += _whisker(entry, across, 26 + ROW * at, reached=reached)
    said = "; ".join(f"{entry['name']} {number(entry['value'], 3)}, interval {span(entry)}" for entry in entries)
    title = f"{name} of each rung, with its interval"
    picture = SVG.format(id="chart-rungs", height=bottom + 26, title=title, desc=f"{said}.", body=body)
    frame = Markup('<figure class="chart"><div class="plot" style="padding:4px 18px 4px 4px">')
    return frame + picture + Markup("</div></figure>")


def _whisker(entry: dict[str, Any], across: Any, top: int, *, reached: bool) -> Markup:
    y, colour = top + 28, "line"
    body = TEXT.format(x="0", y=top + 14, anchor="start", colour="ink", more="", text=entry["name"])
    if entry["low"] is not None:
        left, right = across(entry["low"]), across(entry["high"])
        wide = Markup(' stroke-width="2.5"')
        body += HAIRLINE.format(x1=left, x2=right, y1=y, y2=y, colour=colour, more=wide)
        for end in (left, right):
            body += HAIRLINE.format(x1=end, x2=end, y1=y - 6, y2=y + 6, colour=colour, more=wide)
    # Filled where the target is reached, hollow where it is not: the same news without colour.
    fill = f"var(--{colour}, currentColor)" if reached else "var(--paper, Canvas)"
    dot = Markup('<circle cx="{}" cy="{}" r="5" fill="{}" stroke="var(--{}, currentColor)" stroke-width="2.5"/>')
    return body + dot.format(across(entry["value"]), y, fill, colour)
