"""What a policy's answers were worth as it learned, and how far it went from where it began."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tunesmith.pages.chart import Line, line_chart
from tunesmith.pages.page import count, fragment, is_number, number
from tunesmith.pages.sections.section import Part, Section
from tunesmith.pages.series import Point, smoothed

SHOWN = (
    ("reward", "Mean reward of the answers that were drawn", "reward"),
    ("kl", "Distance from the starting model, in nats an answer", "nats"),
    ("entropy", "Entropy of the policy, in nats a token", "nats a token"),
    ("length", "Tokens of an answer", "tokens"),
)
"""Name in the report, title, and unit of each chart, in order."""


def rollouts(report: Part) -> Markup | None:
    """Curves of what was drawn while training; nothing for objectives that draw no answers."""
    curves = (report["curves"] or Part())["rollouts"] or {}
    drawn = [(name, title, _points(curves[name]), unit) for name, title, unit in SHOWN if curves.get(name)]
    if not drawn:
        return None
    rows = [
        (title, number(points[0][1]), number(points[-1][1]), number(max(y for _, y in points if y is not None)))
        for _, title, points, _ in drawn
        if any(y is not None for _, y in points)
    ]
    charts = [(title, _chart(name, title, points, unit)) for name, title, points, unit in drawn]
    return fragment("sections/rollouts.html.j2", charts=charts, rows=rows)


def _points(pairs: Sequence[Sequence[float | None]]) -> list[Point]:
    return [(float(x), y if is_number(y) else None) for x, y in pairs if x is not None]


def _chart(name: str, title: str, points: list[Point], unit: str) -> Markup:
    mean, span = smoothed(points)
    lines = [Line("each rollout", points, "faint" if mean else "solid")]
    if mean:
        lines.append(Line(f"mean over {count(span)} rollouts", mean, "solid"))
    finite = [y for _, y in points if y is not None]
    said = f"From {number(finite[0])} to {number(finite[-1])}." if finite else ""
    return line_chart(lines, title=title, desc=said, axes=(unit, "step"), identity=f"rollouts-{name}")


ROLLOUTS = Section("rollouts", "Rewards", rollouts)
