"""Noise on the embeddings of training rows (NEFTune, Jain et al. 2024), which any split of a step leaves the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch

NOISE = "noise"
"""Tensor of a batch: fp64 ``[segments, 2]``, what the noise of each row is drawn from (a whole number below 2^53), and
alpha, the scale of it, on the CPU. A batch without it gets no noise."""


def noise_of_rows(batch: Batch, seed: int, alpha: float) -> Tensor:
    """`NOISE` of a batch for one step.

    Args:
        seed: of the step; with a row's tokens it decides what noise the row gets, wherever it lies.
    """
    ids = batch.token_ids.cpu().numpy()
    rows = [
        int.from_bytes(
            blake2b(ids[start : start + length].tobytes(), key=seed.to_bytes(8, "little"), digest_size=8).digest()[:6],
            "little",
        )
        for start, length, _ in batch.segments.tolist()
    ]
    return torch.tensor([[float(row), alpha] for row in rows], dtype=torch.float64)


@contextmanager
def noisy_embeddings(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Adds a batch's noise to what the embedding layer returns inside, in the packed layout and in the padded one.

    Args:
        batch: as the model runs it: with what a method puts before every row, and filled up.
    """
    given = batch.tensors.get(NOISE)
    if given is None:
        yield
        return

    def add(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        width = output.shape[-1]
        found = torch.zeros(output.shape, dtype=torch.float32)
        flat = batch.layout == "packed" or len(output) != len(batch.segments)
        for at, ((start, length, _), (row, alpha)) in enumerate(
            zip(batch.segments.tolist(), given.tolist(), strict=True)
        ):
            place = found.view(-1, width)[start : start + length] if flat else found[at, :length]
            bound = alpha / (length * width) ** 0.5
            place.uniform_(-bound, bound, generator=torch.Generator().manual_seed(int(row)))
        return output + found.to(output)

    handle = cast(Any, model).get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
