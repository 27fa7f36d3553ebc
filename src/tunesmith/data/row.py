"""The row: a conversation with its reference answers, a preference pair, labelled words, or raw text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from tunesmith.base import Source

SAID = "as said"
"""Stands for the only reference of most rows: what the last turn says."""

SAME_ANSWERS = "both answers are the same, or were rated the same"
"""What is wrong with a pair that teaches nothing."""

KEY_BYTES = 16
"""128 bits: among 10^9 rows the chance of any collision is below 10^-20."""


@dataclass(frozen=True)
class Row:
    """One training or test row.

    Attributes:
        messages: the conversation as `{role, content, …}`, ending with an assistant turn; empty for raw text and
            labelled words. Of a preference pair the chosen one.
        text: raw text, when there is no conversation.
        references: every acceptable last answer; the first one is trained on.
        task: name of the task in a mixture.
        tools: definitions of the tools that the conversation may call.
        rejected: of a preference pair the whole conversation that ends with the worse answer.
        desirable: whether the last answer is a good one, where that is known of it alone; None where it is not.
        words: the words that `labels` are about.
        labels: one of each word.
        group: rows of the same group never stand on two sides of a split.
        stratum: a split keeps the shares of the strata.
    """

    source: Source
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    references: tuple[str, ...] = ()
    task: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()
    desirable: bool | None = None
    words: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    group: str | None = None
    stratum: str | None = None

    @property
    def prompt_key(self) -> str:
        """128-bit hash (hex) of everything before the last answer or the labels, with case and white space folded."""
        parts = self._said(self.messages[:-1])
        return _hashed([" ".join(part.casefold().split()) for part in parts])

    @property
    def key(self) -> str:
        """128-bit hash (hex) of all that a model would see of the row, as it is, for exact duplicates."""
        parts = self._said(self.messages)
        if self.rejected:
            parts += ["rejected", *_turns(self.rejected)]
        if self.desirable is not None:
            parts += ["desirable", str(self.desirable)]
        if self.labels:
            parts += ["labels", *self.labels]
        return _hashed(parts)

    def _said(self, messages: Sequence[dict[str, Any]]) -> list[str]:
        if self.words:
            return ["words", *self.words]
        if not self.messages:
            return [self.text]
        tools = [json.dumps(tool, sort_keys=True, default=str) for tool in self.tools]
        return tools + _turns(messages)

    def to_json(self) -> str:
        """The row in one line, from which `from_json` makes the same row again.

        Values that JSON does not have, such as dates from a Parquet file beside a turn's content, become texts.
        """
        stored = {name: value for name, default in _STORED.items() if (value := getattr(self, name)) != default}
        if self.messages and self.references == (self.messages[-1]["content"],):
            stored["references"] = SAID  # or the answer would stand there twice
        place = [self.source.file, self.source.line]
        return json.dumps({"source": place, **stored}, ensure_ascii=False, separators=(",", ":"), default=str)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row that `to_json` wrote."""
        stored: dict[str, Any] = json.loads(line)
        file, number = stored.pop("source")
        if stored.get("references") == SAID:
            stored["references"] = [stored["messages"][-1]["content"]]
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(Source(file, number), **values)


_STORED = {item.name: item.default for item in fields(Row) if item.name != "source"}
"""What is written of a row when it is not the default."""


def _turns(messages: Sequence[dict[str, Any]]) -> list[str]:
    """Role, content and whatever else a turn holds."""
    parts = []
    for message in messages:
        rest = {name: value for name, value in message.items() if name not in ("role", "content")}
        more = json.dumps(rest, sort_keys=True, default=str) if rest else ""
        parts += [message["role"], message["content"], more]
    return parts


def _hashed(parts: Sequence[str]) -> str:
    return blake2b("\0".join(parts).encode(), digest_size=KEY_BYTES).hexdigest()
