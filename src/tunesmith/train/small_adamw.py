"""AdamW without torch's base class of optimizers, whose first use imports torch's compiler: 70 MB for nothing.

The arithmetic is torch's own fused kernel, so the bytes are those of `torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class SmallAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) for weights on a CPU, with fp32 states.

    Args:
        groups: `params`, `weight_decay` and whatever else their reader wants to find there.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:  # without the base's, see above
        self.param_groups = [{"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, **group} for group in groups]
        self.state = cast(Any, defaultdict(dict))

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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            states = [self._state_of(weight) for weight in weights]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
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
            self.state[weights[number]] = {name: value.clone() for name, value in state.items()}
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def _parameters(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]
