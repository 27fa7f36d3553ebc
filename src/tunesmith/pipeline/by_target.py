"""What a model makes of every target of the rows, computed once and kept on disk: tensors that rows then carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Batch, Example, pack
from tunesmith.data.cache import cached
from tunesmith.data.render import Rendered
from tunesmith.data.stored import RenderedRows
from tunesmith.evaluation.answers import groups_of_rows
from tunesmith.files import BytesAt, read_json, write_json

_SHAPES = "tensors.json"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DTYPES["int32"] = torch.int32


@dataclass(frozen=True)
class Reading:
    """How a model reads rows.

    Attributes:
        model: gives the model, which is asked for only when something must be computed.
        tensors: named tensors with one entry a target of the batch, of any width.
        packed: whether rows are laid end to end for this model.
        label: what the progress is called.
        example: the row as the model reads it, from its place and itself; its targets are those of the row, in order.
        only: places of the rows that will be asked for, ascending; None for all.
    """

    model: Callable[[], nn.Module]
    tensors: Callable[[nn.Module, Batch], dict[str, Tensor]]
    packed: Callable[[nn.Module], bool]
    label: str
    progress: Progress
    example: Callable[[int, Rendered], Example] = lambda at, item: item.example
    only: Sequence[int] | None = None


def kept_by_target(made_from: dict[str, Any], rows: RenderedRows, reading: Reading) -> RenderedRows:
    """Rows that carry the tensors, which are computed unless that was done before for the same content.

    Args:
        made_from: JSON values that decide, beside the rows, what the tensors are.

    Raises:
        InputError: when they cannot be kept on disk.
    """
    which = {} if reading.only is None else {"only": sha256(np.asarray(reading.only, "<i8").tobytes()).hexdigest()}
    return rows.adding(_stored(cached({**made_from, **identity_of(rows), **which}, _Build(rows, reading))))


def identity_of(rows: RenderedRows) -> dict[str, Any]:
    """Which rows these are, and how they are cut, as JSON values."""
    numbers = sha256(rows.numbers.astype("<i8").tobytes()).hexdigest()
    return {"tokens": rows.stored.rows.identity, "rows": numbers, "limit": rows.limit, "partners": rows.partners}


def weights_sha256(model: nn.Module, config: Any) -> str:
    """Hash of every weight of a model, or of a part of it, and of what else decides what they compute."""
    digest = sha256(config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Build:
    """Fills a directory with the tensors of all rows, one after the other in their order."""

    def __init__(self, rows: RenderedRows, reading: Reading) -> None:
        self.rows, self.reading = rows, reading
        self.ends = np.concatenate([[0], np.cumsum(rows.targets)])
        self.files: dict[str, np.memmap] = {}
        self.dtypes: dict[str, tuple[str, list[int]]] = {}

    def __call__(self, directory: Path) -> None:
        rows, reading, model = self.rows, self.reading, self.reading.model()
        device, training = next(model.parameters()).device, model.training
        layout: Any = "packed" if reading.packed(model) else "padded"
        longer = len(reading.example(0, rows[0])) - int(rows.lengths[0])
        chosen = range(len(rows)) if reading.only is None else reading.only
        done = 0
        model.eval()
        try:
            with torch.no_grad():
                for places in groups_of_rows([int(rows.lengths[at]) + longer for at in chosen]):
                    group = [chosen[place] for place in places]
                    reading.progress(reading.label, done, len(chosen))
                    examples = [_plain(reading.example(at, rows[at])) for at in group]
                    found = reading.tensors(model, pack(examples, layout).to(device))
                    for name, tensor in found.items():
                        self._write(directory, name, tensor.cpu().contiguous(), group)
                    done += len(group)
        finally:
            model.train(training)
        for file in self.files.values():
            file.flush()
        shapes = {name: [*self.dtypes[name], int(file.shape[1])] for name, file in self.files.items()}
        only = None if reading.only is None else list(reading.only)
        write_json(directory / _SHAPES, {"tensors": shapes, "ends": self.ends.tolist(), "only": only})

    def _write(self, directory: Path, name: str, tensor: Tensor, group: list[int]) -> None:
        values = tensor.view(torch.uint8).reshape(len(tensor), -1).numpy()  # [targets, bytes]
        if name not in self.files:
            shape = (int(self.ends[-1]), values.shape[1])
            self.files[name] = np.memmap(directory / f"{name}.bin", np.uint8, "w+", shape=shape)
            self.dtypes[name] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])
        start = 0
        for at in group:
            count = int(self.rows.targets[at])
            self.files[name][self.ends[at] : self.ends[at] + count] = values[start : start + count]
            start += count


def _plain(example: Example) -> Example:
    names = ("target_weights",)
    return replace(
        example,
        tensors={name: example.tensors[name] for name in names},
        scopes={name: example.scopes[name] for name in names},
    )


def _stored(directory: Path) -> Callable[[int, Rendered], dict[str, Tensor]]:
    """Reads the tensors of a row, each ``[targets, …]`` in its dtype."""
    found = read_json(directory / _SHAPES)
    ends: list[int] = found["ends"]
    files = {
        name: (BytesAt(directory / f"{name}.bin"), _DTYPES[dtype], width, size)
        for name, (dtype, width, size) in found["tensors"].items()
    }

    only = None if found.get("only") is None else frozenset(found["only"])

    def read(at: int, item: Rendered) -> dict[str, Tensor]:
        if only is not None and at not in only:
            raise IndexError(f"row {at} was not read: the plan's steps do not come to it")
        start, end = ends[at], ends[at + 1]
        tensors = {}
        for name, (file, dtype, width, size) in files.items():
            values = bytearray(file.read(start * size, (end - start) * size))
            tensors[name] = torch.frombuffer(values, dtype=dtype).view(end - start, *width)
        return tensors

    return read
