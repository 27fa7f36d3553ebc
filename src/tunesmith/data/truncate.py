"""Rows that are cut to a length without losing the question, or the end of an answer that fits."""

from __future__ import annotations

from dataclasses import replace

import torch

from tunesmith.batch import Example, answers_behind
from tunesmith.data.render import Rendered


def truncated(item: Rendered, limit: int) -> Rendered | None:
    """Cuts the end of the answer; None when no target would be left.

    A question is never cut, nor the end-of-turn from an answer that fits whole: a conversation is shortened to the
    last of its answers that can be kept.

    Args:
        limit: the most tokens that may be left.
    """
    if item.closing is not None:
        return _shortened(item, limit, item.closing)
    if item.is_pair:
        return _shorter_pair(item, limit)
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


def _shorter_pair(item: Rendered, limit: int) -> Rendered | None:
    """A pair whose answers are each cut to what the prompt leaves; None when nothing is left, or no difference."""
    example, prompt = item.example, len(item.prompt_ids)
    assert example.segments is not None
    places = torch.arange(len(example))
    kept = torch.cat([places[start : start + min(length, limit - prompt)] for start, length, _ in _answers(example)])
    if limit <= prompt:
        return None
    other = prompt + min(int(example.segments[1, 1]), limit - prompt)
    kept = torch.cat([places[:prompt], kept])
    ids, weights = example.token_ids[kept], example.tensors["target_weights"][kept]
    if ids[prompt:other].tolist() == ids[other:].tolist() or not (weights[prompt:other] > 0).any():
        return None
    if not (weights[other:] > 0).any():
        return None
    cut = torch.ones(len(example), dtype=torch.bool).index_fill_(0, kept, False)
    return replace(
        item,
        example=replace(
            example,
            token_ids=ids,
            tensors={"target_weights": weights},
            segments=answers_behind(prompt, other, len(ids)),
        ),
        cut_ids=tuple(example.token_ids[cut].tolist()),
        cut_targets=int((example.tensors["target_weights"][cut] > 0).sum()),
    )


def _answers(example: Example) -> list[list[int]]:
    assert example.segments is not None
    return example.segments[1:].tolist()


def _shortened(item: Rendered, limit: int, closing: int) -> Rendered | None:
    """A row to be judged without the end of its text; the tokens that close it stay."""
    example, kept = item.example, limit - closing
    if kept < 1:
        return None
    ids, weights = example.token_ids, example.tensors["target_weights"]
    tail = slice(len(ids) - closing, len(ids))
    shorter = torch.cat([weights[:kept], weights[tail]])
    if item.row.messages:  # its one output is read at the end
        shorter[-1] = weights[-1]
    if not (shorter > 0).any():
        return None
    return replace(
        item,
        example=replace(example, token_ids=torch.cat([ids[:kept], ids[tail]]), tensors={"target_weights": shorter}),
        cut_ids=tuple(ids[kept : tail.start].tolist()),
        cut_targets=int((weights > 0).sum() - (shorter > 0).sum()),
    )
