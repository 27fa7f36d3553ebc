"""Linear layers that read the same input, as one function with a gradient written by hand.

A layer is `x W^T + b`, with a low-rank update `scale (x A^T) B^T` beside it where a method has put one (LoRA, Hu et al.
2021, equation 3). Autograd would run a dozen nodes for it, cast every weight once more, and keep several copies of the
activations; here x is kept once for all layers that read it, frozen weights get no gradient, and the products with A
are one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.models.quantization_grid import Grid
from tunesmith.models.quantized import PackedWeight, packed_weight


@dataclass(frozen=True)
class LowRank:
    """An update ``scale (x down^T) up^T``: down ``[rank, in]``, up ``[out, rank]``, both trained.

    Attributes:
        grid: where weight and update are added and rounded to it before the product. The gradient passes through the
            rounding as if it were not there (straight-through estimator, Bengio et al. 2013), so that those of down
            and up are what they are without it.
    """

    down: Tensor
    up: Tensor
    scale: float
    grid: Grid | None = None


@dataclass(frozen=True)
class Projection:
    """A linear layer taken apart: weight ``[out, in]``, bias ``[out]``, and the update beside it.

    A weight that is stored in 4 bits is made in the dtype of the arithmetic for every product, and dropped after it.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None
    update: LowRank | None = None


class Updated(Protocol):
    """A module that is a frozen layer with a low-rank update."""

    base: nn.Module

    def low_rank(self) -> LowRank | None:
        """The update; None while it is more than that, for example under dropout."""
        ...


def projection_of(module: nn.Module) -> Projection | None:
    """A module taken apart; None when it is not a plain linear layer, with or without an update."""
    update = None
    if hasattr(type(module), "low_rank"):
        updated = cast(Updated, module)
        update = updated.low_rank()
        if update is None or _hooked(module):
            return None
        module = updated.base
    if _hooked(module):
        return None
    if type(module) is Conv1D:  # GPT-2's linear layer, whose weight lies the other way round
        return Projection(module.weight.t(), module.bias, update)
    if type(module) is nn.Linear:
        return Projection(module.weight, module.bias, update)
    packed = packed_weight(module)
    return None if packed is None else Projection(packed, cast("Tensor | None", module.bias), update)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


Run = Callable[[Tensor], list[Tensor]]
"""What each of some layers makes of the same input ``[tokens, in]``."""


