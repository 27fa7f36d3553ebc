"""What a frozen trunk makes of every row, computed once and kept on disk: later epochs cost only the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.base import InputError, Progress
from tunesmith.batch import Batch
from tunesmith.data.cache import cached
from tunesmith.data.stored import RenderedRows
from tunesmith.models.attention import use_default_attention
from tunesmith.models.forward import hidden_at
from tunesmith.models.head import has_plain_head
from tunesmith.objectives.task import FEATURES
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.target_tensors import TargetTensors, identity_of_rows, read_target_tensors, weights_sha256


def with_features(planned: Planned, model: nn.Module, progress: Progress) -> Planned:
    """Rows that carry what the head reads, where the method leaves the trunk as it is.

    Raises:
        InputError: when the head of a model that writes does more than one product, or the disk is full.
    """
    prepared = planned.prepared
    if not planned.recipe.method.trunk_is_frozen or prepared is None:
        return planned
    if planned.judges is None and not has_plain_head(model):
        raise InputError(
            f"the output layer of a {type(model).__name__} does more than one product",
            where="method.kind",
            fix="use full or lora",
        )
    read = _reader(planned)
    trunk, parts = weights_sha256(cast(Any, model).base_model, cast(Any, model).config), {}
    for name in ("train", "validation", "test"):
        rows: RenderedRows = getattr(prepared, name)
        if not len(rows) or (name == "test" and planned.judges is None):
            continue  # text is written token by token, through the trunk
        made_from = {
            "trunk": trunk,
            **identity_of_rows(rows),
            "read": _said(planned),
        }
        directory = cached({FEATURES: made_from}, TargetTensors(model, rows, read, planned.plan.packing, progress))
        parts[name] = rows.adding(read_target_tensors(directory, FEATURES))
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **parts))


def _said(planned: Planned) -> dict[str, Any]:
    """What of a row the head reads, as JSON values."""
    assert planned.renderer is not None
    head = None if planned.judges is None else planned.judges.task_head()
    where = None if head is None else [head.kind, head.pooling, head.layer]
    return {"where": where, "packed": planned.plan.packing, "text": planned.renderer.identity()}


def _reader(planned: Planned) -> Callable[[nn.Module, Batch], Tensor]:
    objective = planned.judges
    if objective is not None:
        return objective.features

    def before_targets(model: nn.Module, batch: Batch) -> Tensor:
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        return hidden_at(model, batch, chosen - 1)

    return before_targets
