"""How far people, or a person and a machine, say the same of the same things."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 is full agreement, 0 what chance would give (Krippendorff 2011,
    "Computing Krippendorff's alpha-reliability", section D).

    Any number of raters may be missing from a unit; units with fewer than two values say nothing and are left out.

    Args:
        units: for each unit that was rated the values that it got, in any order.

    Returns:
        None where nothing can be said: no unit has two values, or only one value occurs at all.
    """
    agreeing, totals, n = 0.0, Counter[Hashable](), 0
    for values in units:
        if len(values) < 2:
            continue
        counts = Counter(values)
        agreeing += sum(count * (count - 1) for count in counts.values()) / (len(values) - 1)
        totals += counts
        n += len(values)
    by_chance = n * (n - 1) - sum(count * (count - 1) for count in totals.values())
    if not by_chance:
        return None
    # Observed over expected disagreement: (n - agreeing) / n and by_chance / (n (n - 1)).
    return 1 - (n - agreeing) * (n - 1) / by_chance


def share_agreeing(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Share of pairs of values of the same unit that are equal; None where no unit has two."""
    equal = pairs = 0
    for values in units:
        equal += sum(count * (count - 1) for count in Counter(values).values())
        pairs += len(values) * (len(values) - 1)
    return equal / pairs if pairs else None
