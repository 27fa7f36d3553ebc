"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tunesmith.base import InputError
from tunesmith.methods import trainable_parameters
from tunesmith.recipe import Plan, TrainSpec

WSD_DECAY_SHARE = 0.2


def build_optimizer(model: nn.Module, spec: TrainSpec, learning_rate: float) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters; vectors are not decayed.

    Raises:
        InputError: when the 8-bit variant is asked for and bitsandbytes is missing.
    """
    parameters = list(trainable_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if spec.optimizer == "adamw":
        fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
        return AdamW(groups, lr=learning_rate, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "adamw-8bit needs bitsandbytes", where="train.optimizer", fix="pip install 'tunesmith[eight-bit]'"
        ) from error
    optimizer: Any = AdamW8bit(groups, lr=learning_rate)
    return optimizer


def learning_rate_at(step: int, spec: TrainSpec, plan: Plan) -> float:
    """The rate of optimizer step ``step``, counted from 1."""
    peak, total, warmup = plan.learning_rate, plan.steps, plan.warmup_steps
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - warmup - 1) / max(1, total - warmup)  # 0 at the first step after warmup, below 1 at the last
    if spec.schedule == "linear":
        return peak * (1 - progress)
    if spec.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if spec.schedule == "wsd":
        return peak * min(1.0, (1 - progress) / WSD_DECAY_SHARE)
    return peak


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as named tensors and plain numbers, for files without pickle.

    Names are paths: the parameter's index, the state's name, and one more step where a state is a group of its own,
    as bitsandbytes has them.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(f"{path}/{name}", inner)
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        else:
            numbers[path] = value

    for index, state in optimizer.state_dict()["state"].items():
        collect(str(index), state)
    return tensors, numbers


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Any]] = {}
    for path, value in [*tensors.items(), *numbers.items()]:
        index, *groups, name = path.split("/")
        place = state.setdefault(int(index), {})
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
