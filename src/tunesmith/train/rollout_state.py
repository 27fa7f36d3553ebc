"""Examples as named tensors and back, for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tunesmith.batch import Example, Scope

_TENSOR = "tensor:"


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
