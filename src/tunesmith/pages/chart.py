"""Line and interval charts as inline SVG.

Positions along x are percentages and text is sized in pixels, so that a chart fills a phone or a desk without its
labels shrinking. Every colour is a CSS variable of the page, with ``currentColor`` where the page has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from tunesmith.pages.page import count, is_number, number
from tunesmith.pages.series import Point, downsampled, smoothed, tick_text, ticks, widened

Points = Sequence[Sequence[float | None]]

HEIGHT = 240
NAME = 28
"""Characters of a metric's name that still fit beside what it shows on a phone; the table has the whole name."""
FRAME = Markup('<div class="plot" style="padding:{top}px 24px {bottom}px 56px">')
SVG = Markup(
    '<svg role="img" aria-labelledby="{id}-title {id}-desc" width="100%" height="{height}" overflow="visible" '
    'font-size="12" font-family="inherit" fill="currentColor" style="display:block">'
    '<title id="{id}-title">{title}</title><desc id="{id}-desc">{desc}</desc>{body}</svg>'
)
HAIRLINE = Markup('<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" stroke="var(--{colour}, currentColor)"{more}/>')
TEXT = Markup('<text x="{x}" y="{y}" text-anchor="{anchor}" fill="var(--{colour}, currentColor)"{more}>{text}</text>')


Style = Literal["faint", "solid", "marked", "dotted", "dashed"]


@dataclass(frozen=True)
class Line:
    """One series. Style and colour both tell lines apart, so that a grey print still reads."""

    name: str
    points: list[Point]
    style: Style


def loss_chart(train: Points | None, validation: Points | None, best_step: int | None = None) -> Markup:
    """Training loss with its moving average, validation loss, and the best step."""
    trained, validated = _ordered(train), _ordered(validation)
    lines: list[Line] = []
    if trained:
        smooth, span = smoothed(trained)
        lines.append(Line("training loss", trained, "faint" if smooth else "solid"))
        if smooth:
            lines.append(Line(f"training loss, mean over {count(span)} points", smooth, "solid"))
    if validated:
        lines.append(Line("validation loss", validated, "marked"))
    notes = [text for text in (_gaps("training", trained), _gaps("validation", validated)) if text]
    notes += [
        f"No {name} loss was recorded."
        for name, points in (("training", trained), ("validation", validated))
        if not points
    ]
    said = [text for text in (_course("Training", trained), _course("Validation", validated)) if text]
    if best_step is not None:
        said.append(f"The best step is {count(best_step)}.")
    return line_chart(lines, title="Loss by step", desc=" ".join(said), notes=notes, mark=best_step)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    desc: str,
    notes: Sequence[str] = (),
    mark: int | None = None,
    axes: tuple[str, str] = ("loss", "step"),
    identity: str = "loss",
) -> Markup:
    """Draws ``lines``; with nothing to draw, a note that says so.

    Args:
        axes: what stands at the upright axis and at the level one.
        identity: of the picture on its page.
    """
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None]
    if not ys:
        why = "no finite value was recorded" if any(line.points for line in lines) else f"no {axes[0]} was recorded"
        return Markup('<p class="note">Nothing to draw: {}.</p>').format(why)
    left, right = widened(min(xs), max(xs), pad=0.0)
    low, high = widened(min(ys), max(ys), pad=0.05)

    def across(x: float) -> str:
        return f"{100 * (x - left) / (right - left):.2f}%"

    def down(y: float) -> float:
        return round(HEIGHT * (high - y) / (high - low), 1)

    body = _axes(ticks(left, right, target=6, whole=True), ticks(low, high), across, down, axes)
    body += Markup(
        '<svg width="100%" height="{}" viewBox="0 0 1000 {}" preserveAspectRatio="none" '
        'overflow="visible" aria-hidden="true">'
    ).format(HEIGHT, HEIGHT)
    kept = {line.name: downsampled(line.points) for line in lines}
    for line in lines:
        path = _path([(1000 * (x - left) / (right - left), None if y is None else down(y)) for x, y in kept[line.name]])
        body += _stroke(line.style, path)
    body += Markup("</svg>")
    for line in lines:
        shown = kept[line.name] if line.style == "marked" else _lone(kept[line.name])
        body += _markers([(across(x), down(y)) for x, y in shown if y is not None], line.style)
    if mark is not None and left <= mark <= right:
        body += _marked_step(across(mark), (mark - left) / (right - left), mark)
    picture = SVG.format(id=f"chart-{identity}", height=HEIGHT, title=title, desc=desc, body=body)
    return (
        Markup('<figure class="chart">')
        + _legend(lines)
        + FRAME.format(top=34, bottom=46)
        + picture
        + Markup("</div>")
        + _notes(notes)
        + Markup("</figure>")
    )


