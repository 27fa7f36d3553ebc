"""What the model says of preferences before anything of it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Batch
from tunesmith.models.attention import use_default_attention
from tunesmith.objectives import Preference
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.preference import REFERENCE
from tunesmith.pipeline.by_target import Reading, kept_by_target, weights_sha256
from tunesmith.pipeline.planning import Planned
from tunesmith.plan.hardware import DTYPES
from tunesmith.train.near_base import BASE_LOGPS, base_is_kept, said_by_base
from tunesmith.train.precision import Precision

Says = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""What a model makes of the targets of a batch: named tensors with one entry a target."""


def with_reference(planned: Planned, model: nn.Module, progress: Progress) -> Planned:
    """Rows that carry what the model says of them before anything of it is trained, where the objective asks for it.

    It is computed once and kept on disk, so that no second model is needed, whatever is trained.
    """
    objective = planned.objective
    if isinstance(objective, Preference) and objective.uses_reference:
        return _with_said(planned, model, ("train", "validation"), _logps_of_targets, progress)
    if base_is_kept(planned.recipe):
        return _with_said(planned, model, ("train",), said_by_base, progress)
    return planned


def _logps_of_targets(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    return {REFERENCE: token_logps(model, batch).logps}


def _with_said(planned: Planned, model: nn.Module, parts: tuple[str, ...], says: Says, progress: Progress) -> Planned:
    prepared, plan, method = planned.prepared, planned.plan, planned.recipe.method
    if prepared is None:
        return planned
    casts = method.needs_autocast or plan.dtype != plan.frozen_dtype
    precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)

    def read(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with precision.arithmetic():
            return says(model, batch)

    assert planned.renderer is not None
    made_from = {
        "weights": weights_sha256(model, cast(Any, model).config),
        "text": planned.renderer.identity(),
        "packed": plan.packing,
        "dtypes": [plan.dtype, plan.frozen_dtype, casts],
    }
    name = REFERENCE if says is _logps_of_targets else BASE_LOGPS
    reading = Reading(lambda: model, read, lambda _: plan.packing, "reading rows with the model as it is", progress)
    found = {
        part: kept_by_target({name: made_from}, rows, reading) if len(rows := getattr(prepared, part)) else rows
        for part in parts
    }
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **found))
