"""Rows held back for validation and test: deterministic in seed and content, and no prompt on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

from tunesmith.base import InputError
from tunesmith.data.rows import Row

TEST_SHARE, TEST_LEAST, TEST_MOST = 0.1, 20, 200


def hold_back(rows: Sequence[Row], share: float, *, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    """Splits off about ``share`` of the rows, whole groups of equal prompts at a time.

    Returns:
        The rows that stay, and those held back, both in their old order.

    Raises:
        InputError: when nothing would be left on one side.
    """
    return _hold_back_count(rows, max(1, round(share * len(rows))), seed=seed, key=key)


def hold_back_test(rows: Sequence[Row], *, seed: int) -> tuple[list[Row], list[Row]]:
    """The default test split: a tenth of the rows, at least 20 and at most 200, and never more than a third."""
    count = min(TEST_MOST, max(TEST_LEAST, round(TEST_SHARE * len(rows))), max(1, len(rows) // 3))
    return _hold_back_count(rows, count, seed=seed, key="data.test")


def _hold_back_count(rows: Sequence[Row], count: int, *, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    """Takes groups in an order drawn from their content while they fit, and at least the smallest one."""
    keys = [row.prompt_key for row in rows]
    groups = Counter(keys)
    if len(groups) < 2:
        noun = "row is" if len(rows) == 1 else "rows with one and the same prompt are"
        raise InputError(
            f"{len(rows)} {noun} too few to hold any back",
            where=key,
            fix="name a file of its own, or add rows" + ("; evaluate: off needs none" if key == "data.test" else ""),
        )
    drawn = sorted(groups, key=lambda name: sha256(f"{seed}:{key}:{name}".encode()).digest())
    held: set[str] = set()
    taken = 0
    for group in drawn:
        if taken + groups[group] <= count and len(held) < len(groups) - 1:
            held.add(group)
            taken += groups[group]
    held = held or {min(drawn, key=lambda name: groups[name])}
    kept = [row for row, group in zip(rows, keys, strict=True) if group not in held]
    return kept, [row for row, group in zip(rows, keys, strict=True) if group in held]
