"""What every page shares: one jinja environment that always escapes, and numbers as a person reads them."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache
from math import floor, isfinite, log10
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MISSING = Markup('<span class="none">not recorded</span>')
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def render(template: str, **values: Any) -> str:
    """Renders one template of this package to a page that any UTF-8 file can hold."""
    page = _environment().get_template(template).render(**values)
    # A model can answer with half a surrogate pair or an escape code: the first cannot be encoded, neither can be seen.
    return _UNSEEN.sub(lambda found: _sign(ord(found[0])), page)


def fragment(template: str, **values: Any) -> Markup:
    """Renders a part of a page, which `render` puts into the whole."""
    return Markup(_environment().get_template(template).render(**values))


def _sign(code: int) -> str:
    if code > 127:
        return "\ufffd"
    return "␡" if code == 127 else chr(0x2400 + code)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunesmith.pages", ""),
        # True, not select_autoescape: that one goes by suffix and would leave *.html.j2 unescaped.
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: MISSING if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "brief": brief,
        "count": count,
        "percent": percent,
        "scaled": scaled,
        "size": size,
        "duration": duration,
        "moment": moment,
        "plain": plain,
        "preview": preview,
    }
    return environment


def is_number(value: object) -> bool:
    """True for a real, finite number; JSON has no NaN, so a gap may also arrive as ``None``."""
    # Beyond 1e300 a difference of two values overflows, so such a value is as good as infinite.
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and abs(value) < 1e300


def magnitude(value: float) -> int:
    """The power of ten of the leading digit; 0 for zero."""
    return floor(log10(abs(value))) if value else 0


def number(value: float | None, decimals: int | None = None, sign: bool = False) -> str | None:
    """Four significant digits unless ``decimals`` says otherwise, with a true minus sign."""
    if value is None:
        return None
    if not is_number(value):
        return "not finite"
    if value and decimals is None and not -4 <= magnitude(value) < 12:
        text = f"{value:.2e}"
    else:
        text = f"{value:,.{decimals if decimals is not None else max(0, 3 - max(-3, magnitude(value)))}f}"
    if not any(digit in text for digit in "123456789"):
        return text.lstrip("-")
    return f"+{text}" if sign and value > 0 else text.replace("-", "−")


def brief(value: float | None) -> str | None:
    """A number as short as its digits allow: 0.6, not 0.6000."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if text and "." in text and "e" not in text else text


def count(value: float | None) -> str | None:
    return number(value, 0)


def percent(value: float | None, decimals: int = 1, sign: bool = False) -> str | None:
    text = number(value * 100 if value is not None and is_number(value) else value, decimals, sign)
    return f"{text} %" if text and value is not None and is_number(value) else text


def scaled(value: float | None) -> str | None:
    """4,884,480 as ``4.88 M``: for numbers whose order matters more than their digits."""
    if value is None or not is_number(value) or abs(value) < 10_000:
        return count(value)
    unit, letter = next(
        (unit, letter) for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(value) >= unit
    )
    return f"{value / unit:.3g} {letter}" if abs(value / unit) < 1000 else f"{value / unit:,.0f} {letter}"


def size(value: float | None) -> str | None:
    if value is None or not is_number(value):
        return number(value)
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:.0f} bytes"


def duration(value: float | None) -> str | None:
    if value is None or not is_number(value):
        return number(value)
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def moment(value: str | None) -> str | None:
    """An ISO time to the minute, with its zone; any other text as it stands."""
    try:
        time = datetime.fromisoformat(value or "")
    except ValueError:
        return value
    zone = time.strftime(" %Z") if time.tzinfo else ""
    return f"{time:%Y-%m-%d %H:%M}{zone}"


def plain(value: Any) -> str | None:
    """Any setting as one would type it in a recipe."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def preview(text: str, characters: int = 700, lines: int = 14) -> str | None:
    """The opening of a text that is too long to show whole, or ``None`` for one that is not."""
    if len(text) <= characters and text.count("\n") < lines:
        return None
    return "\n".join(text[: characters // 2].split("\n")[: lines // 2]).rstrip() + " …"
