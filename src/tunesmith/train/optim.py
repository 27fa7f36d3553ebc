"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tunesmith.base import InputError
from tunesmith.methods import trainable_parameters
from tunesmith.models.quantized import import_bitsandbytes
from tunesmith.models.sharding import full, is_part, parted_like
from tunesmith.recipe import Schedule, TrainSpec
from tunesmith.resolved import Plan
from tunesmith.train.small_adamw import SmallAdamW

WSD_DECAY_SHARE = 0.2


def build_optimizer(
    model: nn.Module,
    spec: TrainSpec,
    learning_rate: float,
    rates: Mapping[str, float] | None = None,
    *,
    small: bool = False,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters; vectors are not decayed.

    Args:
        rates: factors on the learning rate by the names of parameters, from the method; `spec.groups` multiply them.
        small: spare the memory that torch's own class takes by being used.

    Raises:
        InputError: when an 8-bit variant is asked for and bitsandbytes is missing, paged states on a CPU, or a group
            matches nothing.
    """
    named = trainable_parameters(model)
    parameters = list(named.values())
    groups = _groups(named, spec, rates or {})
    if small:
        return SmallAdamW(groups, lr=learning_rate)
    sharded = any(map(is_part, parameters))
    if spec.optimizer == "adamw":
        fused = not sharded and all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
        # Parts and whole weights cannot be updated in one call.
        return AdamW(groups, lr=learning_rate, fused=fused, foreach=False if sharded else None)
    if sharded:
        raise InputError(
            "8-bit states cannot be spread over processes",
            where="train.optimizer",
            fix="use adamw, or leave train.shard out",
        )
    paged = spec.optimizer == "paged-adamw-8bit"
    if paged and any(parameter.device.type == "cpu" for parameter in parameters):
        raise InputError(
            "paged optimizer states need a GPU whose memory they can leave",
            where="train.optimizer",
            fix="use adamw-8bit",
        )
    library = import_bitsandbytes(spec.optimizer, "train.optimizer", "optim")
    return (library.PagedAdamW8bit if paged else library.AdamW8bit)(groups, lr=learning_rate)


def _groups(named: Mapping[str, nn.Parameter], spec: TrainSpec, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters that share a factor on the learning rate, a schedule and a weight decay, matrices first.

    ``places`` counts a group's parameters without regard to groups, so that saved states find theirs in other groups.
    """
    unused = {group.match for group in spec.groups}
    found: dict[tuple[bool, float, float, Schedule | None], tuple[list[nn.Parameter], list[int]]] = {}
    for place, (name, parameter) in enumerate(sorted(named.items(), key=lambda entry: entry[1].dim() < 2)):
        own = next((group for group in spec.groups if re.search(group.match, name)), None)
        decay = spec.weight_decay if parameter.dim() >= 2 else 0.0
        factor, schedule = rates.get(name, 1.0), None
        if own is not None:
            unused.discard(own.match)
            factor, schedule = factor * own.rate, own.schedule
            decay = decay if own.weight_decay is None else own.weight_decay
        members, places = found.setdefault((parameter.dim() < 2, factor, decay, schedule), ([], []))
        members.append(parameter)
        places.append(place)
    if unused:
        raise InputError(
            f"the group {sorted(unused)[0]!r} matches no trained weight, or none that an earlier group left",
            where="train.groups",
            fix=f"trained are, for example, {', '.join(list(named)[:3])}",
        )
    ordered = sorted(found.items(), key=lambda entry: entry[0][0])
    return [
        {"params": members, "weight_decay": decay, "factor": factor, "schedule": schedule, "places": places}
        for (_, factor, decay, schedule), (members, places) in ordered
    ]


def learning_rate_at(step: int, spec: TrainSpec, plan: Plan, schedule: Schedule | None = None) -> float:
    """The rate of optimizer step ``step``, counted from 1, by the recipe's schedule or another one."""
    schedule = schedule or spec.schedule
    peak, total, warmup = plan.learning_rate, plan.steps, plan.warmup_steps
    if step <= warmup:
        return peak * step / (warmup + 1)
    progress = (step - warmup - 1) / max(1, total - warmup)  # 0 at the first step after warmup, below 1 at the last
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        return peak * min(1.0, (1 - progress) / WSD_DECAY_SHARE)
    return peak


def set_learning_rate(optimizer: Optimizer, rate: float, own: Mapping[Schedule, float] | None = None) -> None:
    """Every group learns at ``rate``, or at the rate that ``own`` gives for its schedule, times its own factor."""
    for group in optimizer.param_groups:
        schedule = group.get("schedule")
        group["lr"] = (own[schedule] if own and schedule else rate) * group.get("factor", 1.0)


def own_rates_at(step: int, spec: TrainSpec, plan: Plan) -> dict[Schedule, float]:
    """The rates of optimizer step ``step`` by the schedules that groups have for themselves."""
    own: list[Schedule] = [group.schedule for group in spec.groups if group.schedule is not None]
    return {schedule: learning_rate_at(step, spec, plan, schedule) for schedule in own}


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state as named tensors and plain numbers, for files without pickle.

    Names are paths: the parameter's index, the state's name, and one more step where a state is a group of its own,
    as bitsandbytes has them. Where weights are spread over processes, all of them must ask.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(f"{path}/{name}", inner)
        elif isinstance(value, torch.Tensor):
            found = full(value.detach()).cpu().contiguous()
            tensors[path] = found if isinstance(optimizer, SmallAdamW) else found.clone()
        else:
            numbers[path] = value

    places = _places(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        collect(str(places[index]), state)
    return tensors, numbers


def _places(optimizer: Optimizer) -> list[int]:
    """The number under which the state of each parameter is saved, in the optimizer's own order."""
    named = [place for group in optimizer.param_groups for place in group.get("places", ())]
    return named or list(range(sum(len(group["params"]) for group in optimizer.param_groups)))


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave, also where parameters stand in other groups now."""
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {place: index for index, place in enumerate(_places(optimizer))}
    for path, value in [*tensors.items(), *numbers.items()]:
        number, *groups, name = path.split("/")
        index = own[int(number)]
        if isinstance(value, torch.Tensor):
            value = parted_like(value, parameters[index])
        place = state.setdefault(index, {})
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
