"""Embeddings and output head that stay in a file: rows are read where tokens ask for them, the head slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.projection import compute_dtype
from tunesmith.models.weight_files import WeightFiles

ROWS_AT_ONCE = 2048
"""Rows of the vocabulary that are in memory at a time."""
AT_ONCE = 256
"""Targets whose logits by a slice of the head are in memory at a time."""


def nothing_of(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A frozen weight of any shape made of one NaN: what is used before it was read must not go unseen."""
    return nn.Parameter(torch.full((), float("nan"), dtype=dtype).expand(*shape), requires_grad=False)


def unread_linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """A linear layer whose weight takes no memory and is not there yet."""
    module = nn.Linear(1, out_features, bias=bias)
    module.in_features, module.weight = in_features, nothing_of((out_features, in_features))
    return module


class FileEmbedding(nn.Embedding):
    """A frozen table of which only the rows of a batch's tokens are read."""

    files: WeightFiles
    name: str

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(1, 1)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nothing_of((num_embeddings, embedding_dim))

    def forward(self, input: Tensor) -> Tensor:
        numbers, place = torch.unique(input, return_inverse=True)
        return self.files.rows(self.name, numbers.tolist(), self.weight.dtype)[place]

    def slices(self) -> Iterator[Tensor]:
        """The whole table, some rows at a time: each ``[rows, width]``, valid until the next is asked for."""
        return _slices(self.files, self.name, self.weight)


class FileHead(nn.Linear):
    """A frozen output head without bias."""

    files: WeightFiles
    name: str

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nothing_of((out_features, in_features))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([F.linear(input, part) for part in self.slices()], dim=-1)

    def slices(self) -> Iterator[Tensor]:
        """As `FileEmbedding.slices`."""
        return _slices(self.files, self.name, self.weight)

    def target_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log softmax(hidden weight^T) at ``targets``, fp32 ``[n]`` in nats; arguments as `models.head.target_logps`.

        The head is read once for the sums that the softmax divides by and, when a gradient is wanted, once more for
        ``weight[target] - softmax @ weight``, which is all that is kept.
        """
        dtype = compute_dtype(self.weight)
        filler = 0 if dtype == torch.float32 else -len(targets) % AT_ONCE
        filled = F.pad(hidden, (0, 0, 0, filler)), F.pad(targets, (0, filler)), self, dtype
        return cast(Tensor, _SlicedLogps.apply(*filled))[: len(targets)]


def _slices(files: WeightFiles, name: str, weight: Tensor) -> Iterator[Tensor]:
    memory = torch.empty(min(ROWS_AT_ONCE, len(weight)), weight.shape[1], dtype=weight.dtype)
    for start in range(0, len(weight), len(memory)):
        part = memory[: len(weight) - start]
        files.read(name, part, start)
        yield part


def _pieces(rows: int) -> list[slice]:
    return [slice(start, min(start + AT_ONCE, rows)) for start in range(0, rows, AT_ONCE)]


class _SlicedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: FileHead, dtype: torch.dtype) -> Tensor:
        x = hidden.to(dtype)
        top = torch.full((len(x),), float("-inf"))
        total, own = torch.zeros(len(x)), torch.zeros(len(x))
        start = 0
        for part in head.slices():
            for piece in _pieces(len(x)):
                wide = F.linear(x[piece], part.to(dtype)).float()
                higher = torch.maximum(top[piece], wide.amax(dim=-1))
                sums = wide.sub(higher[:, None]).exp_().sum(dim=-1)
                total[piece] = total[piece] * (top[piece] - higher).exp() + sums
                top[piece] = higher
                place = targets[piece] - start
                here = (place >= 0) & (place < len(part))
                chosen = wide.gather(1, place.clamp(0, len(part) - 1)[:, None]).squeeze(1)
                own[piece] = torch.where(here, chosen, own[piece])
            start += len(part)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_slopes(x, targets, head, top, total))
        ctx.input_dtype = hidden.dtype
        return own - top - total.log()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = grad_outputs
        (slopes,) = ctx.saved_tensors
        return (slopes * -gradient[:, None]).to(ctx.input_dtype), None, None, None


def _slopes(x: Tensor, targets: Tensor, head: FileHead, top: Tensor, total: Tensor) -> Tensor:
    """The gradient of the negative log-probabilities by ``x``, ``[n, width]`` in its dtype; sums are fp32."""
    sums = torch.zeros(x.shape, dtype=torch.float32)
    start = 0
    for part in head.slices():
        narrow = part.to(x.dtype)
        for piece in _pieces(len(x)):
            shares = F.linear(x[piece], narrow).float().sub_(top[piece, None]).exp_().div_(total[piece, None])
            place = targets[piece] - start
            here = (place >= 0) & (place < len(part))
            less = torch.where(here, -1.0, 0.0)[:, None]
            shares.scatter_add_(1, place.clamp(0, len(part) - 1)[:, None], less)
            sums[piece] += shares.to(x.dtype) @ narrow
        start += len(part)
    return sums.to(x.dtype)
