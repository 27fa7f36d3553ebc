"""Rows that cannot be used as they are: each is found, counted with its targets, and dropped, cut or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.base import InputError
from tunesmith.data.formats import BadRow
from tunesmith.data.read import RowErrors
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.rows import Row
from tunesmith.data.spec import DataSpec

CUT = "cut at the end of the answer"
"""Such a row is used; only its cut targets are lost."""


@dataclass(frozen=True)
class Lost:
    """Training rows that are not used, by reason."""

    reason: str
    rows: int
    target_tokens: int
    example: str


class Losses:
    """Counts rows that are not used; their targets are counted by rendering them."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.found: dict[str, list[tuple[Row, int]]] = {}

    def add(self, reason: str, row: Row, targets: int | None = None) -> None:
        self.found.setdefault(reason, []).append((row, self._targets(row) if targets is None else targets))

    def _targets(self, row: Row) -> int:
        try:
            return self.renderer.render(row).example.targets
        except BadRow:
            return 0

    def summary(self) -> list[Lost]:
        return [
            Lost(reason, 0 if reason == CUT else len(rows), sum(n for _, n in rows), str(rows[0][0].source))
            for reason, rows in self.found.items()
        ]


def without_duplicates(rows: Sequence[Row], spec: DataSpec, lost: Losses) -> list[Row]:
    if spec.duplicates == "keep":
        return list(rows)
    first: dict[str, Row] = {}
    errors = RowErrors()
    for row in rows:
        earlier = first.setdefault(row.key, row)
        if earlier is not row:
            errors.add(row.source, f"the same row as {earlier.source}")
            lost.add("duplicate", row)
    if spec.duplicates == "error":
        errors.raise_any("remove them, or set data.duplicates: drop or keep")
    return list(first.values())


def without_overlap(rows: Sequence[Row], held: Sequence[Row], spec: DataSpec, lost: Losses) -> list[Row]:
    if spec.overlap == "keep" or not held:
        return list(rows)
    prompts = {row.prompt_key: row for row in held}
    errors, kept = RowErrors(), []
    for row in rows:
        twin = prompts.get(row.prompt_key)
        if twin is None:
            kept.append(row)
        else:
            errors.add(row.source, f"the same prompt as {twin.source}, which is held out")
            lost.add("stands in the held-out rows", row)
    if spec.overlap == "error":
        errors.raise_any("remove them from training, or set data.overlap: drop or keep")
    if not kept:
        raise InputError(
            "every training row also stands in the held-out rows",
            where="data.overlap",
            fix="use other rows for validation and test; data.overlap: keep trains on them all the same",
        )
    return kept


def without_empty(rows: Sequence[Row], spec: DataSpec) -> tuple[list[Row], list[Row]]:
    """The rows that say something, and those that do not."""
    errors, kept, empty = RowErrors(), [], []
    for row in rows:
        what = _emptiness(row)
        if what is None:
            kept.append(row)
        else:
            errors.add(row.source, what)
            empty.append(row)
    if spec.empty == "error":
        errors.raise_any("fill them in, or leave them out with data.empty: drop")
    return kept, empty


def _emptiness(row: Row) -> str | None:
    if not row.messages:
        return None if row.text.strip() else "the text is empty"
    answers = [m["content"] for m in row.messages if m["role"] == "assistant" and not m.get("tool_calls")]
    if not all(text.strip() for text in answers):
        return "the answer is empty"
    asked = [m["content"] for m in row.messages[:-1] if m["role"] == "user"]
    return None if all(text.strip() for text in asked) else "the prompt is empty"


def within_length(rendered: Sequence[Rendered], limit: int, own: bool, spec: DataSpec, lost: Losses) -> list[Rendered]:
    """The rows of at most ``limit`` tokens.

    Args:
        own: whether the limit is the model's own, which no setting can raise.
    """
    errors, kept = RowErrors(), []
    for item in rendered:
        length = len(item.example)
        if length <= limit:
            kept.append(item)
        elif spec.overlong == "truncate" and (shorter := truncated(item, limit)) is not None:
            kept.append(shorter)
            if shorter.cut_targets:
                lost.add(CUT, item.row, shorter.cut_targets)
        else:
            errors.add(item.row.source, f"{length} tokens, {length - limit} over the limit of {limit}")
            reason = "overlong" if spec.overlong == "drop" else "no answer left within max_length"
            lost.add(reason, item.row, item.example.targets)
    if spec.overlong == "error":
        raised = "the model has no more positions: " if own else "raise data.max_length, or "
        errors.raise_any(raised + "set data.overlong: drop or truncate")
    return kept


def truncated(item: Rendered, limit: int) -> Rendered | None:
    """Cuts the end of the answer; None when no target would be left.

    A question is never cut, nor the end-of-turn from an answer that fits whole: a conversation is shortened to the
    last of its answers that can be kept.
    """
    example = item.example
    weights = example.tensors["target_weights"]
    targets = (weights > 0).tolist()
    cut = limit
    if item.row.messages:
        if limit <= len(item.prompt_ids) and all(targets[1 : len(item.prompt_ids)]):
            return None
        if cut < len(targets) and targets[cut] and not any(targets[cut + 1 : cut + 2]):
            while cut > 0 and targets[cut - 1]:
                cut -= 1
        while cut > 0 and not targets[cut - 1]:
            cut -= 1
    if not any(targets[:cut]):
        return None
    return replace(
        item,
        example=replace(example, token_ids=example.token_ids[:cut], tensors={"target_weights": weights[:cut]}),
        cut_ids=tuple(example.token_ids[cut:].tolist()),
        cut_targets=sum(targets[cut:]),
    )


def with_targets(rendered: Sequence[Rendered], lost: Losses) -> list[Rendered]:
    """Leaves out rows in which nothing is trained on, because every answer of theirs has the weight 0."""
    for item in rendered:
        if not item.example.targets:
            lost.add("no answer with a weight", item.row, 0)
    kept = [item for item in rendered if item.example.targets]
    if not kept:
        raise InputError(
            "nothing would be trained on: no row has a target token",
            where="data.train",
            fix="give at least one answer the weight 1",
        )
    return kept
