"""Log-probabilities of chosen tokens straight from hidden states: logits exist for a few rows at a time only."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.attention import as_transformers_runs_it
from tunesmith.models.projection import compute_dtype, project, rounded_up

LOGITS_AT_ONCE = 2**24
"""Logits that exist at a time, in the dtype of the arithmetic."""

WIDE_AT_ONCE = 2**20
"""Logits that are looked at in fp32 at a time: 4 MB, which stay in a processor's cache from one pass to the next."""


def target_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden weight^T) at ``targets``, fp32 ``[n]`` in nats.

    The gradient of a frozen head is computed in the forward pass, while the logits are there: it is
    ``weight[target] - softmax @ weight``, and all that is kept is of the size of ``hidden``. A trained head needs its
    incoming gradient first, and computes the logits once more.

    Args:
        hidden: ``[n, width]``; weight: ``[vocabulary, width]``; targets: int64 ``[n]``.
    """
    dtype = compute_dtype(weight)
    filler = rounded_up(len(targets)) - len(targets) if dtype != torch.float32 and weight.device.type == "cpu" else 0
    filled = F.pad(hidden, (0, 0, 0, filler)), weight, F.pad(targets, (0, filler)), dtype
    return cast(Tensor, _TargetLogps.apply(*filled))[: len(targets)]


def head_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """``[n, vocabulary]`` from the last hidden states, which some models keep in a wider dtype than their head."""
    head = cast(Any, model).get_output_embeddings()
    return project(hidden.to(head.weight.dtype), (head,))[0]


def _chunks(rows: int, vocabulary: int, at_once: int) -> list[slice]:
    size = max(1, at_once // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _log_shares(logits: Tensor, targets: Tensor, *, slopes: bool) -> Tensor:
    """Log-probabilities of the targets, fp32.

    If ``slopes`` are wanted, ``logits`` become the gradient of the negative log-probabilities by themselves: shares,
    less one at the target. The one is taken off in fp32: next to it a share of a sure token would be rounded away.
    """
    logps = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for part in _chunks(logits.shape[0], logits.shape[1], WIDE_AT_ONCE):
        wide, chosen = logits[part].float(), targets[part, None]
        top, own = wide.amax(dim=-1, keepdim=True), wide.gather(1, chosen)
        total = wide.sub_(top).exp_().sum(dim=-1, keepdim=True)
        logps[part] = (own - top - total.log()).squeeze(1)
        if slopes:
            wide.div_(total).scatter_add_(1, chosen, torch.full_like(own, -1.0))
            logits[part] = wide
    return logps


def largest_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of ``[n, vocabulary]`` the largest, and the sum of exp(logit - largest): fp32 ``[n]`` each."""
    top, total = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    for part in _chunks(logits.shape[0], logits.shape[1], WIDE_AT_ONCE):
        wide = logits[part].float()
        top[part] = wide.amax(dim=-1)
        total[part] = (wide - top[part, None]).exp_().sum(dim=-1)  # of fp32 logits `wide` is a view
    return top, total


class _TargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        x, head = hidden.to(dtype), weight.to(dtype)
        ahead = ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]
        logps = torch.empty(len(x), dtype=torch.float32, device=x.device)
        slopes = torch.empty_like(x) if ahead else None
        for chunk in _chunks(len(x), len(head), LOGITS_AT_ONCE):
            logits = F.linear(x[chunk], head)
            logps[chunk] = _log_shares(logits, targets[chunk], slopes=ahead)
            if slopes is not None:
                torch.mm(logits, head, out=slopes[chunk])
        ctx.save_for_backward(slopes, None if ahead else hidden, None if ahead else weight, targets)
        ctx.dtype, ctx.input_dtype = dtype, hidden.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = grad_outputs
        slopes, hidden, weight, targets = ctx.saved_tensors
        if slopes is not None:
            return (slopes * -gradient[:, None]).to(ctx.input_dtype), None, None, None
        x, head = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        d_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight)
        for chunk in _chunks(len(x), len(head), LOGITS_AT_ONCE):
            slope = F.linear(x[chunk], head)
            _log_shares(slope, targets[chunk], slopes=True)
            slope.mul_(-gradient[chunk, None])
            if d_hidden is not None:
                torch.mm(slope, head, out=d_hidden[chunk])
            d_weight += slope.t() @ x[chunk]
        return None if d_hidden is None else d_hidden.to(ctx.input_dtype), d_weight, None, None


_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(model: nn.Module) -> bool:
    """Whether a model's logits are what its output layer makes of its last hidden states, and nothing more.

    Some architectures scale or cap them. Looked at once for a model, on a few tokens.
    """
    if model not in _PLAIN:
        _PLAIN[model] = _head_is_plain(cast(Any, model))
    return _PLAIN[model]


def _head_is_plain(model: Any) -> bool:
    head, backbone = model.get_output_embeddings(), getattr(model, "base_model", model)
    if head is None or backbone is model:
        return False
    token_ids = torch.arange(1, 6, device=next(model.parameters()).device)[None]
    with as_transformers_runs_it(model), torch.no_grad():
        expected = model(input_ids=token_ids, use_cache=False).logits
        hidden = getattr(backbone(input_ids=token_ids, use_cache=False), "last_hidden_state", None)
        # The same product of the same numbers: a cap or a scale, however gentle, changes some bit.
        return hidden is not None and torch.equal(head(hidden.to(head.weight.dtype)), expected)


def divergences(hidden: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """KL(softmax(other weight^T) || softmax(hidden weight^T)), fp32 ``[n]`` in nats, with a gradient by ``hidden``.

    The gradient is ``(softmax(hidden weight^T) - softmax(other weight^T)) @ weight``; it is computed in the forward
    pass, while the logits are there, as in `target_logps`.

    Args:
        hidden, other: ``[n, width]``; weight: ``[vocabulary, width]``, not trained.
    """
    dtype = compute_dtype(weight)
    filler = rounded_up(len(hidden)) - len(hidden) if dtype != torch.float32 and weight.device.type == "cpu" else 0
    filled = F.pad(hidden, (0, 0, 0, filler)), F.pad(other.detach(), (0, 0, 0, filler)), weight.detach(), dtype
    return cast(Tensor, _Divergences.apply(*filled))[: len(hidden)]


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, other: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x, y, head = hidden.to(dtype), other.to(dtype), weight.to(dtype)
        found = torch.empty(len(x), dtype=torch.float32, device=x.device)
        slopes = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(len(x), len(head), LOGITS_AT_ONCE // 4):
            own = F.log_softmax(F.linear(x[chunk], head).float(), dim=-1)
            wanted = F.log_softmax(F.linear(y[chunk], head).float(), dim=-1)
            shares = wanted.exp()
            found[chunk] = (shares * wanted.sub_(own)).sum(dim=-1)
            if slopes is not None:
                torch.mm(own.exp_().sub_(shares).to(dtype), head, out=slopes[chunk])
        ctx.save_for_backward(slopes)
        ctx.input_dtype = hidden.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = grad_outputs
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient[:, None]).to(ctx.input_dtype), None, None, None
