"""Which label was given for which."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section


def confusion(report: Part) -> Markup | None:
    """The tables of base and tuned model; nothing where answers are not a few labels."""
    part = report["confusion"]
    if not part or not part["labels"]:
        return None
    tables = [(name, _rows(part["labels"], part[key])) for name, key in (("Tuned", "tuned"), ("Base", "base"))]
    return fragment("sections/confusion.html.j2", labels=part["labels"], tables=tables)


def _rows(labels: list[str], counts: list[list[int]]) -> list[dict[str, Any]]:
    """Each right label with its counts, how dark each is drawn (0 to 4), and the share that is right."""
    found = []
    for at, (label, row) in enumerate(zip(labels, counts, strict=True)):
        whole = sum(row)
        cells = [
            (value, 0 if not value else min(4, 1 + int(3.99 * value / whole)), at == place)
            for place, value in enumerate(row)
        ]
        found.append({"label": label, "cells": cells, "right": row[at] / whole if whole else None})
    return found


CONFUSION = Section("confusion", "Labels", confusion)