def interval_chart(
    metrics: Sequence[dict[str, Any]],
    *,
    identity: str = "intervals",
    title: str = "Difference of each metric, tuned minus base",
) -> Markup:
    """Each metric's difference, tuned minus base, with its interval against the line of no difference."""
    rows = [row for row in metrics if is_number(row.get("difference"))]
    left_out = [str(row.get("name")) for row in metrics if not is_number(row.get("difference"))]
    notes = [f"Not drawn, because no difference is recorded: {', '.join(left_out)}."] if left_out else []
    if not rows:
        return Markup('<p class="note">Nothing to draw: no difference was recorded.</p>')
    body, top = Markup(""), 0
    for panel in _panels(rows):
        picture, top = _panel(panel, top)
        body += picture
    said = "; ".join(f"{row.get('name')}: {_spoken(row)}" for row in rows)
    picture = SVG.format(
        id=f"chart-{identity}",
        height=top,
        title=title,
        desc=said + ".",
        body=body,
    )
    frame = Markup('<div class="plot" style="padding:4px 12px 4px 0">')
    return Markup('<figure class="chart">') + frame + picture + Markup("</div>") + _notes(notes) + Markup("</figure>")


def reading(row: dict[str, Any]) -> str:
    """What an interval shows: ``better``, ``worse``, ``no difference shown``, or ``no interval``."""
    if said := row.get("shown"):
        return str(said).replace("_", " ") + (" shown" if said == "no_difference" else "")
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or not (is_number(low) and is_number(high)):
        return "no interval"
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == (row.get("better") != "lower") else "worse"


def _ordered(points: Points | None) -> list[Point]:
    pairs = [
        (float(point[0]), point[1] if is_number(point[1]) else None)
        for point in points or []
        if point[0] is not None and is_number(point[0])
    ]
    return sorted(pairs, key=lambda pair: pair[0])


def _axes(columns: list[float], rows: list[float], across: Any, down: Any, names: tuple[str, str]) -> Markup:
    body = Markup("")
    for value in rows:
        body += HAIRLINE.format(x1="0", x2="100%", y1=down(value), y2=down(value), colour="rule", more="")
        body += TEXT.format(x=-10, y=down(value) + 4, anchor="end", colour="soft", text=tick_text(value, rows), more="")
    for value in columns:
        x = across(value)
        body += HAIRLINE.format(x1=x, x2=x, y1=HEIGHT, y2=HEIGHT + 5, colour="soft", more="")
        body += TEXT.format(x=x, y=HEIGHT + 20, anchor="middle", colour="soft", text=tick_text(value, columns), more="")
    body += HAIRLINE.format(x1="0", x2="100%", y1=HEIGHT, y2=HEIGHT, colour="soft", more="")
    body += TEXT.format(x=-10, y=-14, anchor="end", colour="soft", text=names[0], more="")
    return body + TEXT.format(x="50%", y=HEIGHT + 40, anchor="middle", colour="soft", text=names[1], more="")


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    parts: list[str] = []
    pen_down = False
    for x, y in points:
        if y is not None:
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y}")
        pen_down = y is not None
    return "".join(parts)


def _stroke(style: str, path: str) -> Markup:
    colour, width, more = {
        "faint": ("line", 1, Markup(' stroke-opacity="0.45"')),
        "solid": ("line", 2, Markup("")),
        "marked": ("line-2", 2, Markup(' stroke-dasharray="6 4"')),
        "dotted": ("good", 2, Markup(' stroke-dasharray="1.5 5"')),
        "dashed": ("bad", 2, Markup(' stroke-dasharray="12 4 2 4"')),
    }[style]
    return Markup(
        '<path d="{}" fill="none" stroke="var(--{}, currentColor)" stroke-width="{}" stroke-linecap="round" '
        'stroke-linejoin="round" vector-effect="non-scaling-stroke"{}/>'
    ).format(path, colour, width, more)


def _lone(points: Sequence[Point]) -> list[Point]:
    """Points without a neighbour, which a line cannot show."""
    ends = [(0.0, None), *points, (0.0, None)]
    return [ends[i] for i in range(1, len(ends) - 1) if ends[i - 1][1] is None and ends[i + 1][1] is None]


def _markers(places: Sequence[tuple[str, float]], style: str) -> Markup:
    if len(places) > 60:
        return Markup("")
    colours = {"marked": "--line-2", "dotted": "--good", "dashed": "--bad"}
    inside, around = ("--paper, Canvas", colours[style]) if style in colours else ("--line, currentColor", "--line")
    dot = Markup('<circle cx="{}" cy="{}" r="3.5" fill="var({})" stroke="var({}, currentColor)" stroke-width="2"/>')
    return Markup("").join(dot.format(x, y, inside, around) for x, y in places)


def _marked_step(x: str, share: float, step: int) -> Markup:
    halo = Markup(' dx="{}" stroke="var(--paper, Canvas)" stroke-width="4" paint-order="stroke"')
    at_right = share > 0.7
    return HAIRLINE.format(x1=x, x2=x, y1=-6, y2=HEIGHT, colour="soft", more=Markup(' stroke-dasharray="2 3"')) + (
        TEXT.format(
            x=x,
            y=4,
            anchor="end" if at_right else "start",
            colour="ink",
            text=f"best: step {count(step)}",
            more=halo.format(-6 if at_right else 6),
        )
    )


