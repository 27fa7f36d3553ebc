"""Rounding of weights to the values that a 4-bit format can hold, exactly as its writer rounds them.

`q4_0` and `q4_1` are llama.cpp's blocks of 32 with a scale, or a scale and a least value, in fp16; `nf4` is
bitsandbytes' blocks of 64 with a scale in fp32 (Dettmers et al. 2023, section 3, without double quantization).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GridName = Literal["q4_0", "q4_1", "nf4"]
BLOCK = {"q4_0": 32, "q4_1": 32, "nf4": 64}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution, scaled to one (Dettmers et al. 2023, appendix E)."""


@dataclass(frozen=True)
class Grid:
    """The values that a 4-bit format can hold."""

    name: GridName

    def takes(self, inputs: int) -> bool:
        """Whether rows of this many weights can be stored: llama.cpp's blocks do not reach over the end of a row."""
        return self.name == "nf4" or inputs % BLOCK[self.name] == 0

    def rounded(self, weight: Tensor) -> Tensor:
        """What the format gives back for ``weight`` ``[out, in]``, fp32; no gradient passes."""
        with torch.no_grad():
            wide = weight.detach().float().contiguous()
            if self.name == "nf4":
                return _nf4(wide.view(-1)).view(weight.shape)
            blocks = wide.view(-1, BLOCK[self.name])
            return (_q4_0 if self.name == "q4_0" else _q4_1)(blocks).view(weight.shape)

    def distance(self, weight: Tensor) -> float:
        """How far ``weight`` lies off the grid: the length of what rounding changes over that of the weight."""
        wide = weight.detach().float()
        return float((self.rounded(weight) - wide).norm() / wide.norm().clamp_min(1e-30))


def _q4_0(blocks: Tensor) -> Tensor:
    """``[blocks, 32]``: the value of the largest absolute size becomes -8 scales (ggml, `quantize_row_q4_0_ref`)."""
    scale = _largest(blocks) / -8  # exact
    levels = (blocks * _inverse(scale)).add_(8.5).trunc_().clamp_(0, 15)
    return levels.sub_(8).mul_(scale.half().float())


def _q4_1(blocks: Tensor) -> Tensor:
    """``[blocks, 32]``: fifteen steps from the least value to the largest (ggml, `quantize_row_q4_1_ref`)."""
    least, most = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)  # `aminmax` is four times slower
    # By a tensor: some devices multiply by the inverse of a plain number, which rounds otherwise.
    scale = (most - least) / torch.full((), 15.0, device=blocks.device)
    levels = (blocks - least).mul_(_inverse(scale)).add_(0.5).trunc_().clamp_(0, 15)
    return levels.mul_(scale.half().float()).add_(least.half().float())


def _largest(blocks: Tensor) -> Tensor:
    """The value of the largest absolute size in each block, the first of several, ``[blocks, 1]``."""
    least, most = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    largest = torch.where(most > -least, most, least)
    if bool((even := (most == -least)[:, 0]).any()):  # of either sign: the first decides
        largest[even] = blocks[even].gather(1, blocks[even].abs().argmax(1, keepdim=True))
    return largest


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _nf4(flat: Tensor) -> Tensor:
    """``[weights]``: each block of 64 over its largest absolute value, to the nearest of sixteen quantiles."""
    code = torch.tensor(NF4, device=flat.device)
    short = -len(flat) % BLOCK["nf4"]
    blocks = F.pad(flat, (0, short)).view(-1, BLOCK["nf4"])
    largest = blocks.abs().amax(1, keepdim=True)
    scaled = blocks * (1.0 / largest.clamp_min(1e-38))
    levels = torch.zeros(scaled.shape, dtype=torch.uint8, device=flat.device)
    for bound in (code[1:] + code[:-1]) / 2:  # a binary search for each weight is several times slower
        levels += scaled > bound
    return code[levels.int()].mul_(largest).view(-1)[: len(flat)]
