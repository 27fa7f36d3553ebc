"""The report: one HTML file that says whether to ship a tuned model, and shows the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.pages.ability import ability_part, contamination_part
from tunesmith.pages.chart import interval_chart, loss_chart, reading
from tunesmith.pages.page import count, duration, is_number, magnitude, number, percent, render, scaled, size

VERDICTS = {"ship": "Ship", "dont_ship": "Don’t ship", "no_difference": "No difference shown"}

SECTIONS = (
    ("gate", "Gate"),
    ("metrics", "Metrics"),
    ("intervals", "Differences"),
    ("samples", "Samples"),
    ("loss", "Loss"),
    ("forgetting", "Forgetting"),
    ("data", "Data"),
    ("cost", "Memory and time"),
    ("warnings", "Worth knowing"),
    ("settings", "Settings"),
    ("environment", "Environment"),
    ("command", "Do it again"),
)


class Part(dict[str, Any]):
    """A part of a report in which a missing key reads as ``None``: the page then says "not recorded"."""

    def __missing__(self, key: str) -> None:
        return None


def report_page(report: dict[str, Any]) -> str:
    """Renders a report to one HTML page that needs nothing beside itself.

    Args:
        report: the dictionary of ``report.json``. ``verdict`` and ``sentence`` must be there; whatever else is
            missing or null is named on the page as not recorded.
    """
    part = _part(report)
    curves = part["curves"] or Part()
    return render(
        "report.html.j2",
        report=part,
        verdict=VERDICTS[report["verdict"]],
        sections=SECTIONS,
        heed=_heed(part),
        trained=_trained(part["parameters"]),
        metrics=[_metric(row) for row in part["metrics"] or []],
        prompted=[_alone(row) for row in part["prompted"] or []],
        tasks=[(task["name"], task["rows"], [_metric(row) for row in task["metrics"]]) for task in part["tasks"] or []],
        interval_chart=interval_chart(part["metrics"] or []),
        loss_chart=loss_chart(curves["train"], curves["validation"], curves["best_step"]),
        forgetting=_forgetting(part["forgetting"]),
        ability=ability_part(report),
        contamination=contamination_part(report),
        lost_share=_lost_share(part["data"] or Part()),
        cost=_cost(part["predicted"] or Part(), part["measured"] or Part()),
    )


def _part(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Part({key: _part(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        # A curve can have a hundred thousand points, and has no keys to miss.
        return [_part(item) for item in value] if value and isinstance(value[0], Mapping) else list(value)
    return value


def _heed(report: Part) -> list[tuple[str, str]]:
    """What a reader of the verdict alone must not miss, each with the section that explains it."""
    heed: list[tuple[str, str]] = []
    unchecked = sum(row["passed"] is None for row in report["gate"] or [])
    if unchecked:
        heed.append((f"{unchecked} of {len(report['gate'])} requirements could not be checked", "gate"))
    status = (report["forgetting"] or Part())["status"]
    if status != "measured":
        heed.append(
            (
                "Forgetting was not checked"
                if status == "off"
                else "Forgetting could not be checked"
                if status
                else "Nothing is recorded about forgetting",
                "forgetting",
            )
        )
    if warnings := report["warnings"]:
        heed.append((f"{len(warnings)} warnings" if len(warnings) > 1 else "1 warning", "warnings"))
    return heed


def _trained(parameters: Part | None) -> str | None:
    trainable, total = (parameters or Part())["trainable"], (parameters or Part())["total"]
    if not is_number(trainable) or not is_number(total) or not total:
        return scaled(trainable)
    return f"{scaled(trainable)} of {scaled(total)} ({percent(trainable / total, 2 if trainable < total / 10 else 0)})"


def _decimals(row: Part) -> int:
    """Enough digits to show both ends of the interval apart, and the values to four digits."""
    values = [value for name in ("base", "tuned") if is_number(value := row[name])]
    scale = max((magnitude(value) for value in values if value), default=0)
    spread = [value for name in ("low", "high", "difference") if is_number(value := row[name]) and value]
    finest = magnitude(max(spread, key=abs)) if spread else 0
    return min(6, max(3 - max(0, scale), 1 - finest, 0))


def _metric(row: Part) -> dict[str, Any]:
    decimals = _decimals(row)
    shown = reading(row)
    low, high = (number(row[end], decimals, sign=True) for end in ("low", "high"))
    way = {"higher": "higher is better", "lower": "lower is better"}.get(row["better"], "direction not recorded")
    return {
        "name": row["name"],
        "primary": bool(row["primary"]),
        "way": way,
        "base": number(row["base"], decimals),
        "tuned": number(row["tuned"], decimals),
        "difference": number(row["difference"], decimals, sign=True),
        "interval": "no interval" if shown == "no interval" else f"{low} to {high}",
        "shown": shown,
        "n": "n not recorded" if row["n"] is None else f"{count(row['n'])} rows",
    }


def _alone(row: Part) -> tuple[Any, str | None, str]:
    """Name, value and interval of one model's metric."""
    low, high = (number(row[end], 3) for end in ("low", "high"))
    return row["name"], number(row["value"], 3), "no interval" if row["low"] is None else f"{low} to {high}"


def _forgetting(part: Part | None) -> dict[str, Any]:
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


def _lost_share(data: Part) -> str:
    used, lost = data["rows_used"], data["rows_lost"]
    if not is_number(used) or not is_number(lost):
        return "How many rows were lost is not recorded."
    if not lost:
        return "No row was lost."
    told = f"{percent(lost / (used + lost))} of all rows were lost."
    return told if data["lost"] else f"{told} The reasons are not recorded."


def _cost(predicted: Part, measured: Part) -> list[tuple[str, str | None, str | None, str]]:
    def off(name: str) -> str:
        foreseen, taken = predicted[name], measured[name]
        if not is_number(foreseen) or not is_number(taken) or not foreseen:
            return ""
        change = taken / foreseen - 1
        if abs(change) < 0.005:
            return "as predicted"
        return f"{percent(abs(change), 0)} {'more' if change > 0 else 'less'} than predicted"

    speed = measured["tokens_per_second"]
    return [
        ("Peak memory", size(predicted["peak_bytes"]), size(measured["peak_bytes"]), off("peak_bytes")),
        ("Time", duration(predicted["seconds"]), duration(measured["seconds"]), off("seconds")),
        ("Speed", "not predicted", None if speed is None else f"{count(speed)} tokens/s", ""),
    ]