def _legend(lines: Sequence[Line]) -> Markup:
    items = Markup("")
    for line in lines:
        dot = _markers([("15", 6)], line.style) if line.style == "marked" else Markup("")
        items += Markup('<li><svg width="30" height="12" aria-hidden="true">{}{}</svg> {}</li>').format(
            _stroke(line.style, "M1 6H29"), dot, line.name
        )
    return Markup('<ul class="legend">') + items + Markup("</ul>")


def _notes(notes: Sequence[str]) -> Markup:
    return Markup("<figcaption>{}</figcaption>").format(" ".join(notes)) if notes else Markup("")


def _gaps(name: str, points: Sequence[Point]) -> str:
    missing = [x for x, y in points if y is None]
    if not missing:
        return ""
    values = "1 value is" if len(missing) == 1 else f"{count(len(missing))} values are"
    return f"In the {name} loss {values} not finite, first at step {count(missing[0])}: the line has a gap there."


def _course(name: str, points: Sequence[Point]) -> str:
    finite = [(x, y) for x, y in points if y is not None]
    if not finite:
        return ""
    lowest = min(finite, key=lambda point: point[1])
    (start, first), (end, last) = finite[0], finite[-1]
    if start == end:
        return f"{name} loss {number(first)} at step {count(start)}, the only point."
    return (
        f"{name} loss goes from {number(first)} at step {count(start)} to {number(last)} at step {count(end)}; "
        f"lowest {number(lowest[1])} at step {count(lowest[0])}."
    )


def _spoken(row: dict[str, Any]) -> str:
    low, high = number(row.get("low"), sign=True), number(row.get("high"), sign=True)
    interval = f", interval {low} to {high}" if reading(row) != "no interval" else ""
    return f"{number(row.get('difference'), sign=True)}{interval}, {reading(row)}"


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    difference = row["difference"]
    if reading(row) == "no interval":
        return difference, difference
    return min(row["low"], difference), max(row["high"], difference)


def _panels(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One shared axis, unless a metric would vanish beside another: then each has its own, with its own numbers."""
    reach = [max(abs(end) for end in _ends(row)) for row in rows]
    seen = [value for value in reach if value > 0]
    return [rows] if not seen or max(seen) <= 20 * min(seen) else [[row] for row in rows]


def _panel(rows: list[dict[str, Any]], top: int) -> tuple[Markup, int]:
    ends = [end for row in rows for end in _ends(row)]
    low, high = widened(min(0.0, *ends), max(0.0, *ends), pad=0.06)
    bottom = top + 50 * len(rows)

    def across(x: float) -> str:
        return f"{100 * (x - low) / (high - low):.2f}%"

    values = ticks(low, high)
    body = HAIRLINE.format(x1="0", x2="100%", y1=bottom, y2=bottom, colour="rule", more="")
    for value in values:
        body += HAIRLINE.format(x1=across(value), x2=across(value), y1=bottom, y2=bottom + 5, colour="soft", more="")
        body += TEXT.format(
            x=across(value), y=bottom + 20, anchor="middle", colour="soft", more="", text=tick_text(value, values)
        )
    for index, row in enumerate(rows):
        body += HAIRLINE.format(
            x1=across(0),
            x2=across(0),
            y1=top + 50 * index + 24,
            y2=top + 50 * index + 50,
            colour="ink",
            more=Markup(' stroke-width="1.5"'),
        )
        body += _whisker(row, across, top + 50 * index)
    return body, bottom + 28


def _whisker(row: dict[str, Any], across: Any, top: int) -> Markup:
    state = reading(row)
    colour = {"better": "good", "worse": "bad"}.get(state, "soft")
    low, high = (across(end) for end in _ends(row))
    y = top + 34
    wide = Markup(' stroke-width="2.5"')
    body = HAIRLINE.format(x1=low, x2=high, y1=y, y2=y, colour=colour, more=wide)
    for end in (low, high) if state != "no interval" else ():
        body += HAIRLINE.format(x1=end, x2=end, y1=y - 6, y2=y + 6, colour=colour, more=wide)
    # Filled where the interval stays on one side of zero, hollow where it does not: the same news without colour.
    inside = f"var(--{colour}, currentColor)" if state in ("better", "worse") else "var(--paper, Canvas)"
    body += Markup(
        '<circle cx="{}" cy="{}" r="5" fill="{}" stroke="var(--{}, currentColor)" stroke-width="2.5"/>'
    ).format(across(row["difference"]), y, inside, colour)
    name = str(row.get("name"))
    way = ", lower is better" if row.get("better") == "lower" else ""
    return body + Markup(
        '<text x="0" y="{}"><tspan font-weight="600">{}</tspan>'
        '<tspan dx="10" fill="var(--soft, currentColor)">{}{}</tspan></text>'
    ).format(top + 14, name if len(name) <= NAME else f"{name[: NAME - 1]}…", state, way)
