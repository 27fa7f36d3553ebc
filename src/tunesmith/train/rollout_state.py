"""Examples as named tensors and back, for checkpoints and for other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor

from tunesmith.batch import Example, Scope
from tunesmith.objectives.policy import Rollout
from tunesmith.train.parallel import gathered_tensors, world_size

_TENSOR, _OF_ROLLOUT = "tensor:", "rollout:"
OF_ANSWERS, OF_TOKENS = ("rewards", "lengths"), ("logps", "reference", "values")
"""Tensors of a rollout, by what they have one entry for."""


def stored_examples(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Examples end to end, with how much of each tensor belongs to which; they carry the same named tensors."""
    if not examples:
        return {}
    found = {
        "token_ids": torch.cat([example.token_ids for example in examples]),
        "lengths": torch.tensor([len(example) for example in examples]),
        "segments": torch.cat([example.own_segments() for example in examples]),
        "segment_counts": torch.tensor([len(example.own_segments()) for example in examples]),
    }
    for name, scope in examples[0].scopes.items():
        parts = [example.tensors[name] for example in examples]
        found[f"{_TENSOR}{scope}:{name}"] = torch.cat(parts)
        found[f"counts:{name}"] = torch.tensor([len(part) for part in parts])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def examples_of(stored: dict[str, Tensor]) -> list[Example]:
    """What `stored_examples` stored; their sources are not kept."""
    if "token_ids" not in stored:
        return []
    ids = stored["token_ids"].split(stored["lengths"].tolist())
    segments = stored["segments"].split(stored["segment_counts"].tolist())
    named: dict[str, tuple[Tensor, ...]] = {}
    scopes: dict[str, Scope] = {}
    for key, tensor in stored.items():
        if key.startswith(_TENSOR):
            scope, name = key.removeprefix(_TENSOR).split(":", 1)
            scopes[name] = cast(Scope, scope)
            named[name] = tensor.split(stored[f"counts:{name}"].tolist())
    return [
        Example(own, {name: parts[at] for name, parts in named.items()}, scopes, None, segments[at])
        for at, own in enumerate(ids)
    ]


def of_all_processes(
    examples: Sequence[Example], rollout: Rollout, device: torch.device
) -> tuple[Sequence[Example], Rollout]:
    """The answers to the prompts of all processes, which take them in turn, in the order of the prompts."""
    if world_size() == 1:
        return examples, rollout
    named = {name: getattr(rollout, name) for name in (*OF_ANSWERS, *OF_TOKENS)}
    told = {f"{_OF_ROLLOUT}{name}": tensor for name, tensor in named.items() if tensor is not None}
    parts = gathered_tensors({**stored_examples(examples), **told}, device)
    turns = zip_longest(*(_by_prompt(part, rollout.group) for part in parts))
    every = [one for turn in turns for one in turn if one is not None]
    joined = {name: torch.cat([tensors[name] for _, tensors in every]) for name in named if named[name] is not None}
    return [example for example, _ in every], replace(rollout, **joined)


def _by_prompt(part: dict[str, Tensor], group: int) -> list[tuple[Example, dict[str, Tensor]]]:
    """What one process told: each prompt with its answers, and what is known of those."""
    examples = examples_of(part)
    targets = [example.targets for example in examples]
    told = {
        name: part[f"{_OF_ROLLOUT}{name}"].split(group if name in OF_ANSWERS else targets)
        for name in (*OF_ANSWERS, *OF_TOKENS)
        if f"{_OF_ROLLOUT}{name}" in part
    }
    return [(example, {name: parts[at] for name, parts in told.items()}) for at, example in enumerate(examples)]
