"""Checkpoints: written beside, hashed, synced and renamed; the newest sound one is where a run goes on."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from tunesmith.base import InputError, TunesmithError
from tunesmith.files import committed_directory, file_sha256, read_json
from tunesmith.methods import AdaptationMethod
from tunesmith.train.health import Health
from tunesmith.train.loop import Progress
from tunesmith.train.optim import optimizer_tensors, restore_optimizer
from tunesmith.train.precision import Precision

WEIGHTS, OPTIMIZER, RANDOM, STATE, MANIFEST = (
    "trained.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are written, as `step-N`.
        keep: how many are kept besides the best one.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def save(
        self, progress: Progress, model: nn.Module, method: AdaptationMethod, optimizer: Optimizer, precision: Precision
    ) -> None:
        """Commits a checkpoint, and only then removes those that are no longer kept.

        Later ones are removed too: they are damaged, or the run would not be here again.

        Raises:
            TunesmithError: when it cannot be written, for example on a full disk; the older ones stay.
        """
        tensors, numbers = optimizer_tensors(optimizer)
        state: dict[str, Any] = {"progress": asdict(progress), "optimizer": numbers, "precision": precision.state()}
        trained = {name: t.detach().cpu().contiguous() for name, t in method.trained_tensors(model).items()}
        python_state = random.getstate()
        state["python_random"] = [python_state[0], list(python_state[1]), python_state[2]]
        try:
            with committed_directory(self.path(progress.step)) as directory:
                save_file(trained, directory / WEIGHTS)
                save_file(tensors, directory / OPTIMIZER)
                save_file(_random_tensors(), directory / RANDOM)
                (directory / STATE).write_text(json.dumps(state), encoding="utf-8")
                hashes = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
                (directory / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise TunesmithError(
                f"the checkpoint cannot be written: {error}",
                where=self.path(progress.step),
                fix="make room, then continue with --resume",
            ) from error
        past = [step for step in self.steps() if step <= progress.step]
        kept = {*past[-self.keep :], progress.best_step}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))

    def newest_sound(self, warn: Callable[[str], None]) -> int | None:
        """Step of the newest checkpoint whose files are what was written; damaged ones are named."""
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step
            warn(f"checkpoint step-{step} is damaged ({damage}); the one before it is used")
        return None

    def damage(self, step: int) -> str | None:
        directory = self.path(step)
        try:
            hashes = read_json(directory / MANIFEST)
            if not isinstance(hashes, dict) or hashes.keys() != {WEIGHTS, OPTIMIZER, RANDOM, STATE}:
                return f"{MANIFEST} does not list its files"
            wrong = [name for name, expected in hashes.items() if file_sha256(directory / name) != expected]
        except (OSError, ValueError) as error:
            return str(error)
        return f"{wrong[0]} has changed" if wrong else None

    def load_weights(self, step: int, model: nn.Module, method: AdaptationMethod) -> None:
        """Puts a checkpoint's weights into the adapted model.

        Raises:
            InputError: when it is damaged, or belongs to another model or method.
        """
        if damage := self.damage(step):
            raise InputError(
                f"the checkpoint is damaged ({damage})", where=self.path(step), fix="restore it, or start a new run"
            )
        path = self.path(step) / WEIGHTS
        method.load_trained(model, load_file(path), where=path)

    def restore(
        self, step: int, model: nn.Module, method: AdaptationMethod, optimizer: Optimizer, precision: Precision
    ) -> Progress:
        """Puts model, optimizer and random states back to where they were, and returns the progress."""
        directory = self.path(step)
        self.load_weights(step, model, method)
        state = read_json(directory / STATE)
        restore_optimizer(optimizer, load_file(directory / OPTIMIZER), state["optimizer"])
        precision.restore(state["precision"])
        _restore_random(load_file(directory / RANDOM), state["python_random"])
        return _progress(state["progress"], directory)


def _progress(values: dict[str, Any], where: Path) -> Progress:
    try:
        health = Health(**values.pop("health"))
        health.recent = [(loss, norm) for loss, norm in health.recent]
        return Progress(**values, health=health)
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint was written by another version: {error}", where=where) from error


def _random_tensors() -> dict[str, torch.Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore_random(tensors: dict[str, torch.Tensor], python_state: list[Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    random.setstate((python_state[0], tuple(python_state[1]), python_state[2]))
