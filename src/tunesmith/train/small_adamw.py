"""AdamW without torch's base class of optimizers, whose first use imports torch's compiler: 70 MB for nothing.

The arithmetic is torch's own fused kernel, so the bytes are those of `torch.optim.AdamW(fused=True)`. States lie in a
file that is mapped while a weight is updated and let go of afterwards: they are half of what an adapter takes.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunesmith.files import let_go_of_pages

PAGE = 16384
"""Bytes that states are made a multiple of: no page of memory, whatever its size, holds those of two weights."""


class SmallAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for weights on a CPU, with fp32 states in a file without a name.

    Args:
        groups: `params`, `weight_decay` and whatever else their reader wants to find there.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:  # without the base's, see above
        self.param_groups = [{"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, **group} for group in groups]
        self.state = cast(Any, defaultdict(dict))
        weights = self._parameters()
        ends = [0, *accumulate(2 * _whole_pages(weight.numel()) for weight in weights)]
        self._starts = dict(zip(weights, ends, strict=False))
        handle, name = tempfile.mkstemp(prefix="tunesmith-")
        try:
            os.truncate(handle, 4 * ends[-1])
            self._kept = torch.from_file(name, shared=True, size=ends[-1], dtype=torch.float32)
        finally:
            os.close(handle)
            os.unlink(name)  # the mapping alone keeps it, and it is gone with the process

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
                    self._let_go(weight)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(weight)
        state["step"] += 1
        torch._fused_adamw_(
            [weight],
            [cast(Tensor, weight.grad)],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers have it."""
        numbers: dict[Tensor, int] = {weight: number for number, weight in enumerate(self._parameters())}
        groups = [{**group, "params": [numbers[weight] for weight in group["params"]]} for group in self.param_groups]
        return {"state": {numbers[weight]: state for weight, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        weights = self._parameters()
        self.state.clear()
        for number, state in state_dict["state"].items():
            own = self._state_of(weights[number])
            for name, value in state.items():
                own[name].copy_(value)
            self._let_go(weights[number])
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            size, start = _whole_pages(weight.numel()), self._starts[cast(nn.Parameter, weight)]
            for name, place in (("exp_avg", start), ("exp_avg_sq", start + size)):
                state[name] = self._kept[place : place + weight.numel()].view_as(weight)  # a new file is all zeros
        return state

    def _let_go(self, weight: Tensor) -> None:
        """Its states stay in the file, and are no longer in the process's memory."""
        start = 4 * self._starts[cast(nn.Parameter, weight)]
        let_go_of_pages(self._kept.data_ptr() + start, 8 * _whole_pages(weight.numel()))

    def let_go(self) -> None:
        """Lets go of all states, which whoever saved them has read."""
        let_go_of_pages(self._kept.data_ptr(), self._kept.nbytes)

    def _parameters(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]


def _whole_pages(count: int) -> int:
    """Numbers in fp32 that fill whole pages."""
    return -(-4 * count // PAGE) * PAGE // 4
