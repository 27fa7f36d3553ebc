"""Votes on pairs of answers: which side was shown where, what is kept, and what the votes come to.

The one who votes does not know who wrote which answer. Sides are drawn for every row and rater from the poll's seed, so
that a liking for one side of the screen falls on both systems alike.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunesmith.metrics.agreement import krippendorff_alpha, share_agreeing
from tunesmith.metrics.proportions import wilson
from tunesmith.metrics.significance import mcnemar_exact

Choice = Literal["a", "b", "tie", "both_bad", "skip"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad", "skip")
SCORES: dict[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
"""What a vote is worth for A; a row that was skipped counts nowhere."""
PREFERENCES = {"a": "a", "b": "b", "tie": "neither", "both_bad": "neither"}
"""What agreement is about: which answer is better, if one is."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        row: counted from 1.
        source: file and line.
        references: answers that the rows give, if any.
    """

    row: int
    source: str
    prompt: str
    references: list[str]
    a: str
    b: str

    @property
    def same(self) -> bool:
        """Whether there is nothing to choose."""
        return self.a.strip() == self.b.strip()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Vote:
    """One rater's choice for one row, and which answer stood on the left."""

    row: int
    rater: str
    choice: Choice
    left: Literal["a", "b"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def left_of(seed: int, rater: str, row: int) -> Literal["a", "b"]:
    """Which answer stands on the left."""
    return random.Random(f"{seed} {rater} {row}").choice(["a", "b"])  # type: ignore[return-value]


def standing(lines: Sequence[Mapping[str, Any]]) -> list[Vote]:
    """The votes that hold: each rater's last one for a row, without those that were taken back."""
    found: dict[tuple[str, int], Vote] = {}
    for line in lines:
        key = (line["rater"], line["row"])
        found.pop(key, None)
        if "undo" not in line:
            found[key] = Vote(line["row"], line["rater"], line["choice"], line["left"])
    return list(found.values())


def win_rate(scores: Sequence[float], confidence: float) -> dict[str, Any]:
    """How often A wins, ties counted half, with Wilson's interval over rows and a sign test over those that are no tie.

    Args:
        scores: of each row, between 0 (B is better) and 1; of several raters their mean.
    """
    interval = wilson(sum(scores), len(scores), confidence)
    wins, losses = sum(score > 0.5 for score in scores), sum(score < 0.5 for score in scores)
    return {
        "rows": len(scores),
        "win_rate": sum(scores) / len(scores) if scores else None,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "wins": wins,
        "losses": losses,
        "ties": len(scores) - wins - losses,
        "p": mcnemar_exact(losses, wins),  # with ties left out this is the sign test
    }


def vote_results(pairs: Sequence[Pair], votes: Sequence[Vote], confidence: float) -> dict[str, Any]:
    """What the votes come to.

    Returns:
        `win_rate` over rows (see `win_rate`; a row's score is the mean of its raters'), `raters` (for each the same
        over its own votes, `choices` and `left`, the share of its decided votes that went to the left side),
        `agreement` (`alpha`, `share`, `rows`) of several raters, `same` (rows whose answers are equal, which nobody is
        asked about and which count nowhere) and `unvoted`.
    """
    asked = {pair.row for pair in pairs if not pair.same}
    votes = [vote for vote in votes if vote.row in asked]  # a file may bring votes on rows with equal answers
    counted = [vote for vote in votes if vote.choice != "skip"]
    by_row: dict[int, list[Vote]] = {}
    for vote in counted:
        by_row.setdefault(vote.row, []).append(vote)
    raters = sorted({vote.rater for vote in votes})
    return {
        **win_rate(row_scores(counted), confidence),
        "votes": len(counted),
        "same": len(pairs) - len(asked),
        "unvoted": len(asked - by_row.keys()),
        "raters": [_of_rater(rater, [vote for vote in votes if vote.rater == rater], confidence) for rater in raters],
        "agreement": agreement([[PREFERENCES[vote.choice] for vote in row] for row in by_row.values()]),
    }


def row_scores(votes: Sequence[Vote]) -> list[float]:
    """A's score in every row that has votes."""
    return list(scores_by_row(votes).values())


def scores_by_row(votes: Sequence[Vote]) -> dict[int, float]:
    by_row: dict[int, list[float]] = {}
    for vote in votes:
        if vote.choice != "skip":
            by_row.setdefault(vote.row, []).append(SCORES[vote.choice])
    return {row: sum(scores) / len(scores) for row, scores in by_row.items()}


def agreement(units: Sequence[Sequence[Hashable]]) -> dict[str, Any] | None:
    """Krippendorff's alpha and the raw share of agreeing pairs; None where no row was judged twice."""
    several = [unit for unit in units if len(unit) > 1]
    if not several:
        return None
    return {"rows": len(several), "alpha": krippendorff_alpha(several), "share": share_agreeing(several)}


def _of_rater(rater: str, votes: Sequence[Vote], confidence: float) -> dict[str, Any]:
    decided = [vote for vote in votes if vote.choice in ("a", "b")]
    return {
        "rater": rater,
        **win_rate(row_scores(votes), confidence),
        "choices": {choice: Counter(vote.choice for vote in votes)[choice] for choice in CHOICES},
        "left": sum(vote.choice == vote.left for vote in decided) / len(decided) if decided else None,
    }
