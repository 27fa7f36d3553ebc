"""What an answer is and how its tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tunesmith.base import TrainingError

PROBABLE = 1024
"""Tokens that are sorted first when `top_p` cuts; nearly always they hold its mass."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        token_ids: without the prompt, and without the token that ended it.
        finish_reason: ``stop`` when the model ended its answer, ``length`` when the limit did.
        stop_id: the token that ended it; None where the limit did.
        logps: log-probability of each token, the one that ended it included, where another engine drew them.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_id: int | None = field(default=None, compare=False)
    logps: list[float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Asked:
    """Prompts to be answered.

    Attributes:
        prompts: token ids, at least one each.
        order: numbers of the prompts, in which they are begun.
        stop_ids: tokens that end an answer, at least one.
        batch_size: rows at a time.
        seeds: for each prompt, of its answer's random numbers; None draws one number for all from torch's generator.
    """

    prompts: Sequence[Sequence[int]]
    order: Sequence[int]
    sampling: Sampling
    stop_ids: set[int]
    batch_size: int
    seeds: Sequence[int] | None = None


class Place(NamedTuple):
    """A token of an answer: the number of the prompt, and how many tokens of the answer come before it."""

    number: int
    position: int


class Chooser:
    """Chooses tokens from logits.

    Each answer has a seed, or else one number is drawn from torch's global generator, and a stream of uniform numbers
    follows from it: what is chosen at a place depends on the logits there and on nothing else.
    """

    def __init__(self, asked: Asked) -> None:
        self._sampling, self._seeds = asked.sampling, asked.seeds
        draws = asked.seeds is None and asked.sampling.temperature > 0
        self._seed = int(torch.randint(2**62, ())) if draws else 0
        self._streams: dict[int, Tensor] = {}

    def choose(self, logits: Tensor, places: Sequence[Place]) -> list[int]:
        """A token for each row of ``logits`` ``[places, vocabulary]``, which is overwritten.

        Raises:
            TrainingError: when a row holds a NaN or an infinite maximum.
        """
        largest, best = logits.max(dim=-1)
        if not bool(torch.isfinite(largest).all()):
            raise TrainingError(
                "the model's logits are not finite numbers, so it cannot answer",
                fix="use a checkpoint from before the loss diverged, or a wider dtype",
            )
        if self._sampling.temperature <= 0:
            return best.tolist()
        drawn = torch.tensor([self._drawn(place) for place in places], device=logits.device)
        scores = (logits.float() - largest.float()[:, None]) / self._sampling.temperature
        probabilities = torch.softmax(scores, dim=-1)
        if self._sampling.top_p >= 1:
            return _inverse(probabilities, drawn).tolist()
        kept, tokens = _nucleus(probabilities, self._sampling.top_p)
        return tokens.gather(1, _inverse(kept, drawn)[:, None])[:, 0].tolist()

    def forget(self, number: int) -> None:
        """Lets go of what is kept for an answer."""
        self._streams.pop(number, None)

    def _drawn(self, place: Place) -> float:
        stream = self._streams.get(place.number)
        if stream is None:
            seed = self._seed + place.number if self._seeds is None else self._seeds[place.number]
            generator = torch.Generator().manual_seed(seed)
            stream = torch.rand(self._sampling.max_new_tokens, generator=generator)
            self._streams[place.number] = stream
        return float(stream[place.position])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most probable tokens that hold ``top_p`` of the mass (Holtzman et al. 2020), and their ids.

    Returns:
        Probabilities, zero for those that are cut, and token ids, both ``[rows, n]``.
    """
    count = min(PROBABLE, probabilities.shape[1])
    sorted_, tokens = probabilities.topk(count)
    if bool((sorted_.sum(1) < top_p).any()):
        sorted_, tokens = probabilities.sort(descending=True, stable=True)
    before = sorted_.cumsum(1) - sorted_
    return sorted_.masked_fill(before >= top_p, 0.0), tokens


def _inverse(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """Columns where the cumulative mass passes the uniform numbers ``drawn``, never one without mass: ``[rows]``."""
    mass = probabilities.double().cumsum(1)
    target = drawn.double()[:, None] * mass[:, -1:]
    last = (probabilities > 0).to(torch.uint8).flip(1).argmax(1)  # counted from the right
    return torch.searchsorted(mass, target, right=True)[:, 0].minimum(probabilities.shape[1] - 1 - last)
