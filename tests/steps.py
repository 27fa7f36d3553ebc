"""Gradients of one step, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from tunesmith.batch import Batch, Example, pack
from tunesmith.methods import trainable_parameters
from tunesmith.objectives import StepObjective
from tunesmith.train.loop import StepResult, step


def split(rows: Sequence[Example], parts: Sequence[Sequence[int]], layout: Any) -> list[Batch]:
    return [pack([rows[at] for at in part], layout) for part in parts]


def gradients(
    model: nn.Module, objective: StepObjective, batches: Sequence[Batch], **options: Any
) -> tuple[dict[str, Tensor], StepResult]:
    """Of a step that moves nothing."""
    optimizer = SGD(trainable_parameters(model).values(), lr=0.0)
    result = step(model, objective, optimizer, batches, **{"clip": None, **options})
    found = {}
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found, result


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert largest > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance * largest, msg=name)