def project(hidden: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """What each of ``modules`` makes of the same ``hidden`` ``[tokens, in]``, in its dtype.

    Under autocast the products run in the dtype of autocast, which is then the dtype of the result.
    """
    projections = [projection_of(module) for module in modules]
    if any(projection is None for projection in projections):
        return [module(hidden) for module in modules]
    return project_by(hidden, cast(list[Projection], projections))


def project_by(hidden: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """`project` for layers that are taken apart already."""
    dtype = compute_dtype(hidden)
    if not torch.is_grad_enabled():
        return _outputs(hidden.to(dtype), _Layers.of(projections, dtype))[0]
    tensors = [tensor for projection in projections for tensor in _tensors(projection)]
    return list(cast(tuple[Tensor, ...], _Projections.apply(hidden, _rules(projections), dtype, *tensors)))


def kept_projection(modules: Sequence[nn.Module], dtype: torch.dtype) -> Run:
    """`project` of modules whose weights do not change while it is in use: taken apart and cast once, no gradients."""
    projections = [projection_of(module) for module in modules]
    if any(projection is None for projection in projections):
        return lambda hidden: [module(hidden) for module in modules]
    found = cast(list[Projection], projections)
    if any(isinstance(projection.weight, PackedWeight) for projection in found):
        # Kept, they would take the memory that storing them in 4 bits saves.
        return lambda hidden: _outputs(hidden, _Layers.of(found, dtype))[0]
    layers = _Layers.of(found, dtype)
    return lambda hidden: _outputs(hidden, layers)[0]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def rounded_up(rows: int) -> int:
    """The next of the numbers of rows of a product that are sixteen from each power of two to the next."""
    step = max(1, 2 ** (rows.bit_length() - 5)) if rows > 0 else 1
    return -(-rows // step) * step


def few_sizes(rows: int) -> int:
    """As `rounded_up`, and a multiple of four besides, for passes whose number of tokens changes each time.

    One token stays alone: it is read by the shortest way.
    """
    return 1 if rows == 1 else -(-rounded_up(rows) // 4) * 4


FEW = 24
"""Tokens up to which a product in bf16 on a CPU is faster with the weight as its first factor (it is
bound by reading the weight)."""

_PARTS = 4


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``, ``[tokens, out]``; for a few tokens perhaps a transposed view."""
    if x.shape[0] > FEW or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    output = torch.mv(weight, x[0])[None] if x.shape[0] == 1 else torch.mm(weight, x.t()).t()
    return output if bias is None else output + bias


class _Layers(NamedTuple):
    """Layers that read the same input, cast for the products.

    Attributes:
        weights, biases: of each layer.
        down: of all updates, ``[all ranks, in]``.
        ups: of each layer ``[out, rank]``, or None.
        rules: of each layer's update.
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    down: Tensor | None
    ups: list[Tensor | None]
    rules: Sequence[_Rule]

    @classmethod
    def of(cls, projections: Sequence[Projection], dtype: torch.dtype) -> _Layers:
        tensors = [tensor for projection in projections for tensor in _tensors(projection)]
        return cls.cast(tensors, _rules(projections), dtype)

    @classmethod
    def cast(cls, tensors: Sequence[Any], rules: Sequence[_Rule], dtype: torch.dtype) -> _Layers:
        """From weight, bias, down and up of each layer."""
        weights = [_factor(layer, rule, dtype) for layer, rule in zip(_layers(tensors), rules, strict=True)]
        biases, downs, ups = (
            [
                tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)
                for tensor in tensors[kind::_PARTS]
            ]
            for kind in range(1, _PARTS)
        )
        there = [down for down in downs if down is not None]
        down = torch.cat(there) if len(there) > 1 else there[0] if there else None
        return cls(weights, biases, down, ups, rules)


class _Rule(NamedTuple):
    """How an update takes part: beside the product, or in its weight and rounded with it."""

    scale: float = 0.0
    grid: Grid | None = None


def _rule(projection: Projection) -> _Rule:
    return _Rule(projection.update.scale, projection.update.grid) if projection.update else _Rule()


def _rules(projections: Sequence[Projection]) -> tuple[_Rule, ...]:
    return tuple(map(_rule, projections))


def _factor(layer: Sequence[Any], rule: _Rule, dtype: torch.dtype) -> Tensor:
    """What the input is multiplied by: the weight, or weight and update as they are merged and then rounded."""
    weight, _, down, up = layer
    if rule.grid is not None:
        merged = (up @ down).mul_(rule.scale).add_(weight).to(weight.dtype)  # to the bit what merging writes
        return rule.grid.rounded(merged).to(dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)


def _layers(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """Weight, bias, down and up of each layer."""
    return [tensors[at : at + _PARTS] for at in range(0, len(tensors), _PARTS)]


def _outputs(x: Tensor, layers: _Layers) -> tuple[list[Tensor], Tensor | None]:
    """What each layer makes of ``x``, and the inputs of all updates, ``[tokens, all ranks]``."""
    low = None if layers.down is None else F.linear(x, layers.down)
    outputs, at = [], 0
    for weight, bias, up, rule in zip(layers.weights, layers.biases, layers.ups, layers.rules, strict=True):
        output = _product(x, weight, bias)
        if up is not None and low is not None:
            if rule.grid is None and rule.scale:  # a factor of nought takes the library's slowest way
                output.addmm_(low[:, at : at + up.shape[1]], up.t(), alpha=rule.scale)
            at += up.shape[1]
        outputs.append(output)
    return outputs, low


def _tensors(projection: Projection) -> tuple[Tensor | PackedWeight | None, ...]:
    update = projection.update
    pair = (update.down, update.up) if update else (None, None)
    return projection.weight, projection.bias, *pair


def _keep(ctx: Any, *values: Any) -> None:
    """Keeps tensors for the backward pass the way autograd watches over them, and what is none beside them."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in values)


def _kept(ctx: Any) -> list[Any]:
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rules: tuple[_Rule, ...], dtype: torch.dtype, *tensors: Any) -> Any:
        x = hidden.to(dtype)
        outputs, low = _outputs(x, _Layers.cast(tensors, rules, dtype))
        ctx.rules, ctx.dtype, ctx.input_dtype = rules, dtype, hidden.dtype
        wants_input = any(ctx.needs_input_grad[3:])
        _keep(ctx, x if wants_input else None, low if wants_input else None, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, low, *tensors = _kept(ctx)
        known = _Known(ctx.dtype, ctx.rules, low, ctx.needs_input_grad[0], ctx.needs_input_grad[3:])
        d_hidden, found = _gradients(known, x, _layers(tensors), grad_outputs)
        return None if d_hidden is None else d_hidden.to(ctx.input_dtype), None, None, *found


def project_gated(gate: Tensor, up: Tensor, gating: Gating, module: nn.Module) -> Tensor:
    """What ``module`` makes of ``gating.forward(gate, up)``, which is computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return project(gating.forward(gate, up), (module,))[0]
    projection = projection_of(module)
    if projection is None:
        return project(cast(Tensor, _Gated.apply(gate, up, gating)), (module,))[0]
    return cast(Tensor, _GatedProjection.apply(gate, up, gating, _rule(projection), *_tensors(projection)))


class Gating(NamedTuple):
    """A gate: ``(gate, up)`` to the product, and ``(gradient, gate, up)`` to the gradients of both and the product."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gating: Gating) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gating = gating
        return gating.forward(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return *ctx.gating.backward(grad_outputs[0], *ctx.saved_tensors), None


class _GatedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gating: Gating, rule: _Rule, *tensors: Any) -> Tensor:
        (output,), low = _outputs(gating.forward(gate, up), _Layers.cast(tensors, (rule,), gate.dtype))
        ctx.gating, ctx.rule = gating, rule
        _keep(ctx, gate, up, low, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        gate, up, low, *tensors = _kept(ctx)
        x = ctx.gating.forward(gate, up) if any(ctx.needs_input_grad[4:]) else None
        wanted = any(ctx.needs_input_grad[:2])
        known = _Known(gate.dtype, (ctx.rule,), low, wanted, ctx.needs_input_grad[4:])
        d_gated, found = _gradients(known, x, _layers(tensors), grad_outputs)
        del x
        slopes = (None, None) if d_gated is None else ctx.gating.backward(d_gated, gate, up)
        return *slopes, None, None, *found


class _Known(NamedTuple):
    """What the backward pass of projections knows: their inputs' update parts, and which gradients are needed."""

    dtype: torch.dtype
    rules: tuple[_Rule, ...]
    low: Tensor | None
    wants_input: bool
    needed: Sequence[bool]


def _gradients(
    known: _Known, x: Any, layers: Sequence[Sequence[Any]], slopes: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of the common input, and those of every layer's weight, bias, down and up."""
    dtype, rules, low, wants_input, needed = known
    d_hidden: Tensor | None = None
    found: list[Tensor | None] = []
    d_lows: list[Tensor] = []
    at = 0
    for index, (layer, rule, slope) in enumerate(zip(layers, rules, slopes, strict=True)):
        weight, bias, down, up = layer
        d_weight, d_bias, d_up = None, None, None
        first = index * _PARTS
        if wants_input:
            frozen = _factor(layer, rule, dtype)
            d_hidden = slope @ frozen if d_hidden is None else d_hidden.addmm_(slope, frozen)
        if needed[first]:
            d_weight = _in_dtype_of(weight, slope.t() @ x)
        if bias is not None and needed[first + 1]:
            d_bias = slope.sum(0, dtype=bias.dtype)
        if down is not None and low is not None:
            part = low[:, at : at + len(down)]
            d_up = _in_dtype_of(up, (part.t() @ slope).t(), rule.scale) if needed[first + 3] else None
            d_lows.append((slope @ up.to(dtype)).mul_(rule.scale))  # [tokens, rank]
            at += len(down)
        found += [d_weight, d_bias, None, d_up]
    if d_lows:
        d_low = torch.cat(d_lows, dim=1) if len(d_lows) > 1 else d_lows[0]
        downs = [down for _, _, down, _ in layers if down is not None]
        if wants_input and all(rule.grid is None for rule in rules):
            whole = torch.cat([down.to(dtype) for down in downs])
            d_hidden = d_low @ whole if d_hidden is None else d_hidden.addmm_(d_low, whole)
        d_downs = iter((d_low.t() @ x).split([len(down) for down in downs]))
        for index, (_, _, down, _) in enumerate(layers):
            if down is not None:
                d_down = next(d_downs)
                found[index * _PARTS + 2] = _in_dtype_of(down, d_down) if needed[index * _PARTS + 2] else None
    return d_hidden, found


def _in_dtype_of(parameter: Tensor, gradient: Tensor, scale: float = 1.0) -> Tensor:
    gradient = gradient.to(parameter.dtype)
    return gradient if scale == 1.0 else gradient.mul_(scale)
