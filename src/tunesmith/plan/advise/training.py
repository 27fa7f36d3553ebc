"""Which method and objective, as two tables in which the first row that holds decides, and the recipe that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tunesmith.metrics import METRICS
from tunesmith.plan.advise.rules import Strategy
from tunesmith.plan.advise.situation import MANY_ROWS, Situation
from tunesmith.plan.advise.sources import (
    BY_DEFAULT,
    CHAPTER,
    FULL,
    INSTRUCTION_TUNING,
    KTO,
    PREFERENCES,
    PRETRAINING,
    QLORA,
)

FULL_BYTES = 16
"""Bytes a parameter for training all weights: fp32 weights, gradients and two Adam states."""
HALF_BYTES = 2.5
"""Bytes a parameter for LoRA over bf16 weights with what a small batch needs."""
PLACEHOLDER = "train.jsonl"


@dataclass(frozen=True)
class Choice:
    """One row: what is chosen and why.

    Attributes:
        example: answers for which it is the first that holds.
    """

    kind: str
    holds: Callable[[Situation], bool]
    reason: str
    source: str
    example: dict[str, Any] = field(default_factory=dict)


def _fits(known: Situation, bytes_each: float) -> bool | None:
    """Whether so many bytes a parameter fit; None when model or memory are not known."""
    answers = known.answers
    if answers.parameters is None or answers.memory is None:
        return None
    return answers.parameters * bytes_each <= answers.memory * 1e9


METHODS: tuple[Choice, ...] = (
    Choice(
        "full",
        lambda known: (known.rows or 0) >= MANY_ROWS and _fits(known, FULL_BYTES) is True,
        f"{MANY_ROWS:,} examples and the memory for {FULL_BYTES} bytes a parameter: all weights may be trained",
        FULL,
        {"examples": "200k", "parameters": "1B", "memory": 80},
    ),
    Choice(
        "qlora",
        lambda known: _fits(known, HALF_BYTES) is False,
        "the weights in 16 bits and what training needs beside them do not fit: the base is held in 4 bits",
        QLORA,
        {"parameters": "8B", "memory": 12},
    ),
    Choice(
        "lora",
        lambda known: True,
        "adapters come close to training all weights, forget less, and are merged for serving",
        BY_DEFAULT,
        {},
    ),
)

OBJECTIVES: tuple[Choice, ...] = (
    Choice(
        "dpo",
        lambda known: known.data is not None and known.data.format in ("preference", "rated"),
        "the rows are pairs of a better and a worse answer: preferences are learned directly, after supervised tuning",
        PREFERENCES,
    ),
    Choice(
        "kto",
        lambda known: known.data is not None and known.data.format == "unpaired",
        "the rows are answers that were liked or not, without pairs",
        KTO,
    ),
    Choice(
        "classify",
        lambda known: known.task == "classify",
        "one label a row: a model with a linear head, best an encoder",
        CHAPTER,
        {"task": "classify"},
    ),
    Choice(
        "tag",
        lambda known: known.task == "tag",
        "one label a word: a model with a linear head, best an encoder",
        CHAPTER,
        {"task": "tag"},
    ),
    Choice(
        "regress",
        lambda known: known.task == "regress",
        "a number a row: a model with a linear head, best an encoder",
        CHAPTER,
        {"task": "regress"},
    ),
    Choice(
        "sft", lambda known: True, "the answers of the examples are learned, not their prompts", INSTRUCTION_TUNING, {}
    ),
)
PRETRAIN = Choice("pretrain", lambda known: True, "every token of raw text is learned", PRETRAINING)


def method_for(known: Situation) -> Choice:
    return next(choice for choice in METHODS if choice.holds(known))


def objective_for(known: Situation, strategy: Strategy) -> Choice:
    if strategy == "continued_pretraining":
        return PRETRAIN
    return next(choice for choice in OBJECTIVES if choice.holds(known))


def recipe_for(known: Situation, strategy: Strategy) -> dict[str, Any] | None:
    """A recipe that `tunesmith plan` takes; None where nothing should be trained or measured yet.

    For a strategy without training it is the run to measure that strategy against.
    """
    if strategy == "do_not":
        return None
    method, objective = method_for(known).kind, objective_for(known, strategy).kind
    text = known.data is not None and known.data.is_text
    recipe: dict[str, Any] = {
        "model": known.answers.model,
        "data": {"train": known.answers.data or PLACEHOLDER, "validation": 0.1, "test": 0.1},
        "method": {"kind": method},
        "objective": {"kind": objective},
        "train": {"epochs": 1 if text else 2},
        "evaluate": {},
        "gate": {"forgetting": "5%"} if objective in ("sft", "pretrain", "dpo") else {},
    }
    metric = known.answers.metric
    if metric in METRICS and objective != "pretrain":  # documents have no answers to score
        recipe["evaluate"]["metrics"] = [metric]
        recipe["gate"] = {metric: "+0.01", **recipe["gate"]}
    return {key: value for key, value in recipe.items() if value != {}}
