"""What a frozen trunk makes of every row, computed once and kept on disk: later epochs cost only the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.base import InputError, Progress
from tunesmith.batch import Batch
from tunesmith.data.stored import RenderedRows
from tunesmith.models.attention import use_default_attention
from tunesmith.models.forward import hidden_at
from tunesmith.models.head import has_plain_head
from tunesmith.objectives.task import FEATURES
from tunesmith.pipeline.by_target import Reading, kept_by_target, weights_sha256
from tunesmith.pipeline.planning import Planned


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
    reading = Reading(
        lambda: model, _reader(planned), lambda _: planned.plan.packing, "reading rows with the frozen model", progress
    )
    made_from, parts = (
        {"trunk": weights_sha256(cast(Any, model).base_model, cast(Any, model).config), "read": _said(planned)},
        {},
    )
    for name in ("train", "validation", "test"):
        rows: RenderedRows = getattr(prepared, name)
        if not len(rows) or (name == "test" and planned.judges is None):
            continue  # text is written token by token, through the trunk
        only = _visited(planned) if name == "train" else None
        parts[name] = kept_by_target({FEATURES: made_from}, rows, replace(reading, only=only))
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **parts))


def _visited(planned: Planned) -> list[int] | None:
    """Training rows that the steps of the plan come to; None for all, which a solver reads at once."""
    assert planned.prepared is not None
    visits = planned.plan.steps * planned.recipe.train.batch_size
    if planned.judges is not None or visits >= planned.prepared.order.epoch_rows:
        return None
    return sorted(set(planned.prepared.order.rows(0, visits)))


def _said(planned: Planned) -> dict[str, Any]:
    """What of a row the head reads, as JSON values."""
    assert planned.renderer is not None
    head = None if planned.judges is None else planned.judges.task_head()
    where = None if head is None else [head.kind, head.pooling, head.layer]
    return {"where": where, "packed": planned.plan.packing, "text": planned.renderer.identity()}


def _reader(planned: Planned) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    objective = planned.judges
    if objective is not None:
        return lambda model, batch: {FEATURES: objective.features(model, batch)}

    def before_targets(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        return {FEATURES: hidden_at(model, batch, chosen - 1)}

    return before_targets
