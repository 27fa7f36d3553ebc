"""How long rows are, as bars: inline SVG in the manner of ``chart``, so that it fills a phone or a desk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from tunesmith.pages.chart import FRAME, HAIRLINE, HEIGHT, SVG, TEXT
from tunesmith.pages.page import count
from tunesmith.pages.series import tick_text, ticks

FARTHEST = 1.5
"""A limit farther to the right than this times the longest row is told in words: drawn, it would squeeze the bars."""

LEAST = 4.0
"""Height in pixels of the lowest bar: one row among a hundred thousand is seen too."""

BAR = Markup(
    '<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="var(--{fill}, Canvas)"'
    "{more}><title>{title}</title></rect>"
)
HOLLOW = Markup(' stroke="var(--bad, currentColor)" stroke-width="1.5" stroke-dasharray="4 3"')
"""Of rows that are too long: a grey print and an eye without red tell them from the others too."""
KEY = Markup('<li><svg width="18" height="12" aria-hidden="true">{}</svg> {}</li>')


def histogram_chart(bins: Sequence[dict[str, Any]], *, unit: str, limit: int | None) -> Markup:
    """Draws a bar for each bin, and the limit; bars of rows that are longer than the limit are hollow.

    Args:
        bins: ``{"from": int, "to": int, "rows": int}``, ascending and without gaps; ``to`` is not in the bin.
        unit: what lengths are counted in.
        limit: the longest row that can be used; None when that is not known.
    """
    most = max((entry["rows"] for entry in bins), default=0)
    if not most:
        return Markup('<p class="note">Nothing to draw: there is no row.</p>')
    low, high = bins[0]["from"], bins[-1]["to"]
    drawn = limit is not None and low <= limit <= FARTHEST * high
    right = max(high, limit + 1) if drawn and limit is not None else high

    def across(x: float) -> str:
        return f"{100 * (x - low) / (right - low):.2f}%"

    body = _axes(ticks(low, right, target=6, whole=True), ticks(0, most, target=4, whole=True), across, most, unit)
    for entry in bins:
        if entry["rows"]:
            over = limit is not None and entry["from"] > limit
            tall = max(LEAST, round(HEIGHT * entry["rows"] / most, 1))
            body += _bar(across(entry["from"]), _width(entry, right - low), tall, over, title=_said(entry, unit))
    if drawn and limit is not None:
        body += _limit(across(limit + 1), (limit + 1 - low) / (right - low), limit)
    tallest = max(bins, key=lambda entry: entry["rows"])
    desc = f"Rows have from {count(low)} to {count(high - 1)} {unit}. Most of them: {_said(tallest, unit)}."
    picture = SVG.format(
        id="chart-lengths", height=HEIGHT, title=f"Rows by their length in {unit}", desc=desc, body=body
    )
    return (
        Markup('<figure class="chart">')
        + (_legend() if limit is not None and bins[-1]["from"] > limit else Markup(""))
        + FRAME.format(top=34, bottom=46)
        + picture
        + Markup("</div>")
        + Markup("<figcaption>{}</figcaption>").format(_beside(limit, low, high - 1, drawn=drawn, unit=unit))
        + Markup("</figure>")
    )


def span(entry: dict[str, Any]) -> str:
    """The lengths of a bin, both ends included."""
    last = entry["to"] - 1
    return str(count(last)) if entry["from"] == last else f"{count(entry['from'])} to {count(last)}"


def _said(entry: dict[str, Any], unit: str) -> str:
    return f"{count(entry['rows'])} {'row' if entry['rows'] == 1 else 'rows'} of {span(entry)} {unit}"


def _beside(limit: int | None, low: int, longest: int, *, drawn: bool, unit: str) -> str:
    """What the drawing cannot show about the limit."""
    if limit is None:
        return "How long a row may be is not known here."
    if longest <= limit:
        told = f"Every row is within the limit of {count(limit)} {unit}."
        return told if drawn else f"{told} It is too far to the right to be drawn."
    return f"Every row is longer than the limit of {count(limit)} {unit}." if low > limit else ""


def _width(entry: dict[str, Any], whole: float) -> str:
    return f"{96 * (entry['to'] - entry['from']) / whole:.2f}%"  # of 100, so that a gap is left


def _bar(x: str, width: str, tall: float, over: bool, title: str) -> Markup:
    fill, more = ("paper", HOLLOW) if over else ("line", "")
    return BAR.format(x=x, y=round(HEIGHT - tall, 1), width=width, height=tall, fill=fill, more=more, title=title)


def _axes(
    columns: Sequence[float], rows: Sequence[float], across: Callable[[float], str], most: int, unit: str
) -> Markup:
    body = Markup("")
    for value in rows:
        y = round(HEIGHT * (1 - value / most), 1)
        body += HAIRLINE.format(x1="0", x2="100%", y1=y, y2=y, colour="rule", more="")
        body += TEXT.format(x=-10, y=y + 4, anchor="end", colour="soft", text=tick_text(value, rows), more="")
    for value in columns:
        x = across(value)
        body += HAIRLINE.format(x1=x, x2=x, y1=HEIGHT, y2=HEIGHT + 5, colour="soft", more="")
        body += TEXT.format(x=x, y=HEIGHT + 20, anchor="middle", colour="soft", text=tick_text(value, columns), more="")
    body += HAIRLINE.format(x1="0", x2="100%", y1=HEIGHT, y2=HEIGHT, colour="soft", more="")
    body += TEXT.format(x=-10, y=-14, anchor="end", colour="soft", text="rows", more="")
    return body + TEXT.format(x="50%", y=HEIGHT + 40, anchor="middle", colour="soft", text=unit, more="")


def _limit(x: str, part: float, limit: int) -> Markup:
    at_right = part > 0.7
    halo = Markup(' dx="{}" stroke="var(--paper, Canvas)" stroke-width="4" paint-order="stroke"')
    line = HAIRLINE.format(
        x1=x, x2=x, y1=-20, y2=HEIGHT, colour="ink", more=Markup(' stroke-width="1.5" stroke-dasharray="6 3"')
    )
    return line + TEXT.format(
        x=x,
        y=-10,
        anchor="end" if at_right else "start",
        colour="ink",
        text=f"limit: {count(limit)}",
        more=halo.format(-6 if at_right else 6),
    )


def _legend() -> Markup:
    items = Markup("")
    for fill, more, text in (("line", "", "within the limit"), ("paper", HOLLOW, "longer than the limit")):
        square = Markup('<rect x="2" y="1" width="14" height="10" fill="var(--{}, Canvas)"{}/>').format(fill, more)
        items += KEY.format(square, text)
    return Markup('<ul class="legend">') + items + Markup("</ul>")
