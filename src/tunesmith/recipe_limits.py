"""What a recipe's job may use at most, and what its result must show."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, field_validator, model_validator

from tunesmith.base import Spec

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _bytes_of(value: Any) -> int:
    """Reads `512MB` (millions of bytes), `2GiB` (powers of 1024) or a number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", value.strip(), re.IGNORECASE)
        if isinstance(value, str)
        else None
    )
    if found is None or not float(found[1]):
        raise ValueError(f"{value!r} is not a size such as 512MB or 2GiB")
    number, unit, binary = float(found[1]), found[2].upper(), bool(found[3])
    return int(number * (1024 if binary else 1000) ** _UNITS[unit])


_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def _seconds_of(value: Any) -> float:
    """Reads `90s`, `45min`, `2h`, `1d` or a number of seconds."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return float(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"{value!r} is not a time such as 90s, 45min, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


class BudgetSpec(Spec):
    """What the job may use."""

    memory: str | int | None = None
    """The most memory that the whole process may have at any time, as the operating system counts it: `512MB`
    (millions of bytes), `2GiB`, or a number of bytes. When the job does not fit, the frozen model is read from its
    files block by block, at every step, and LoRA is trained beside it; see docs/training.md for what that costs. For
    training on a CPU."""

    time: str | int | None = None
    """The longest that the job may take: `90s`, `45min`, `2h`, `1d` or a number of seconds. Training refuses to start
    when it is predicted to take longer, and `tunesmith plan` says what fits; no setting is changed by itself."""
    money: PositiveFloat | None = None
    """The most that it may cost. `tunesmith plan` looks for a machine among those of its table; training here needs
    `hourly_price`, and refuses to start when it is predicted to cost more."""
    hourly_price: PositiveFloat | None = None
    """What an hour of this machine costs, in the currency of `money`."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: Any) -> Any:
        if time is not None:
            _seconds_of(time)
        return time

    @model_validator(mode="after")
    def _has_a_use(self) -> BudgetSpec:
        if self.hourly_price is not None and self.money is None:
            raise ValueError("hourly_price is for `money`, and there is none")
        return self

    @property
    def seconds(self) -> float | None:
        return None if self.time is None else _seconds_of(self.time)

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, memory: Any) -> Any:
        if memory is not None:
            _bytes_of(memory)
        return memory

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else _bytes_of(self.memory)


def _gate_threshold(value: Any) -> float:
    """Reads `+0.02`, `0.02` or `5%` as a number."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ValueError(f"{value!r} is not a number or a percentage such as +0.02 or 5%") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a threshold is a number or a percentage such as +0.02 or 5%")
    return float(value)


Gate = Annotated[
    dict[str, Annotated[float, BeforeValidator(_gate_threshold)]],
    Field(
        description="What the run must show to be shipped, else exit code 3. A metric's threshold is the least gain "
        "(in its better direction) of the tuned model over the base; a positive one must also lie outside the "
        "interval's reach of zero. `forgetting` is the largest allowed rise of perplexity on general text, "
        "`benchmarks` the largest allowed fall of any benchmark's score, `kl` the largest allowed divergence from the "
        "base on general prompts in nats a token; a loss within the noise of the items is no damage."
    ),
]
DAMAGE = ("forgetting", "benchmarks", "kl")
"""What a gate limits besides metrics of the task."""
