"""The decision as a table: the first row whose condition holds gives the strategy.

Order is the argument: what cannot be learned reliably is retrieved before anything else is asked; what nobody will
maintain is not trained; what may not need training is tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.plan.advise.situation import ENOUGH_ROWS, ENOUGH_TEXT, RETRIEVAL_MS, Situation
from tunesmith.plan.advise.sources import (
    CHAPTER,
    COMBINED,
    COSTS,
    DECISION_MATRIX,
    DECISION_TREE,
    DONT,
    GEKHMAN,
    GURURANGAN,
    LADDER,
    OVADIA,
    RAG_TABLE,
    WHEN,
)

Strategy = Literal["prompt", "few-shot", "rag", "fine_tune", "fine_tune_rag", "continued_pretraining", "do_not"]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        reason: why the strategy follows, one sentence.
        would_change: what would make another row decide.
        example: answers that this row decides.
    """

    name: str
    strategy: Strategy
    holds: Callable[[Situation], bool]
    reason: str
    sources: tuple[str, ...]
    would_change: tuple[str, ...]
    example: dict[str, Any] = field(default_factory=dict)


def _form_alone(known: Situation) -> bool:
    return known.form and not known.facts


def _tune(known: Situation) -> bool:
    """Whether form could be trained at all."""
    return known.prompting_tried and known.measured and not known.few_rows


_READY: dict[str, Any] = {
    "examples": 10_000,
    "tried": ["prompting", "few-shot"],
    "metric": "accuracy",
    "maintained": "yes",
}
_WITH_ROWS = f"at least {ENOUGH_ROWS:,} examples of good answers"
_FORM_TOO = "answers that must also have another style or format than the model's own: then both"

