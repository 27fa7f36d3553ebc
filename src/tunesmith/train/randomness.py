"""The random states on which training depends: dropout's, on every process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.train.parallel import gathered, rank


def random_state() -> dict[str, Tensor]:
    """This process's states: bytes of the CPU's generator, and of the CUDA device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def random_states_of_all(device: torch.device) -> dict[str, Tensor]:
    """The states of every process by name and rank, for a checkpoint; all processes must ask at the same time."""
    return {
        f"{name}.{at}": state
        for name, mine in random_state().items()
        for at, state in enumerate(gathered(mine, device))
    }


def own_random_state(states: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """This process's part of what a checkpoint holds; None when there were fewer processes."""
    suffix = f".{rank()}"
    found = {name.removesuffix(suffix): state for name, state in states.items() if name.endswith(suffix)}
    return found or None


def python_random_state() -> list[Any]:
    """The state of Python's own generator as JSON values."""
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def restore_python_random_state(state: list[Any]) -> None:
    random.setstate((state[0], tuple(state[1]), state[2]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws what is drawn inside from a seed of its own; what is drawn behind it is as if nothing had been."""
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        restore_random_state(before)
