"""Rows held back for validation and test: deterministic in seed and content, and no prompt or group on both sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from tunesmith.base import InputError
from tunesmith.data.mix import shares

TEST_SHARE, TEST_LEAST, TEST_MOST = 0.1, 20, 200


@dataclass(frozen=True)
class Belonging:
    """What ties rows together, one entry a row; equal keys are equal things.

    Attributes:
        prompts: rows with one prompt are never parted.
        groups: nor are those of one group, when the recipe names a field for that.
        strata: every stratum is held back in its share, when the recipe names a field for that.
    """

    prompts: np.ndarray
    groups: np.ndarray | None = None
    strata: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def hold_back(rows: Belonging, share: float, *, seed: int, key: str) -> np.ndarray:
    """Splits off about ``share`` of the rows, whole groups at a time.

    Returns:
        bool ``[rows]``: which rows are held back.

    Raises:
        InputError: when nothing would be left on one side.
    """
    return _held(rows, max(1, round(share * len(rows))), seed=seed, key=key)


def hold_back_test(rows: Belonging, *, seed: int) -> np.ndarray:
    """The default test split: a tenth of the rows, at least 20 and at most 200, and never more than a third."""
    count = min(TEST_MOST, max(TEST_LEAST, round(TEST_SHARE * len(rows))), max(1, len(rows) // 3))
    return _held(rows, count, seed=seed, key="data.test")


def _held(rows: Belonging, count: int, *, seed: int, key: str) -> np.ndarray:
    """Takes groups in an order drawn from their content while they fit, and at least the smallest one."""
    tied = _tied(rows)
    names, which, sizes = np.unique(tied, return_inverse=True, return_counts=True)
    if len(names) < 2:
        noun = (
            "row is"
            if len(rows) == 1
            else f"rows with one and the same {'group' if rows.groups is not None else 'prompt'} are"
        )
        raise InputError(
            f"{len(rows)} {noun} too few to hold any back",
            where=key,
            fix="name a file of its own, or add rows" + ("; evaluate: off needs none" if key == "data.test" else ""),
        )
    drawn = sorted(range(len(names)), key=lambda at: _draw(seed, key, names[at]))
    held, left = np.zeros(len(names), bool), len(names)
    for members, wanted in _by_stratum(rows, which, drawn, count):
        taken = 0
        for at in members:
            if taken + sizes[at] <= wanted and left > 1:
                held[at], left = True, left - 1
                taken += sizes[at]
    if not held.any():
        held[min(drawn, key=lambda at: sizes[at])] = True
    return held[which]


def _draw(seed: int, key: str, name: bytes) -> bytes:
    return sha256(f"{seed}:{key}:{name.ljust(16, bytes(1)).hex()}".encode()).digest()


def _tied(rows: Belonging) -> np.ndarray:
    """For each row the name of what it is tied to: the least key among all rows reached over prompts and groups."""
    if rows.groups is None:
        return rows.prompts
    names, at = np.unique(rows.prompts, return_inverse=True)
    _, group = np.unique(rows.groups, return_inverse=True)
    label = at.copy()
    while True:
        before = label
        for tie in (group, at):
            least = np.full(tie.max() + 1, len(names))
            np.minimum.at(least, tie, label)
            label = least[tie]
        if (label == before).all():
            return names[label]


def _by_stratum(rows: Belonging, which: np.ndarray, drawn: list[int], count: int) -> list[tuple[list[int], int]]:
    """The groups of each stratum in the order drawn, and how many rows are wanted of it."""
    if rows.strata is None:
        return [(drawn, count)]
    votes: dict[int, Counter[bytes]] = defaultdict(Counter)
    for group, stratum in zip(which.tolist(), rows.strata.tolist(), strict=True):
        votes[group][stratum] += 1
    # A group that several strata share counts for the one that most of its rows have.
    belongs = {group: max(sorted(found), key=lambda name, found=found: found[name]) for group, found in votes.items()}
    sizes = Counter(rows.strata.tolist())
    strata = sorted(sizes)
    wanted = shares([sizes[name] for name in strata], count)
    members: dict[bytes, list[int]] = defaultdict(list)
    for group in drawn:
        members[belongs[group]].append(group)
    return [(members[name], share) for name, share in zip(strata, wanted, strict=True)]
