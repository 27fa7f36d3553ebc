"""A dated table of machines with their prices, which a user can replace by one of their own."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from tunesmith.base import Spec
from tunesmith.plan.dated_file import DatedFile
from tunesmith.plan.hardware import Hardware, multiply_rate, native_dtypes

GIGA = 10**9
CPU_EFFICIENCY = 0.11
"""Share of the rate of a large matrix product that a training step reaches on a CPU, as `plan.duration` has it."""


class Machine(Spec):
    """One or several like devices. Sizes as the file's own comment says."""

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    memory: PositiveFloat
    count: PositiveInt = 1
    tflops: PositiveFloat
    fp32: PositiveFloat
    bandwidth: PositiveFloat
    price: NonNegativeFloat | None = None

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return int(self.memory * GIGA)

    def rate(self, dtype: str) -> float:
        """Operations a second of one device's products."""
        return 1e12 * (self.fp32 if dtype == "fp32" else self.tflops)


class Efficiency(Spec):
    """Share of the peak rate that training reaches, by kind, and what of it remains on each of several devices."""

    cuda: PositiveFloat
    mps: PositiveFloat
    several: PositiveFloat

    def of(self, machine: Machine) -> float:
        share = {"cuda": self.cuda, "mps": self.mps, "cpu": CPU_EFFICIENCY}[machine.kind]
        return share * (self.several if machine.count > 1 else 1.0)


class Hosted(Spec):
    """Training through an API: the price of a million tokens, and the largest model, in 10^9 parameters."""

    name: str
    largest: PositiveFloat | None = None
    million: NonNegativeFloat
    source: str


class Machines(Spec):
    """The whole file."""

    date: date
    currency: str
    source: str
    efficiency: Efficiency
    machines: list[Machine]
    hosted: list[Hosted]


def read_machines(path: Path | None = None) -> Machines:
    """The table of a file, or the one that comes with the package.

    Raises:
        InputError: naming the file, the line and the key.
    """
    sections = {"machines": Machine, "hosted": Hosted, "efficiency": Efficiency}
    return DatedFile(Machines, sections, "tunesmith.plan", "machines.yaml", "machines", "key").read(path)


def this_machine(hardware: Hardware) -> Machine:
    """The machine at hand, with its rate of products measured for a moment."""
    kind = hardware.device.type
    exact = multiply_rate(hardware.device, torch.float32)
    narrow = "bf16" in native_dtypes(hardware.device)
    fast = multiply_rate(hardware.device, torch.bfloat16) if narrow else exact
    return Machine(
        name=f"this: {hardware.name}",
        kind=kind if kind in ("cuda", "mps") else "cpu",
        memory=hardware.memory_bytes / GIGA,
        count=hardware.processes,
        tflops=fast / 1e12,
        fp32=exact / 1e12,
        bandwidth=10.0 if kind == "cpu" else 400.0,
    )