RULES: tuple[Rule, ...] = (
    Rule(
        "nothing to change",
        "prompt",
        lambda known: not known.facts and not known.form and not known.language,
        "Nothing was named that the model must know, say or do otherwise: a good prompt is the whole task.",
        (DECISION_TREE, LADDER),
        (
            "facts that the model lacks: then retrieval",
            "a style, format or behaviour that a prompt does not bring about",
        ),
        {"change": "nothing"},
    ),
    Rule(
        "stable facts, no time to look them up",
        "fine_tune",
        lambda known: (
            known.facts
            and not known.facts_move
            and known.settled_facts
            and known.hurried
            and _tune(known)
            and known.maintainable
        ),
        f"The knowledge is stable and the answer must begin sooner than a lookup allows (about {RETRIEVAL_MS} ms for a "
        "vector search and its longer prompt), so the retrieval step is trained away, although facts stick badly.",
        (WHEN, COSTS),
        ("a latency that allows retrieval", "knowledge that changes: then retrieval, whatever the latency"),
        {**_READY, "change": "facts", "knowledge_changes": "never", "latency": 50},
    ),
    Rule(
        "facts that change",
        "rag",
        lambda known: known.facts and not known.form and not known.language and known.facts_move,
        "Knowledge that changes faster than training cycles is looked up: a document is replaced in a minute, a model "
        "goes stale.",
        (DECISION_MATRIX, RAG_TABLE, DONT, COSTS),
        ("knowledge that never changes together with a latency that no lookup meets", _FORM_TOO),
        {"change": "facts", "knowledge_changes": "weekly"},
    ),
    Rule(
        "new facts",
        "rag",
        lambda known: known.facts and not known.form and not known.language,
        "Facts are looked up, not trained in: models tuned on facts still get about 30 % of them wrong, and retrieval "
        "has the exact text before it.",
        (RAG_TABLE, DONT, OVADIA, GEKHMAN),
        ("knowledge that never changes together with a latency that no lookup meets", _FORM_TOO),
        {"change": "facts"},
    ),
    Rule(
        "facts and form, nobody to maintain it",
        "rag",
        lambda known: known.facts and not known.maintainable,
        "Retrieval brings the facts and the prompt asks for the form: nobody would train again when the base model "
        "changes.",
        (COMBINED, DONT),
        ("somebody who owns the training pipeline and its models: then both",),
        {"change": ["facts", "style"], "maintained": "no", "examples": 5000},
    ),
    Rule(
        "facts and form, too few examples",
        "rag",
        lambda known: known.facts and known.few_rows,
        f"Retrieval brings the facts; for the form, fewer than {ENOUGH_ROWS:,} examples belong into the prompt.",
        (COMBINED, DONT),
        (f"{_WITH_ROWS}: then both",),
        {"change": ["facts", "format"], "examples": 200},
    ),
    Rule(
        "facts and form, prompting or measure missing",
        "rag",
        lambda known: known.facts and (known.nothing_tried or known.unmeasurable),
        "Retrieval is needed for the facts whatever follows; for the form a prompt comes first, with a metric that "
        "says whether it is enough.",
        (LADDER, DONT, COMBINED),
        ("a prompt with retrieval that was measured and misses the target: then both",),
        {"change": ["facts", "style"], "tried": "nothing", "examples": 5000},
    ),
    Rule(
        "facts and form",
        "fine_tune_rag",
        lambda known: known.facts,
        "Both at once: the model is tuned on format, instructions and style, and facts are retrieved, so that they are "
        "exact and up to date.",
        (COMBINED, RAG_TABLE),
        (
            "no need for facts: then tuning alone",
            "a prompt that brings about the form: then retrieval alone",
            f"fewer than {ENOUGH_ROWS:,} examples: then retrieval, and the examples in the prompt",
        ),
        {**_READY, "change": ["facts", "style"], "knowledge_changes": "weekly"},
    ),
    Rule(
        "nobody to maintain it",
        "do_not",
        lambda known: not known.maintainable,
        "A tuned model is a responsibility: it must be trained again when base model or data change, and nobody will.",
        (DONT,),
        ("somebody who owns the training pipeline and its models", "a hosted model whose prompt does it"),
        {**_READY, "change": "format", "maintained": "no"},
    ),
    Rule(
        "the language of a field",
        "continued_pretraining",
        lambda known: known.language and known.much_text,
        "The model must learn how the words of a field go together, which raw text teaches: pretraining goes on, "
        "and instructions are taught after it.",
        (DECISION_MATRIX, DECISION_TREE, GURURANGAN),
        (
            f"less than {ENOUGH_TEXT:,} tokens of text: then terminology is taught by examples",
            "facts that are asked for: those are retrieved",
        ),
        {"change": "domain-language", "tokens": "20B"},
    ),
    Rule(
        "few examples, prompting not tried",
        "prompt",
        lambda known: known.few_rows and not known.prompting_tried,
        f"Fewer than {ENOUGH_ROWS:,} examples are too few to tune on, and prompts have not been tried: begin with "
        "clear instructions, then examples, then reasoning step by step, then a chain of prompts.",
        (DONT, LADDER),
        ("prompts that were measured and are too weak", _WITH_ROWS),
        {"change": "behaviour", "examples": 300},
    ),
    Rule(
        "few examples",
        "few-shot",
        lambda known: known.few_rows,
        f"Fewer than {ENOUGH_ROWS:,} examples: a model tuned on them overfits and loses general knowledge. Put the "
        "best ones, or those nearest to the question, into the prompt.",
        (DONT,),
        (
            f"{_WITH_ROWS}",
            "more examples in the prompt than its context holds",
            "few-shot measured and too weak: a small run on some hundred rows can then be tried, and must be proven",
        ),
        {"change": "style", "examples": 300, "tried": "prompting"},
    ),
    Rule(
        "prompting not tried",
        "prompt",
        lambda known: not known.prompting_tried,
        "Prompts have not been tried: clear instructions, then examples, then reasoning step by step, then a chain of "
        "prompts. Tuning is measured against the best of them, or nobody knows what it brought.",
        (DONT, LADDER),
        ("a prompt that was measured and misses the target: then tuning",),
        {"change": "format", "examples": 10_000, "metric": "exact_match"},
    ),
    Rule(
        "no measure of success",
        "do_not",
        lambda known: not known.measured,
        "Nobody has said how success is measured: without a metric and held-out rows a tuned model cannot be told from "
        "a worse one.",
        (DONT,),
        ("a metric: accuracy on a test set, people's preference, or a figure of the business",),
        {"change": "format", "examples": 10_000, "tried": "prompting"},
    ),
    Rule(
        "the words of a field",
        "fine_tune",
        lambda known: known.language,
        "The terms of the field are taught by examples that use them: there is too little raw text for pretraining.",
        (RAG_TABLE, WHEN),
        (f"at least {ENOUGH_TEXT:,} tokens of text: then continued pretraining first",),
        {**_READY, "change": "domain-language", "tokens": "1M"},
    ),
    Rule(
        "labels or extraction",
        "fine_tune",
        lambda known: known.task in ("classify", "tag", "regress"),
        "The answers are labels, words that are marked, or numbers: a model with a head for them is trained, small and "
        "fast.",
        (RAG_TABLE, CHAPTER),
        ("labels that change every week: then examples in the prompt", "answers in free text"),
        {**_READY, "change": "format", "task": "classify"},
    ),
    Rule(
        "style or format",
        "fine_tune",
        lambda known: bool({"style", "format"} & set(known.answers.change)),
        "Style and syntax are what weights learn well and cheaply, and keep to more steadily than any prompt.",
        (DECISION_MATRIX, RAG_TABLE, WHEN),
        ("a prompt that reaches the target", "answers that must hold facts: those are retrieved"),
        {**_READY, "change": "format"},
    ),
    Rule(
        "behaviour",
        "fine_tune",
        _form_alone,
        "A behaviour that prompts do not bring about is taught by examples of it.",
        (DECISION_TREE, WHEN),
        ("a prompt that reaches the target", "answers that must hold facts: those are retrieved"),
        {**_READY, "change": "behaviour"},
    ),
)


def deciding_rule(known: Situation) -> Rule:
    """The first row that holds."""
    return next(rule for rule in RULES if rule.holds(known))
