"""What the model says of preferences before anything of it is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Batch
from tunesmith.data.cache import cached
from tunesmith.data.stored import RenderedRows
from tunesmith.models.attention import use_default_attention
from tunesmith.objectives import Preference
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.preference import REFERENCE
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.target_tensors import TargetTensors, identity_of_rows, read_target_tensors, weights_sha256
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

    def read(model: nn.Module, batch: Batch) -> Tensor:
        with precision.arithmetic():
            return token_logps(model, batch).logps

    weights, parts = weights_sha256(model, cast(Any, model).config), dict[str, RenderedRows]()
    assert planned.renderer is not None
    for name in ("train", "validation"):
        rows: RenderedRows = getattr(prepared, name)
        if not len(rows):
            continue
        made_from = {
            "weights": weights,
            **identity_of_rows(rows),
            "text": planned.renderer.identity(),
            "packed": plan.packing,
            "dtypes": [plan.dtype, plan.frozen_dtype, casts],
        }
        directory = cached({REFERENCE: made_from}, TargetTensors(model, rows, read, plan.packing, progress))
        parts[name] = rows.adding(read_target_tensors(directory, REFERENCE))
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **parts))
