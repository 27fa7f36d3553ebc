"""What a run lost beside its task, and what it was judged on that it had seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.pages.chart import Line, interval_chart, line_chart, reading
from tunesmith.pages.page import number
from tunesmith.pages.sections.section import Part, Section

TABLE = Markup(
    '<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{caption}</caption>'
    "<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
)
NAMED, FIGURE = Markup('<th scope="col">{}</th>'), Markup('<th scope="col" class="num">{}</th>')
ROW, CELL, TWO = (
    Markup('<th scope="row">{}<small>{}</small></th>'),
    Markup('<td class="num">{}</td>'),
    Markup('<td class="num"><b>{}</b><small>{}</small></td>'),
)


def ability(report: Part) -> Markup | None:
    """Benchmarks before and after with their chart, and the divergence from the base; None where none was asked for."""
    benchmarks: Sequence[Mapping[str, Any]] = report.get("benchmarks") or []
    parts = [Markup("<p>{}</p>").format(note) for note in report.get("benchmark_notes") or []]
    if benchmarks:
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(
                ROW.format(
                    entry["name"], f"{entry['skill']}; {entry['metric']}, n = {entry['n']}, {entry['shots']} shots"
                )
                + CELL.format(number(entry["base"], 3))
                + CELL.format(number(entry["tuned"], 3))
                + TWO.format(number(entry["difference"], 3, sign=True), _interval(entry))
            )
            for entry in benchmarks
        )
        head = NAMED.format("Benchmark") + Markup("").join(map(FIGURE.format, ("Base", "Tuned", "Change")))
        caption = "General ability before and after, on the same items, through lm-eval."
        parts.insert(0, TABLE.format(label="Benchmarks before and after", caption=caption, head=head, body=body))
        parts.insert(1, _renamed(interval_chart([dict(entry) for entry in benchmarks])))
    divergence = report.get("divergence") or {}
    if divergence.get("status") == "measured":
        ends = (number(divergence[end], 3) for end in ("low", "high"))
        span = "no interval" if divergence["low"] is None else " to ".join(str(end) for end in ends)
        parts.append(
            Markup(
                "<p>On {} general prompts the tuned model is {} nats a token away from the base "
                "(KL divergence over the base’s own answers, interval {}).</p>"
            ).format(divergence["n"], number(divergence["value"], 3), span)
        )
    return Markup("").join(parts) if parts else None


def contamination(report: Part) -> Markup | None:
    """Which test items stand in the training data; None where nothing was looked for."""
    found: Sequence[Mapping[str, Any]] = report.get("contamination") or []
    if not found:
        return None
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            ROW.format(entry["name"], _examples(entry))
            + CELL.format(entry["of"])
            + CELL.format(entry["too_short"])
            + TWO.format(entry["found"], "seen in training" if entry["found"] else "")
        )
        for entry in found
    )
    head = NAMED.format("Judged on") + Markup("").join(map(FIGURE.format, ("Items", "Too short to look for", "Seen")))
    caption = (
        "Items whose words stand in the training rows: 13 in a row, for short items 8; of a test row 70 % of them."
    )
    return TABLE.format(label="Test items in the training data", caption=caption, head=head, body=body)


def forgetting_chart(points: Sequence[Mapping[str, Any]], metric: str) -> Markup:
    """Task score against forgetting: a point a checkpoint, from the base on.

    Args:
        points: each with ``step``, ``score`` and ``change``, the relative change of perplexity on general text.
    """
    line = Line(
        "checkpoints, from the base on", [(100 * point["change"], point["score"]) for point in points], "marked"
    )
    said = "; ".join(
        f"step {point['step']}: {metric} {point['score']:.4g}, perplexity on general text {point['change']:+.1%}"
        for point in points
    )
    return line_chart(
        [line],
        title=f"{metric} against forgetting",
        desc=said + ".",
        axes=(metric, "% change of perplexity on general text"),
        identity="forgetting",
    )


def _interval(entry: Mapping[str, Any]) -> str:
    if reading(dict(entry)) == "no interval":
        return "no interval"
    return f"{number(entry['low'], 3, sign=True)} to {number(entry['high'], 3, sign=True)}"


def _examples(entry: Mapping[str, Any]) -> str:
    return "; ".join(f"{example['item']} in {example['source']}" for example in entry["examples"])


def _renamed(chart: Markup) -> Markup:
    """A second chart of one kind on a page needs ids of its own."""
    return Markup(chart.replace("chart-intervals", "chart-benchmarks"))


def lost(report: Part) -> str | None:
    """That a benchmark fell beyond the noise of its items."""
    fallen = [entry for entry in report["benchmarks"] or [] if reading(dict(entry)) == "worse"]
    return f"{', '.join(entry['name'] for entry in fallen)} fell" if fallen else None


def seen(report: Part) -> str | None:
    """That test items stand in the training data."""
    return "Test items stand in the training data" if any(e["found"] for e in report["contamination"] or []) else None


ABILITY = Section("ability", "General ability", ability, lost)
CONTAMINATION = Section("contamination", "Seen in training", contamination, seen)
