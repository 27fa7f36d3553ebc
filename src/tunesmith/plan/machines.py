"""A dated table of machines with their prices, which a user can replace by one of their own."""

from __future__ import annotations

from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from tunesmith.base import InputError, Spec, nearest
from tunesmith.plan.hardware import Hardware, multiply_rate, native_dtypes
from tunesmith.recipe_file import parse_yaml

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
    shown = "machines.yaml" if path is None else str(path)
    try:
        place = files("tunesmith.plan").joinpath("machines.yaml") if path is None else path
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"the machines cannot be read: {said}", where=shown, fix="name a YAML file") from error
    needs = f"the keys {', '.join(Machines.model_fields)}"
    values, lines = parse_yaml(text, shown, what="machines are", needs=needs)
    try:
        return Machines.model_validate(values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        place_of = [str(part) for part in first["loc"]]
        key = ".".join(place_of)
        line = next((lines[at] for at in (key, ".".join(place_of[:-1]), place_of[0]) if at in lines), None)
        where = f"{shown}:{line} {key}" if line is not None else f"{shown} {key}"
        holder = {"machines": Machine, "hosted": Hosted, "efficiency": Efficiency}.get(place_of[0], Machines)
        known = list(holder.model_fields)
        if first["type"] == "extra_forbidden":
            name = place_of[-1]
            raise InputError(
                f"unknown key {name!r}{nearest(name, known)}", where=where, fix=f"known here: {', '.join(known)}"
            ) from None
        said = "this key is missing" if first["type"] == "missing" else first["msg"].removeprefix("Input ")
        raise InputError(said, where=where, fix="copy the package's machines.yaml and change its numbers") from None


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
