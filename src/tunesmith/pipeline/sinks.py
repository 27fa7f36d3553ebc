"""Where events go besides the caller: the run's own log, TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.base import InputError
from tunesmith.run import Run

Sink = Callable[[dict[str, Any]], None]
NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens", "seconds")


def open_sinks(names: list[str], run: Run) -> list[Sink]:
    """Raises InputError when a recipe names a tracker that is not installed."""
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [makers[name](run.path) for name in names]


def check_sinks(names: list[str]) -> None:
    """Refuses early, before anything expensive starts."""
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise InputError(f"{name} is not installed", where="train.log", fix=f"pip install 'tunesmith[{name}]'")


def _tensorboard(path: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(path / "tensorboard"))

    def write(event: dict[str, Any]) -> None:
        for name in NUMBERS:
            if isinstance(event.get(name), (int, float)) and "step" in event:
                writer.add_scalar(f"{event['event']}/{name}", event[name], event["step"])
        writer.flush()

    return write


def _wandb(path: Path) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]

    session: Any = wandb.init(project="tunesmith", name=path.name, dir=str(path))

    def write(event: dict[str, Any]) -> None:
        numbers = {f"{event['event']}/{name}": event[name] for name in NUMBERS if event.get(name) is not None}
        if numbers and "step" in event:
            session.log(numbers, step=event["step"])

    return write
