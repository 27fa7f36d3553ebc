"""A training job on a tiny model, for tests of what goes on around the steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tiny import VOCABULARY, random_rows, tiny
from tunesmith.batch import Batch, pack
from tunesmith.methods import Lora
from tunesmith.objectives import Supervised
from tunesmith.recipe import TrainSpec
from tunesmith.train.average import Average
from tunesmith.train.checkpoint import Checkpoints, Saved
from tunesmith.train.health import Health
from tunesmith.train.loop import Job, Progress, train
from tunesmith.train.optim import build_optimizer
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import random_states_of_all


def plan_of(**settings: Any) -> Any:
    defaults = {"steps": 10, "warmup_steps": 0, "learning_rate": 1e-2, "evaluate_every": None, "checkpoint_every": None}
    return SimpleNamespace(**{**defaults, **settings})


def adapted(method: Any = None, **overrides: Any) -> nn.Module:
    model = tiny(**overrides)
    (method or Lora(rank=4)).adapt(model)
    return model


ROWS = random_rows([9, 4, 14, 6, 3, 11, 8, 5], weights=(0.5, 1.0))


def two_micro_batches(number: int, micro_batch: int | None = None) -> list[Batch]:
    at = 4 * (number % 2)
    return [pack(ROWS[at : at + 3]), pack(ROWS[at + 3 : at + 4], "padded")]


@dataclass
class Trial:
    """A job on a tiny model, with what it told and kept."""

    plan: Any = field(default_factory=plan_of)
    spec: TrainSpec = field(default_factory=lambda: TrainSpec(schedule="constant"))
    method: Any = field(default_factory=lambda: Lora(rank=4, dropout=0.1))
    directory: Path | None = None
    dtype: torch.dtype = torch.float32
    stop: Callable[[], bool] = lambda: False
    initializer_range: float = 0.2
    hidden_size: int = 32

    def __post_init__(self) -> None:
        self.model = adapted(
            self.method,
            tie_word_embeddings=True,
            initializer_range=self.initializer_range,
            hidden_size=self.hidden_size,
        )
        self.optimizer = build_optimizer(self.model, self.spec, self.plan.learning_rate)
        self.precision = Precision(self.dtype)
        self.average = None if self.spec.ema == "off" else Average(self.model, self.spec.ema)
        self.checkpoints = Checkpoints(self.directory or Path("nowhere"), self.spec.keep)
        self.events: list[dict[str, Any]] = []
        self.saved: list[tuple[int, bool]] = []

    def save(self, progress: Progress, best: bool) -> None:
        self.saved.append((progress.step, best))
        if self.directory is not None:
            self.checkpoints.save(progress, self.kept().snapshot(), random_states_of_all(torch.device("cpu")))

    def kept(self) -> Saved:
        return Saved(self.model, self.method, self.optimizer, self.precision, self.average)

    def restore(self, number: int) -> Progress:
        return self.checkpoints.restore(number, self.kept())

    def go_back(self) -> Progress | None:
        newest = self.checkpoints.newest_sound(lambda text: None)
        return None if newest is None else self.restore(newest)

    def run(self, progress: Progress | None = None, evaluate: Callable[[int], float | None] | None = None) -> Progress:
        job = Job(
            self.model,
            Supervised(),
            self.optimizer,
            self.precision,
            self.spec,
            self.plan,
            two_micro_batches,
            self.save,
            self.stop,
            self.go_back,
            self.average,
        )
        progress = progress or Progress(health=Health(vocabulary=VOCABULARY))
        return train(job, progress, evaluate=evaluate or (lambda at: None), emit=self.events.append)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.method.trained_tensors(self.model).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
