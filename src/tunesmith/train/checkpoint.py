"""Checkpoints: written beside, hashed, synced and renamed; the newest sound one is where a run goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from tunesmith.base import InputError, TunesmithError
from tunesmith.files import committed_directory, file_sha256, read_json, remove_directory, sync_file, write_text
from tunesmith.methods import AdaptationMethod
from tunesmith.models.sharding import is_sharded, whole
from tunesmith.train.average import Average
from tunesmith.train.health import Health
from tunesmith.train.loop import Progress
from tunesmith.train.optim import optimizer_tensors, restore_optimizer
from tunesmith.train.parallel import world_size
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import (
    own_random_state,
    python_random_state,
    restore_python_random_state,
    restore_random_state,
)

WEIGHTS, AVERAGED, BESIDE, OPTIMIZER, RANDOM, STATE, MANIFEST = (
    "trained.safetensors",
    "averaged.safetensors",
    "beside.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)
LATEST = "latest"
MARGIN = 1 << 20
"""Bytes that stay free beside a checkpoint's tensors, for its small files and the run's own."""


class Beside(Protocol):
    """What some objectives keep from step to step beside the model."""

    def tensors(self) -> dict[str, torch.Tensor]: ...

    def restore(self, tensors: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class Saved:
    """Everything that a checkpoint puts on disk besides the progress."""

    model: nn.Module
    method: AdaptationMethod
    optimizer: Optimizer
    precision: Precision
    average: Average | None = None
    beside: Beside | None = None

    def snapshot(self) -> Snapshot:
        """What goes to disk; where weights are spread over processes, all of them must ask."""
        trained = self._trained(passing=is_sharded(self.model))
        averaged, updates = None, 0
        if self.average is not None:
            updates = self.average.updates
            with self.average.in_place():
                averaged = self._trained(passing=True)
        beside = None if self.beside is None else self.beside.tensors()
        return Snapshot(trained, *optimizer_tensors(self.optimizer), self.precision.state(), averaged, updates, beside)

    def _trained(self, *, passing: bool) -> dict[str, torch.Tensor]:
        """The trained tensors on the CPU; copies where what the model holds now is passing."""
        with whole(self.model):
            found = self.method.trained_tensors(self.model)
            trained = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
            return {name: tensor.clone() for name, tensor in trained.items()} if passing else trained


@dataclass(frozen=True)
class Snapshot:
    """Tensors and numbers of one moment, on the CPU.

    Attributes:
        averaged: the running average of what is trained, and ``updates``, of how many states it is.
        beside: what the objective keeps.
    """

    trained: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    numbers: dict[str, Any]
    precision: dict[str, Any]
    averaged: dict[str, torch.Tensor] | None = None
    updates: int = 0
    beside: dict[str, torch.Tensor] | None = None

    def bytes(self) -> int:
        """Size of the tensors; an optimizer that has not taken a step yet will have two for each."""
        weights, averages, beside, states = (
            sum(t.numel() * t.element_size() for t in tensors.values())
            for tensors in (self.trained, self.averaged or {}, self.beside or {}, self.optimizer)
        )
        return weights + averages + beside + (states or 2 * sum(4 * t.numel() for t in self.trained.values()))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they are written, as `step-N`; the file `latest` names the newest.
        keep: how many are kept besides the best one.
        identity: what the run is made from (hashes of recipe, data and code), stored in each checkpoint.
    """

    def __init__(self, directory: Path, keep: int, identity: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.keep = keep
        self.identity = identity or {}

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def steps(self) -> list[int]:
        """Steps of all committed checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def save(
        self, progress: Progress, saved: Snapshot, random_states: dict[str, torch.Tensor], events_bytes: int = 0
    ) -> None:
        """Commits a checkpoint, and only then removes those that are no longer kept.

        Files are written beside and synced, the manifest with their hashes last; then the directory is renamed, and
        `latest` moved. Later checkpoints are removed too: they are damaged, or the run would not be here again.

        Args:
            random_states: of every process.
            events_bytes: how long the run's log of events is at this moment.

        Raises:
            TunesmithError: when it cannot be written, for example on a full disk; the older ones stay.
        """
        final = self.path(progress.step)
        try:
            self.refuse_too_little_room(saved.bytes())
            with committed_directory(final) as directory:
                self._write(
                    directory, {"progress": asdict(progress), "events_bytes": events_bytes}, saved, random_states
                )
            write_text(self.directory / LATEST, f"{final.name}\n")
        except (OSError, SafetensorError) as error:
            raise TunesmithError(
                f"the checkpoint cannot be written: {error}; the checkpoints before it are whole",
                where=final,
                fix="make room, then continue with --resume",
            ) from error
        self.purge(progress)

    def purge(self, progress: Progress) -> None:
        """Removes checkpoints that are no longer kept; later ones too, which were damaged or are done again."""
        past = [step for step in self.steps() if step <= progress.step]
        kept = {*past[-self.keep :], progress.best_step}
        for step in self.steps():
            if step not in kept:
                remove_directory(self.path(step))

    def _write(
        self, directory: Path, where: dict[str, Any], saved: Snapshot, random_states: dict[str, torch.Tensor]
    ) -> None:
        save_file(saved.trained, directory / WEIGHTS)
        if saved.averaged is not None:
            save_file(saved.averaged, directory / AVERAGED)
        if saved.beside is not None:
            save_file(saved.beside, directory / BESIDE)
        save_file(saved.optimizer, directory / OPTIMIZER)
        save_file(random_states, directory / RANDOM)
        state = {
            **where,
            "optimizer": saved.numbers,
            "precision": saved.precision,
            "averaged_updates": saved.updates,
            "python_random": python_random_state(),
            "processes": world_size(),
            "made_from": self.identity,
        }
        (directory / STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in sorted(directory.iterdir()):
            sync_file(path)
        hashes = {path.name: file_sha256(path) for path in sorted(directory.iterdir())}
        (directory / MANIFEST).write_text(json.dumps(hashes, indent=2), encoding="utf-8")

    def refuse_too_little_room(self, needed: int) -> None:
        """Raises TunesmithError when the disk has less room than a checkpoint takes."""
        place = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < needed + MARGIN:
            raise TunesmithError(
                f"a checkpoint takes {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.2f} MB left; the "
                "checkpoints before it are whole",
                where=self.directory,
                fix="make room, then continue with --resume",
            )

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
            if not isinstance(hashes, dict) or hashes.keys() - {AVERAGED, BESIDE} != {
                WEIGHTS,
                OPTIMIZER,
                RANDOM,
                STATE,
            }:
                return f"{MANIFEST} does not list its files"
            wrong = [name for name, expected in hashes.items() if file_sha256(directory / name) != expected]
        except (OSError, ValueError) as error:
            return str(error)
        return f"{wrong[0]} has changed" if wrong else None

    def load_weights(self, step: int, model: nn.Module, method: AdaptationMethod) -> None:
        """Puts a checkpoint's weights into the adapted model; their average, where it has one.

        Raises:
            InputError: when it is damaged, or belongs to another model or method.
        """
        self._load(step, model, method, AVERAGED if (self.path(step) / AVERAGED).is_file() else WEIGHTS)

    def _load(self, step: int, model: nn.Module, method: AdaptationMethod, name: str) -> None:
        if damage := self.damage(step):
            raise InputError(
                f"the checkpoint is damaged ({damage})", where=self.path(step), fix="restore it, or start a new run"
            )
        path = self.path(step) / name
        method.load_trained(model, load_file(path), where=path)

    def events_bytes(self, step: int) -> int:
        """How long the log of events was when a checkpoint was written."""
        return int(read_json(self.path(step) / STATE)["events_bytes"])

    def restore(self, step: int, saved: Saved, warn: Callable[[str], None] = lambda text: None) -> Progress:
        """Puts model, optimizer and random states back to where they were, and returns the progress."""
        directory = self.path(step)
        state = read_json(directory / STATE)
        averaged = (directory / AVERAGED).is_file()
        if saved.average is not None and averaged:
            self._load(step, saved.model, saved.method, AVERAGED)
            saved.average.begin_again(state["averaged_updates"])
        self._load(step, saved.model, saved.method, WEIGHTS)
        if saved.average is not None and not averaged:
            saved.average.begin_again(0)
        if saved.beside is not None:
            saved.beside.restore(load_file(directory / BESIDE))
        restore_optimizer(saved.optimizer, load_file(directory / OPTIMIZER), state["optimizer"])
        saved.precision.restore(state["precision"])
        mine = own_random_state(load_file(directory / RANDOM))
        if state["processes"] != world_size() or mine is None:
            warn(
                f"the checkpoint was written by {state['processes']} processes and there are {world_size()} now: the "
                "result is as good, but not the same to the byte"
            )
        if mine is not None:
            restore_random_state(mine)
        if state["made_from"].get("code") != self.identity.get("code"):
            warn("the checkpoint was written by another version of Tunesmith: the result may differ in the last bits")
        restore_python_random_state(state["python_random"])
        return _progress(state["progress"], directory)


def _progress(values: dict[str, Any], where: Path) -> Progress:
    try:
        health = Health(**values.pop("health"))
        health.recent = [(loss, norm) for loss, norm in health.recent]
        return Progress(**values, health=health)
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint was written by another version: {error}", where=where) from error
