"""What the model says of preferences before anything of it is trained."""

from __future__ import annotations

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
from tunesmith.train.precision import Precision


def with_reference(planned: Planned, model: nn.Module, progress: Progress) -> Planned:
    """Rows that carry what the model says of them before anything of it is trained, where the objective asks for it.

    It is computed once and kept on disk, so that no second model is needed, whatever is trained.
    """
    prepared, objective = planned.prepared, planned.objective
    if prepared is None or not isinstance(objective, Preference) or not objective.uses_reference:
        return planned
    plan, method = planned.plan, planned.recipe.method
    casts = method.needs_autocast or plan.dtype != plan.frozen_dtype
    precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)

    def read(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with precision.arithmetic():
            return {REFERENCE: token_logps(model, batch).logps}

    assert planned.renderer is not None
    made_from = {
        "weights": weights_sha256(model, cast(Any, model).config),
        "text": planned.renderer.identity(),
        "packed": plan.packing,
        "dtypes": [plan.dtype, plan.frozen_dtype, casts],
    }
    reading = Reading(lambda: model, read, lambda _: plan.packing, "reading rows with the model as it is", progress)
    parts = {name: getattr(prepared, name) for name in ("train", "validation")}
    parts = {
        name: kept_by_target({REFERENCE: made_from}, rows, reading) if len(rows) else rows
        for name, rows in parts.items()
    }
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **parts))
