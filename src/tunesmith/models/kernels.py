"""The element-wise parts of a decoder block and their gradients, as plain functions of tensors.

Written with the operations that torch has in one pass for narrow dtypes: a chain of fp32 steps would pass over wide
copies of the same memory again and again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, offset: float, eps: float, dtype: torch.dtype) -> Tensor:
    """Root mean square normalization (Zhang & Sennrich 2019, equation 4).

    Args:
        x: ``[…, width]``; weight: ``[width]``, to which ``offset`` is added (1 in Gemma).

    Returns:
        ``[…, width]`` in ``dtype``.
    """
    scale = (weight + offset if offset else weight).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], scale, eps).to(dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """What `rms_norm` multiplies with, fp32 ``[…, 1]``."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(length * length / x.shape[-1] + eps)


def rms_norm_backward(
    gradient: Tensor, beside: Tensor | None, x: Tensor, inverse: Tensor, weight: Tensor, offset: float
) -> Tensor:
    """The gradient of ``x``: through the norm, and ``beside``, which comes along the residual stream."""
    scale = weight.float() + offset
    if x.dtype == torch.float32 or x.device.type != "cpu":
        unit = x.float() * inverse
        scaled = gradient.float() * scale
        found = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * inverse
        return (found if beside is None else found + beside.float()).to(x.dtype)
    # LayerNorm's gradient at mean zero, less what LayerNorm takes off for the mean: one fused pass in torch.
    shape, mean = x.shape[-1:], torch.zeros_like(inverse)
    gradient = gradient.to(x.dtype)
    centred, *_ = torch.ops.aten.native_layer_norm_backward(
        gradient, x, shape, mean, inverse, scale, scale, [True, False, False]
    )
    taken_off = (gradient @ scale.to(x.dtype))[..., None] * (inverse / x.shape[-1])
    found = centred.add_(taken_off.to(x.dtype))
    return found if beside is None else found.add_(beside)


def rms_norm_weight_backward(gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of the weight, fp32 ``[width]``."""
    return (gradient.float() * x.float() * inverse).sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, equation 6)."""
    return F.silu(gate) * up


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_up = F.silu(gate).mul_(gradient)
    return torch.ops.aten.silu_backward(gradient * up, gate), d_up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the approximation by tanh, as in Gemma."""
    return (_gelu_tanh(gate.float())[0] * up.float()).to(gate.dtype)


def geglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    slope = gradient.float()
    value, derivative = _gelu_tanh(gate.float())
    return (slope * up.float() * derivative).to(gate.dtype), (slope * value).to(up.dtype)


_ROOT, _CUBE = 0.7978845608028654, 0.044715


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative (Hendrycks & Gimpel 2016, section 2)."""
    inner = torch.tanh(_ROOT * (x + _CUBE * x * x * x))
    derivative = 0.5 * (1 + inner) + 0.5 * x * (1 - inner * inner) * _ROOT * (1 + 3 * _CUBE * x * x)
    return 0.5 * x * (1 + inner), derivative


def signed(sin: Tensor) -> Tensor:
    """The sines of rotary positions with the sign that each half of a head needs, for `rotate`."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, equation 34), halves beside each other.

    Args:
        x: ``[tokens, heads, head_dim]``; cos, signed_sin: ``[tokens, 1, head_dim]``. With ``-signed_sin`` it is its
            own inverse, and its own gradient.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
