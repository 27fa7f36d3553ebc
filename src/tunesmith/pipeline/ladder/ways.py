"""Ways to ask a model for the answer of a row: what it reads, and where the answer stands in what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.row import Row
from tunesmith.pipeline.retrieving import asked, behind_passages
from tunesmith.recipe_ladder import LadderSpec, filled
from tunesmith.retrieve import Passage

Turns = list[dict[str, Any]]
OPENING = ("system", "developer")


@dataclass(frozen=True)
class Stage:
    """One prompt.

    Attributes:
        ask: makes the conversation of a row, given what the model said to the prompt before.
        max_new_tokens: of the answer.
    """

    ask: Callable[[Row, str], Turns]
    max_new_tokens: int


def as_it_is(said: str) -> str | None:
    return said


@dataclass(frozen=True)
class Way:
    """How a row is asked.

    Attributes:
        stages: prompts one after the other; what the last one brings is read.
        read: the answer in it; None where there is none.
        searches: of a corpus, for each row.
    """

    stages: tuple[Stage, ...]
    read: Callable[[str], str | None] = as_it_is
    searches: int = 0


def plain(limit: int, instruction: str | None = None) -> Way:
    """The row's own prompt."""
    return Way((Stage(lambda row, _: _asking(row, instruction, asked(row)), limit),))


def with_examples(examples: Callable[[Row], Sequence[Row]], limit: int, instruction: str | None = None) -> Way:
    """Examples as turns before the question, behind the system turn, each asked as the question is."""

    def ask(row: Row, _: str) -> Turns:
        turns = _asking(row, instruction, asked(row))
        before = [turn for turn in turns if turn["role"] in OPENING]
        shown: Turns = []
        for example in examples(row):
            shown += [turn for turn in _asking(example, instruction, asked(example)) if turn["role"] not in OPENING]
            shown.append({"role": "assistant", "content": example.references[0]})
        return [*before, *shown, *turns[len(before) :]]

    return Way((Stage(ask, limit),))


def thinking(spec: LadderSpec, limit: int) -> Way:
    """The question with the request to think aloud (Kojima et al. 2022), and the answer behind the last marker."""

    def ask(row: Row, _: str) -> Turns:
        return _asking(row, spec.instruction, f"{asked(row)}\n\n{spec.thought}")

    def read(said: str) -> str | None:
        _, marker, answer = said.rpartition(spec.marker)
        return answer.strip() or None if marker else None

    return Way((Stage(ask, spec.thought_tokens + limit),), read)


def chained(spec: LadderSpec, limit: int) -> Way:
    """The user's prompts one after the other, each by itself."""

    def stage(template: str, most: int) -> Stage:
        def ask(row: Row, previous: str) -> Turns:
            return _asking(row, None, filled(template, input=asked(row), previous=previous.strip()))

        return Stage(ask, most)

    limits = [spec.chain_tokens] * (len(spec.chain) - 1) + [limit]
    return Way(tuple(stage(*each) for each in zip(spec.chain, limits, strict=True)))


def with_passages(
    find: Callable[[str], Sequence[Passage]], spec: LadderSpec, limit: int, instruction: str | None = None
) -> Way:
    """The question behind passages that were found for it (Lewis et al. 2020; read in the prompt: Ram et al. 2023)."""

    def ask(row: Row, _: str) -> Turns:
        question = asked(row)
        return _asking(row, instruction, behind_passages(question, find(question), spec.passages_prompt))

    return Way((Stage(ask, limit),), searches=1)


def _asking(row: Row, instruction: str | None, question: str) -> Turns:
    """The row's conversation before its answer, with another question in the last turn."""
    text = f"{instruction}\n\n{question}" if instruction else question
    return [*row.messages[:-2], {**row.messages[-2], "content": text}]
