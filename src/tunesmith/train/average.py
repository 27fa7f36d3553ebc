"""A running average of the trained weights, which is judged and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tunesmith.methods import trainable_parameters
from tunesmith.models.sharding import own_part


class Average:
    """Exponential moving average of trained weights (Polyak & Juditsky 1992; Kingma & Ba 2015, section 7.2).

    Where weights are spread over processes, each averages its own parts.

    Attributes:
        updates: how many states of the weights are in it, besides the first.

    Args:
        model: adapted; its trained weights are fp32.
        decay: share of the average that stays at an update, once there were enough of them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = list(trainable_parameters(model).values())
        self._decay = decay
        self._averages = [own_part(parameter.detach()).clone() for parameter in self._parameters]
        self.updates = 0

    def update(self) -> None:
        """Takes the weights in as they are now."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(own_part(parameter.detach()), 1 - decay)

    def begin_again(self, updates: int) -> None:
        """The weights as they are now become the average, as if they were that of ``updates`` states."""
        self.updates = updates
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.copy_(own_part(parameter.detach()))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model runs with the average inside."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Weights and average change places.

        They are copied, because an optimizer and a sharded model hold on to the memory of a weight.
        """
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            weight = own_part(parameter.detach())
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
