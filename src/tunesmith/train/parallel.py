"""Several processes as one: sums over ranks, so that the number of processes cannot change a gradient."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from tunesmith.models.sharding import gradient_norm, is_part, scale_gradients


def join_processes(device: torch.device) -> bool:
    """Joins the other processes when started by torchrun and not joined yet; does nothing otherwise.

    Returns:
        Whether it was this call, so that who has joined leaves: a process that joined again while another one had not
        left yet would wait for it for ever.
    """
    asked = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if asked:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # One process evaluates while the others wait for it, which may take longer than the default of 30 minutes.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return asked


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def summed(values: Tensor) -> Tensor:
    """The sum of a small tensor over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor, device: torch.device) -> list[Tensor]:
    """A tensor of every process, all of one shape, by rank, on the CPU."""
    if not dist.is_initialized():
        return [values]
    mine = values.to(device) if dist.get_backend() == "nccl" else values
    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    return [one.cpu() for one in everybody]


def gathered_tensors(named: dict[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """Named tensors of every process, of any names and shapes, by rank, on the CPU."""
    if not dist.is_initialized():
        return [named]
    own = torch.frombuffer(bytearray(save(named)), dtype=torch.uint8)
    sizes = [int(size) for size in gathered(torch.tensor([len(own)]), device)]
    padded = torch.cat([own, own.new_zeros(max(sizes) - len(own))])
    everybody = gathered(padded, device)
    return [load(part[:size].numpy().tobytes()) for part, size in zip(everybody, sizes, strict=True)]


def from_main(value: float, device: torch.device) -> float:
    """A number that the main process knows, on every process."""
    if not dist.is_initialized():
        return value
    carrier = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(carrier, src=0)
    return float(carrier.item())


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any process, so that all of them act on it at the same step."""
    return bool(summed(torch.tensor(float(flag), device=device)) > 0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up gradients over processes, in one message per dtype.

    A weight that no row of a process reached has a gradient of zero there. One process does the same, or an optimizer
    would treat such a weight differently from several.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return
    # Gradients of parts were added up on their way.
    grads = [parameter.grad for parameter in trained if parameter.grad is not None and not is_part(parameter.grad)]
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        group = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.reshape(-1) for grad in group])
        dist.all_reduce(flat)
        for grad, piece in zip(group, flat.split([grad.numel() for grad in group]), strict=True):
            grad.copy_(piece.view_as(grad))


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """Scales gradients down to an L2 norm of ``limit`` (Pascanu et al. 2013), and returns their norm before."""
    if not any(map(is_part, parameters)):
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    norm = gradient_norm(parameters)
    scale_gradients(parameters, (limit / (norm + 1e-6)).clamp(max=1.0))
    return float(norm)
