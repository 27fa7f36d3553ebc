"""Conversations and what is read back from a rendered one, for the tests of the renderer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from chat_templates import Family
from tunesmith.base import Source
from tunesmith.data.render import Rendered, Renderer, TrainOn
from tunesmith.data.rows import Row
from tunesmith.models.templates import resolve_template

TURNS = ["What is the capital?", "Paris is the answer.", "Hello there", "I am fine, thanks."]


def conversation(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, *({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))]


def row(messages: list[dict[str, Any]], **more: Any) -> Row:
    return Row(Source("rows.jsonl", 1), tuple(messages), references=(messages[-1]["content"],), **more)


def renderer(
    of: PreTrainedTokenizerFast, train_on: TrainOn = "answers", template: str = "auto", stops: set[int] | None = None
) -> Renderer:
    return Renderer(resolve_template(template, of), of, train_on, stops or {of.eos_token_id})


def decoded(of: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return of.decode(ids, clean_up_tokenization_spaces=False)


def trained(of: PreTrainedTokenizerFast, item: Rendered) -> list[str]:
    """The runs of tokens that are targets, as text."""
    runs: list[list[int]] = [[]]
    for token, weight in zip(
        item.example.token_ids.tolist(), item.example.tensors["target_weights"].tolist(), strict=True
    ):
        if weight > 0:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [decoded(of, run) for run in runs if run]


def spelled(family: Family, answer: str) -> str:
    """An answer as it is trained on; a blank that opens a text is not decoded by sentencepiece."""
    lead = family.lead.lstrip(" ") if family.kind != "bytes" else family.lead
    return lead + answer + family.ending
