"""What the model may have lost, on general text."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from tunesmith.pages.chart import reading
from tunesmith.pages.page import fragment, is_number, percent
from tunesmith.pages.sections.section import Part, Section


def forgetting(report: Part) -> Markup:
    """Perplexity on general text before and after, or why it is not known."""
    return fragment("sections/forgetting.html.j2", report=report, forgetting=_told(report["forgetting"]))


def unknown(report: Part) -> str | None:
    """That forgetting was not measured."""
    status = (report["forgetting"] or Part())["status"]
    if status == "measured":
        return None
    if status == "off":
        return "Forgetting was not checked"
    return "Forgetting could not be checked" if status else "Nothing is recorded about forgetting"


def _told(part: Part | None) -> dict[str, Any]:
    if part is None or not part["status"]:
        sentence = "This report does not say whether the model lost anything it could do before."
        return {"state": "not recorded", "form": "unsure", "sentence": sentence, "table": False}
    reason = part["reason"]
    if part["status"] == "off":
        sentence = reason or "The check was switched off, so nothing is known about what the model may have lost."
        return {"state": "not checked", "form": "unsure", "sentence": sentence, "table": False}
    if part["status"] != "measured" or not is_number(part["change"]):
        sentence = f"Nothing is known about what the model may have lost: {reason or 'no reason is recorded'}"
        return {"state": "could not run", "form": "unsure", "sentence": sentence, "table": False}
    change = part["change"]
    shown = reading(Part({"low": part["low"], "high": part["high"], "better": "lower"}))
    low, high = (percent(part[end], sign=True) for end in ("low", "high"))
    told = {
        "better": "The tuned model predicts this text better than the base model does.",
        "worse": "The tuned model predicts this text worse than the base model does.",
        "no difference shown": "The interval includes zero: no forgetting is shown, "
        "though a change as large as its ends is not ruled out.",
        "no interval": "No interval is recorded, so this change may be chance.",
    }[shown]
    return {
        "state": "measured",
        "form": "calm",
        "sentence": f"Perplexity {'rose' if change > 0 else 'fell'} by {percent(abs(change))}. {told}"
        + (f" {reason}" if reason else ""),
        "table": True,
        "interval": "no interval" if shown == "no interval" else f"{low} to {high}",
    }


FORGETTING = Section("forgetting", "Forgetting", forgetting, unknown)
