"""What goes wrong with a strategy, as a table: every row whose condition holds is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunesmith.plan.advise.cost import read_prices
from tunesmith.plan.advise.rules import Strategy
from tunesmith.plan.advise.situation import ENOUGH_ROWS, GOOD_ROWS, MUCH_TEXT, RETRIEVAL_MS, Situation
from tunesmith.plan.advise.sources import (
    CARLINI,
    COSTS,
    DATA_SIZES,
    DONT,
    FORGETTING,
    GEKHMAN,
    LADDER,
    LECTURE,
    LEE,
    PRETRAINING,
    RAG_TABLE,
)

TRAINED = ("fine_tune", "fine_tune_rag", "continued_pretraining")
BY_EXAMPLES = ("fine_tune", "fine_tune_rag")
STALE_SHARE = 0.2
FACTS_SHARE = 0.5
DUPLICATE_SHARE = 0.01


@dataclass(frozen=True)
class Caution:
    """One row of the table.

    Attributes:
        example: answers for which it holds.
    """

    name: str
    holds: Callable[[Situation, Strategy], bool]
    text: Callable[[Situation], str]
    source: str
    example: dict[str, Any] = field(default_factory=dict)


def _always(text: str) -> Callable[[Situation], str]:
    return lambda known: text


def _rows(known: Situation) -> str:
    return f"{known.rows:,}"


WARNINGS: tuple[Caution, ...] = (
    Caution(
        "few rows",
        lambda known, strategy: known.rows is not None and known.rows < ENOUGH_ROWS and known.form,
        lambda known: (
            f"there are {_rows(known)} examples, fewer than 1,000: a model tuned on them learns them by heart"
        ),
        DONT,
        {"change": "style", "examples": 100},
    ),
    Caution(
        "not many rows",
        lambda known, strategy: (
            strategy in BY_EXAMPLES and known.rows is not None and ENOUGH_ROWS <= known.rows < GOOD_ROWS
        ),
        lambda known: (
            f"with {_rows(known)} examples a model learns the format and generalises little; 10,000 and more are better"
        ),
        DATA_SIZES,
        {"change": "format", "examples": 2000, "tried": "prompting", "metric": "f1"},
    ),
    Caution(
        "rows unknown",
        lambda known, strategy: strategy in BY_EXAMPLES and known.rows is None,
        _always(
            "how many examples there are is not known: with fewer than 1,000 the answer is prompting (--examples, "
            "or --data for a file that is counted)"
        ),
        DONT,
        {"change": "format", "tried": "prompting", "metric": "f1"},
    ),
    Caution(
        "prompting not tried",
        lambda known, strategy: (known.form or known.language or strategy == "rag") and not known.prompting_tried,
        _always("prompting was not tried, or nobody said so: measure it first, it may be enough"),
        LADDER,
        {"change": "format", "examples": 5000},
    ),
    Caution(
        "no metric",
        lambda known, strategy: (not known.measured and strategy != "prompt") or (not known.measured and known.form),
        _always("no metric was named: decide how success is measured before anything is trained or compared"),
        DONT,
        {"change": "facts"},
    ),
    Caution(
        "maintenance unknown",
        lambda known, strategy: strategy in TRAINED and known.answers.maintained is None,
        _always("nobody said who will train the model again when its base or its data change"),
        DONT,
        {"change": "domain-language", "tokens": "20B"},
    ),
    Caution(
        "facts go stale",
        lambda known, strategy: (
            strategy == "fine_tune" and (known.facts or known.answers.knowledge_changes == "yearly")
        ),
        _always(
            "the facts in the weights go stale, and about 30 % of them will be told wrong: train again when they "
            "change, and check answers"
        ),
        RAG_TABLE,
        {
            "change": "facts",
            "knowledge_changes": "never",
            "latency": 50,
            "examples": 10_000,
            "tried": "prompting",
            "metric": "f1",
        },
    ),
    Caution(
        "stale facts in the data",
        lambda known, strategy: strategy in TRAINED and known.data is not None and known.data.stale >= STALE_SHARE,
        lambda known: (
            f"{known.data.stale:.0%} of the answers in the data hold years, prices, versions or the like that "
            "will go stale in the weights: take them out, or retrieve them"
            if known.data
            else ""
        ),
        DONT,
    ),
    Caution(
        "new facts in the data",
        lambda known, strategy: (
            strategy == "fine_tune"
            and known.data is not None
            and not known.data.is_text
            and known.data.new_facts >= FACTS_SHARE
        ),
        lambda known: (
            f"{known.data.new_facts:.0%} of the answers hold names or numbers that their questions do not: "
            "tuning on facts that a model does not know teaches it to invent"
            if known.data
            else ""
        ),
        GEKHMAN,
    ),
    Caution(
        "duplicates",
        lambda known, strategy: (
            known.data is not None
            and known.data.duplicates + known.data.near_duplicates > DUPLICATE_SHARE * known.data.rows
        ),
        lambda known: (
            f"{known.data.duplicates:,} rows stand in the data more than once and {known.data.near_duplicates:,} "
            "almost so: `tunesmith data check --fix` leaves them out"
            if known.data
            else ""
        ),
        LEE,
    ),
    Caution(
        "few rows are new",
        lambda known, strategy: (
            known.data is not None
            and not known.data.is_text
            and known.data.rows >= ENOUGH_ROWS > known.data.rows - known.data.duplicates - known.data.near_duplicates
        ),
        _always("fewer than 1,000 rows are left when those that repeat others are taken out"),
        DATA_SIZES,
    ),
    Caution(
        "raw text",
        lambda known, strategy: strategy in BY_EXAMPLES and known.data is not None and known.data.is_text,
        _always(
            "the rows are raw text, so that questions are learned as well as answers: name the mark between them with "
            "data.answer_after, or write prompt and completion"
        ),
        RAG_TABLE,
    ),
    Caution(
        "little text",
        lambda known, strategy: strategy == "continued_pretraining" and (known.tokens or 0) < MUCH_TEXT,
        lambda known: (
            ("how much text there is is not known" if known.tokens is None else f"there are {known.tokens:,} tokens")
            + ": a new field or language wants billions (10B and more); less brings its words, and not its knowledge"
        ),
        PRETRAINING,
        {"change": "domain-language"},
    ),
    Caution(
        "no instructions",
        lambda known, strategy: strategy == "continued_pretraining",
        _always(
            "raw text changes what a model knows and not how it behaves: it may follow instructions worse "
            "afterwards, so tune on instructions after it"
        ),
        PRETRAINING,
        {"change": "domain-language"},
    ),
    Caution(
        "forgetting",
        lambda known, strategy: strategy in TRAINED,
        _always(
            "training on one task forgets others: mix in 20 % general rows (data.replay), keep to one or two epochs, "
            "and let the gate on forgetting decide"
        ),
        FORGETTING,
        {"change": "domain-language"},
    ),
    Caution(
        "retrieval is slow",
        lambda known, strategy: strategy in ("rag", "fine_tune_rag") and known.hurried,
        lambda known: (
            f"{known.answers.latency:g} ms is less than retrieval usually takes (about {RETRIEVAL_MS} ms with "
            "its longer prompt): measure it, cache frequent questions, or give more time"
        ),
        COSTS,
        {"change": "facts", "knowledge_changes": "daily", "latency": 50},
    ),
    Caution(
        "private data",
        lambda known, strategy: (
            strategy in TRAINED
            and (bool(known.answers.private) or (known.data is not None and known.data.personal > 0))
        ),
        lambda known: (
            (
                f"{known.data.personal:,} rows hold what looks like personal data: "
                if known.data is not None and known.data.personal
                else "the data are private: "
            )
            + "a tuned model can say what it was trained on, word for word; retrieval can ask who is asking"
        ),
        CARLINI,
        {"change": "format", "examples": 5000, "tried": "prompting", "metric": "f1", "private": "yes"},
    ),
    Caution(
        "money",
        lambda known, strategy: (
            strategy in TRAINED
            and known.answers.money is not None
            and known.answers.money < read_prices().tuned.training
        ),
        lambda known: (
            f"{known.answers.money:g} may be too little: one training costs about {read_prices().tuned.training:g} "
            "by the prices that come along (`advise --cost`; `tunesmith plan` tells the hours that a recipe needs)"
        ),
        COSTS,
        {"change": "domain-language", "money": 20},
    ),
    Caution(
        "few-shot not tried",
        lambda known, strategy: (
            strategy in BY_EXAMPLES
            and known.prompting_tried
            and not known.shots_overflow
            and "few-shot" not in (known.answers.tried or ())
        ),
        _always("examples in the prompt were not tried: few-shot is the next thing to measure, and costs no training"),
        LADDER,
        {"change": "format", "examples": 5000, "tried": "prompting", "metric": "f1"},
    ),
    Caution(
        "validation",
        lambda known, strategy: strategy in BY_EXAMPLES and known.rows is not None and known.rows < 2 * ENOUGH_ROWS,
        _always("with so few rows watch the validation loss and stop early"),
        LECTURE,
        {"change": "format", "examples": 1500, "tried": "prompting", "metric": "f1"},
    ),
)


def warnings_for(known: Situation, strategy: Strategy) -> list[str]:
    return [warning.text(known) for warning in WARNINGS if warning.holds(known, strategy)]
