"""The dtype of the arithmetic, and the loss scaling that fp16 needs (Micikevicius et al. 2018)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Arithmetic of the forward and backward pass over trained weights that are fp32.

    Args:
        dtype: of the arithmetic.
        device: of the model.
        autocast: cast weights on the fly; needed where trained fp32 weights stand inside a model of another dtype.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: torch.device | None = None, *, autocast: bool = False
    ) -> None:
        self.dtype = dtype
        self.device_type = (device or torch.device("cpu")).type
        self.casts = autocast and dtype != torch.float32
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        if self.scaler.is_enabled():
            # The scale comes to be with the first loss, which a process without rows never sees.
            self.scaler.scale(torch.zeros((), device=device))

    def arithmetic(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, self.dtype) if self.casts else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        self.scaler.unscale_(optimizer) if self.scaler.is_enabled() else None

    def update(self, optimizer: Optimizer) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()

    def skip(self) -> None:
        """Lets the scale fall after an overflow without touching the weights."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() / 2)

    def state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
