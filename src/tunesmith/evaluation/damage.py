"""What a run lost beside its task: which losses are damage, and what is said of them.

The rule: a loss is damage when it is larger than what the gate allows and its interval lies wholly on the side of a
loss. A change within the noise of the items is not damage, however large the point estimate; on few items hardly
anything can be shown, so that a gate without items enough to see what it forbids says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BENCHMARKS, KL = "benchmarks", "kl"


def drop_of(entry: dict[str, Any]) -> tuple[float, float | None]:
    """By how much a benchmark fell, and the least that it fell by with confidence; negative where it rose."""
    sign = 1 if entry["better"] == "higher" else -1
    bound = entry["high"] if sign > 0 else entry["low"]
    return -sign * entry["difference"], None if bound is None else -sign * bound


def shown_drop(entry: dict[str, Any]) -> bool:
    """Whether a benchmark fell by more than its items' noise."""
    drop, least = drop_of(entry)
    return drop > 0 and (least is None or least > 0)


def benchmark_check(required: float, benchmarks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gate `benchmarks`: none may fall by more than this."""
    check: dict[str, Any] = {"name": BENCHMARKS, "required": required, "measured": None, "passed": None, "reason": ""}
    if not benchmarks:
        return {**check, "reason": "no benchmark was measured"}
    worst = max(benchmarks, key=lambda entry: drop_of(entry)[0])
    damaged = [entry for entry in benchmarks if drop_of(entry)[0] > required and shown_drop(entry)]
    reason = "largest fall of a benchmark, at most what is required"
    if damaged:
        worst = max(damaged, key=lambda entry: drop_of(entry)[0])
        reason = "; ".join(f"{entry['name']} ({entry['skill']}) fell by {told_drop(entry)}" for entry in damaged)
    elif drop_of(worst)[0] > required:
        reason = f"{worst['name']} fell by {told_drop(worst)}, which its {worst['n']} items do not tell from chance"
    return {**check, "measured": drop_of(worst)[0], "passed": not damaged, "reason": reason}


def divergence_check(required: float, divergence: dict[str, Any]) -> dict[str, Any]:
    """The gate `kl`: the mean divergence from the base on general prompts, unless its interval reaches below."""
    check: dict[str, Any] = {"name": KL, "required": required, "measured": None, "passed": None, "reason": ""}
    if divergence.get("status") != "measured":
        return {**check, "reason": f"could not be measured: {divergence.get('reason', '')}"}
    value, low = divergence["value"], divergence["low"]
    passed = value <= required or (low is not None and low <= required)
    reason = "KL(base || tuned) on general prompts in nats a token, at most what is required"
    if passed and value > required:
        reason += "; its interval reaches that"
    return {**check, "measured": value, "passed": passed, "reason": reason}


def told_drop(entry: dict[str, Any]) -> str:
    """How much a benchmark fell, with the interval."""
    drop, _ = drop_of(entry)
    if entry["low"] is None:
        return f"{drop:.3g}"
    ends = sorted(abs(end) if entry["low"] * entry["high"] > 0 else end for end in (entry["low"], entry["high"]))
    return f"{drop:.3g} (interval {ends[0]:.3g} to {ends[1]:.3g})"


def said_of_benchmarks(benchmarks: Sequence[dict[str, Any]]) -> list[str]:
    """Clauses for the verdict: what fell beyond noise, or that nothing did."""
    fallen = [entry for entry in benchmarks if shown_drop(entry)]
    if fallen:
        return [
            f"{entry['name']} ({entry['skill']}) fell from {entry['base']:.3f} to {entry['tuned']:.3f}"
            for entry in fallen
        ]
    return [f"no loss is shown on {', '.join(entry['name'] for entry in benchmarks)}"] if benchmarks else []
