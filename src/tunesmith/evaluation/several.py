"""More than one model against another: runs that differ in their seed are one system, several systems are corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.evaluation.answers import Judged
from tunesmith.evaluation.compare import (
    PERPLEXITY,
    REWARD_ACCURACY,
    better_way,
    comparable,
    compare_metrics,
    metric_rows,
    shown_of,
)
from tunesmith.metrics import RowStatistics, bootstrap_over_seeds, holm
from tunesmith.recipe import EvaluateSpec

System = Sequence[Sequence[Judged]]
"""The same rows as each seed of one system answered them; a system without seeds has one."""
OVER_SEEDS = "bootstrap over rows and seeds"


def compare_systems(
    names: Sequence[str], base: System, tuned: System, spec: EvaluateSpec, seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """As `compare_metrics`, for systems of several seeds: their means, with intervals over rows and seeds."""
    if len(base) == len(tuned) == 1:
        return compare_metrics(names, base[0], tuned[0], spec, seed)
    entries, warnings = [], []
    for name in names:
        found = None if name == REWARD_ACCURACY else _statistics(name, base, tuned)
        if found is None:
            warnings.append(f"{name} could not be computed over seeds: not every seed has what it needs on every row")
            continue
        interval, p = bootstrap_over_seeds(*found, resamples=spec.resamples, confidence=spec.confidence, seed=seed)
        entries.append(
            {
                "name": name,
                **vars(interval),
                "better": better_way(name),
                "primary": name == names[0],
                "p": p,
                "test": OVER_SEEDS,
            }
        )
    return corrected([entries], spec.confidence)[0], warnings


def _statistics(name: str, base: System, tuned: System) -> tuple[list[RowStatistics], list[RowStatistics]] | None:
    """Statistics of every seed on the rows that all can be measured on; None where they are not the same rows."""
    sides: list[list[RowStatistics]] = []
    for system in (base, tuned):
        side = []
        for rows in system:
            pairs, dead = comparable(name, base[0], rows)
            stat = None if dead or len(pairs) < len(rows) else metric_rows(name, [row for _, row in pairs])
            if stat is None:
                return None
            side.append(stat)
        sides.append(side)
    if len({len(stat) for side in sides for stat in side}) > 1:
        return None
    return sides[0], sides[1]


def corrected(comparisons: Sequence[Sequence[dict[str, Any]]], confidence: float) -> list[list[dict[str, Any]]]:
    """Entries of several comparisons with `p_corrected` and `shown`.

    The deciding metric of all comparisons is one family of tests, all other metrics of all comparisons another (Holm
    1979): a single comparison's deciding metric stands by itself.
    """
    places = [(at, entry["name"]) for at, entries in enumerate(comparisons) for entry in entries]
    known = {(at, entry["name"]): entry for at, entries in enumerate(comparisons) for entry in entries}
    p: dict[tuple[int, str], float] = {}
    for primary in (True, False):
        family = [place for place in places if known[place]["primary"] is primary]
        p |= zip(family, holm([known[place]["p"] for place in family]), strict=True)
    found: list[list[dict[str, Any]]] = [[] for _ in comparisons]
    for at, name in places:
        entry = {**known[at, name], "p_corrected": p[at, name]}
        found[at].append({**entry, "shown": shown_of(entry, 1 - confidence)})
    return found


def without_unlike_tokens(names: Sequence[str], base: System, tuned: System) -> tuple[list[str], str | None]:
    """The metrics that two systems can be compared by; perplexity by the token needs the same tokens."""
    first = base[0]
    unlike = any(
        one.targets != other.targets for rows in (*base, *tuned) for one, other in zip(first, rows, strict=True)
    )
    if not unlike or PERPLEXITY not in names:
        return list(names), None
    told = f"{PERPLEXITY} is left out: the two models cut the same text into different tokens"
    return [name for name in names if name != PERPLEXITY], told
