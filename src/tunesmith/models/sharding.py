"""Weights spread over the processes of a job: the one place that knows that a parameter may be a part of itself.

Each block of the model is gathered when it is about to run and let go of afterwards, and its gradients are added up
where its parts live (Rajbhandari et al. 2020, ZeRO-3; Zhao et al. 2023), through torch's `fully_shard`.
Embeddings, the last norm and the head stay whole on every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.models.decoder import forget_decoder


def shard(model: nn.Module) -> None:
    """Spreads the weights of all blocks over the processes that have joined.

    Gradients are sums over processes, as `sum_gradients` makes them elsewhere.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        unit: Any = fully_shard(block, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    forget_decoder(model)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model, which its configuration counts.

    Raises:
        ValueError: when it has none.
    """
    count = int(cast(Any, model).config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError("the model has no list of blocks")


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a larger one."""
    return hasattr(tensor, "placements")


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory; all of it where it is not spread."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process has all weights inside, and may run the model alone. All of them must enter."""
    units = _units(model)
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True)


def made_whole(model: nn.Module) -> None:
    """Gives every process all weights for good."""
    for unit in _units(model):
        unit.set_reshard_after_forward(False)
        unit.unshard()


def _units(model: nn.Module) -> list[Any]:
    if not dist.is_initialized():
        return []  # without an import that takes 35 MB
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which must all ask for it."""
    return cast(Any, tensor).full_tensor() if is_part(tensor) else tensor


def parted_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """This process's part of a whole tensor that every process has, parted as ``pattern`` is."""
    if not is_part(pattern) or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    parted: Any = pattern
    return distribute_tensor(tensor.to(pattern.device), parted.device_mesh, parted.placements)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, those of parts counted over all processes; fp32."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [own_part(grad) for grad in grads if is_part(grad)]
    wholes = [grad for grad in grads if not is_part(grad)]
    device = grads[0].device if grads else torch.device("cpu")
    squares = torch.zeros((), device=device)
    for part in parts:
        squares += part.float().square().sum()
    dist.all_reduce(squares)
    for grad in wholes:
        squares += grad.float().square().sum()
    return squares.sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            own_part(parameter.grad).mul_(factor)
