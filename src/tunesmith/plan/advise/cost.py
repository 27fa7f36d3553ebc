"""What retrieval and tuning cost over some months, and at how many questions one becomes cheaper than the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat

from tunesmith.base import InputError, Spec
from tunesmith.plan.advise.answers import How
from tunesmith.plan.dated_file import DatedFile

MONTHS_BETWEEN: dict[How, float] = {
    "never": math.inf,
    "yearly": 12,
    "monthly": 1,
    "weekly": 12 / 52,
    "daily": 12 / 365,
}
"""Months between two changes of the knowledge, and so between two trainings of a model that holds it."""
QUARTER = 3.0
"""Months between two trainings when nobody says how often the knowledge changes (COSTS: every quarter)."""


class RagPrices(Spec):
    """Prices of retrieval, in the file's currency."""

    setup: NonNegativeFloat
    month: NonNegativeFloat
    update: NonNegativeFloat
    query: NonNegativeFloat
    input_million: NonNegativeFloat
    output_million: NonNegativeFloat


class TunedPrices(Spec):
    """Prices of a tuned model, in the file's currency."""

    setup: NonNegativeFloat
    training: NonNegativeFloat
    month: NonNegativeFloat
    query: NonNegativeFloat
    input_million: NonNegativeFloat
    output_million: NonNegativeFloat


class ServingPrices(Spec):
    """What a model that answers costs, whichever it is, in the file's currency; what does not apply is zero."""

    input_million: NonNegativeFloat
    output_million: NonNegativeFloat
    search: NonNegativeFloat
    machine_hour: NonNegativeFloat

    def of_query(self, prompt: float, answer: float, searches: int, seconds: float | None) -> float | None:
        """One question of so many tokens; None where an hour has a price and nobody knows the seconds."""
        if self.machine_hour and seconds is None:
            return None
        tokens = (prompt * self.input_million + answer * self.output_million) / 1e6
        return tokens + searches * self.search + self.machine_hour * (seconds or 0.0) / 3600


class Prices(Spec):
    """A dated list of prices."""

    date: str
    source: str
    currency: str
    rag: RagPrices
    tuned: TunedPrices
    serving: ServingPrices | None = None


@dataclass(frozen=True)
class Use:
    """What is asked of either.

    Attributes:
        queries: questions a month.
        months: the horizon.
        prompt, retrieved, answer: tokens of a question.
        retrain_months: between two trainings; infinite for never.
    """

    queries: float = 5_000
    months: int = 12
    prompt: int = 200
    retrieved: int = 1_500
    answer: int = 200
    retrain_months: float = QUARTER

    @property
    def changes(self) -> int:
        """Trainings or updates after the first, within the horizon."""
        if math.isinf(self.retrain_months):
            return 0
        return math.ceil(self.months / self.retrain_months - 1e-9) - 1


@dataclass(frozen=True)
class Line:
    """One item of the bill over the whole horizon."""

    name: str
    rag: float
    tuned: float


@dataclass(frozen=True)
class Costs:
    """The comparison.

    Attributes:
        break_even: questions a month at which both cost the same; None when one is never overtaken.
        months: cumulative cost of each at the end of each month, the setup as month 0.
        crossing: the first month by whose end the one that begins dearer has become the cheaper one, to stay so.
    """

    prices: Prices
    use: Use
    lines: list[Line]
    break_even: float | None
    months: list[tuple[float, float]]
    crossing: int | None

    @property
    def rag(self) -> float:
        return sum(line.rag for line in self.lines)

    @property
    def tuned(self) -> float:
        return sum(line.tuned for line in self.lines)

    @property
    def sentence(self) -> str:
        currency, use = self.prices.currency, self.use
        asked = f"Over {use.months} months at {use.queries:,.0f} questions a month"
        figures = f"retrieval costs {self.rag:,.0f} {currency} and tuning {self.tuned:,.0f} {currency}"
        if self.break_even is None:
            cheaper = "retrieval" if self.rag < self.tuned else "tuning" if self.tuned < self.rag else "neither"
            return f"{asked}, {figures}; {cheaper} is cheaper at any number of questions."
        return f"{asked}, {figures}; they cost the same at {self.break_even:,.0f} questions a month."

    def as_json(self) -> dict[str, Any]:
        return {
            "sentence": self.sentence,
            "prices": self.prices.model_dump(),
            "use": {**vars(self.use), "retrain_months": _finite(self.use.retrain_months), "changes": self.use.changes},
            "lines": [vars(line) for line in self.lines],
            "total": {"rag": self.rag, "tuned": self.tuned},
            "break_even_queries_per_month": self.break_even,
            "crossing_month": self.crossing,
            "cumulative": [{"month": at, "rag": rag, "tuned": tuned} for at, (rag, tuned) in enumerate(self.months)],
        }


def read_prices(path: Path | None = None) -> Prices:
    """The prices of a file, or those that come with the package.

    Raises:
        InputError: naming the file, the line and the key.
    """
    sections = {"rag": RagPrices, "tuned": TunedPrices, "serving": ServingPrices}
    return DatedFile(Prices, sections, "tunesmith.plan.advise", "prices.yaml", "prices", "price").read(path)


def compare_costs(prices: Prices, use: Use) -> Costs:
    """Adds everything up.

    Raises:
        InputError: when there are no months or fewer than no questions.
    """
    for name, value, least in (("--months", use.months, 1), ("--queries", use.queries, 0)):
        if value < least:
            raise InputError(f"{value:g} is too few", where=name, fix=f"at least {least}")
    rag, tuned, asked = prices.rag, prices.tuned, use.queries * use.months
    read, written = use.prompt + use.retrieved, use.answer
    rag_tokens = (read * rag.input_million + written * rag.output_million) / 1e6
    tuned_tokens = (use.prompt * tuned.input_million + written * tuned.output_million) / 1e6
    lines = [
        Line("setting up, first training", rag.setup, tuned.setup + tuned.training),
        Line(f"{use.changes} changes of the knowledge", rag.update * use.changes, tuned.training * use.changes),
        Line("hosting", rag.month * use.months, tuned.month * use.months),
        Line("questions, retrieval included", rag.query * asked, tuned.query * asked),
        Line("tokens", rag_tokens * asked, tuned_tokens * asked),
    ]
    fixed = sum(line.tuned - line.rag for line in lines[:3])
    saved = (rag.query + rag_tokens - tuned.query - tuned_tokens) * use.months  # a question a month more
    break_even = fixed / saved if saved and fixed / saved > 0 else None
    months = [_until(month, prices, use, rag_tokens, tuned_tokens) for month in range(use.months + 1)]
    return Costs(prices, use, lines, break_even, months, _crossing(months))


def _until(month: int, prices: Prices, use: Use, rag_tokens: float, tuned_tokens: float) -> tuple[float, float]:
    """What both have cost by the end of a month."""
    rag, tuned = prices.rag, prices.tuned
    later = 0 if math.isinf(use.retrain_months) else max(0, math.ceil(month / use.retrain_months - 1e-9) - 1)
    asked = use.queries * month
    return (
        rag.setup + rag.update * later + rag.month * month + (rag.query + rag_tokens) * asked,
        tuned.setup + tuned.training * (1 + later) + tuned.month * month + (tuned.query + tuned_tokens) * asked,
    )


def _crossing(months: list[tuple[float, float]]) -> int | None:
    ahead = [rag < tuned for rag, tuned in months]
    if ahead[0] == ahead[-1]:
        return None
    return next(at for at in range(len(ahead)) if all(later == ahead[-1] for later in ahead[at:]))


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value
