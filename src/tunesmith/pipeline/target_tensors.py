"""What a model makes of every target of some rows, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Batch, Example, pack
from tunesmith.data.render import Rendered
from tunesmith.data.stored import RenderedRows
from tunesmith.evaluation.answers import groups_of_rows
from tunesmith.files import BytesAt, read_json, write_json

_VALUES, _SHAPE = "targets.bin", "targets.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def identity_of_rows(rows: RenderedRows) -> dict[str, Any]:
    """What decides which tokens rows have, as JSON values."""
    return {
        "tokens": rows.stored.rows.identity,
        "rows": sha256(rows.numbers.astype("<i8").tobytes()).hexdigest(),
        "limit": rows.limit,
        "partners": rows.partners,
    }


class TargetTensors:
    """Fills a directory with what a model makes of every target of all rows, in their order; for `data.cache.cached`.

    Args:
        read: one entry a target of a batch, ``[targets]`` or ``[targets, width]``.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: RenderedRows,
        read: Callable[[nn.Module, Batch], Tensor],
        packed: bool,
        progress: Progress,
    ) -> None:
        self.model, self.rows, self.read, self.progress = model, rows, read, progress
        self.layout: Any = "packed" if packed else "padded"

    def __call__(self, directory: Path) -> None:
        model, rows = self.model, self.rows
        device, training = next(model.parameters()).device, model.training
        ends = np.concatenate([[0], np.cumsum(rows.targets)])
        written: np.memmap | None = None
        dtype, width, done = torch.float32, list[int](), 0
        model.eval()
        try:
            with torch.no_grad():
                for group in groups_of_rows(rows.lengths.tolist()):
                    self.progress("reading rows with the model as it is", done, len(rows))
                    examples = [_plain(rows[at].example) for at in group]
                    found = self.read(model, pack(examples, self.layout).to(device)).cpu()
                    dtype, width = found.dtype, list(found.shape[1:])
                    values = found.contiguous().view(torch.uint8).reshape(len(found), -1).numpy()  # [targets, bytes]
                    if written is None:
                        shape = (int(ends[-1]), values.shape[1])
                        written = np.memmap(directory / _VALUES, np.uint8, "w+", shape=shape)
                    start = 0
                    for at in group:
                        count = int(rows.targets[at])
                        written[ends[at] : ends[at] + count] = values[start : start + count]
                        start += count
                    done += len(group)
        finally:
            model.train(training)
        assert written is not None
        written.flush()
        entry = {
            "dtype": str(dtype).removeprefix("torch."),
            "width": width,
            "bytes": int(written.shape[1]),
            "ends": ends.tolist(),
        }
        write_json(directory / _SHAPE, entry)


def _plain(example: Example) -> Example:
    names = ("target_weights",)
    return replace(
        example,
        tensors={name: example.tensors[name] for name in names},
        scopes={name: example.scopes[name] for name in names},
    )


def read_target_tensors(directory: Path, name: str) -> Callable[[int, Rendered], dict[str, Tensor]]:
    """Reads what was made of the targets of a row, by its place among the rows."""
    shape = read_json(directory / _SHAPE)
    dtype, size, ends = _DTYPES[shape["dtype"]], int(shape["bytes"]), shape["ends"]
    width = shape["width"]
    file = BytesAt(directory / _VALUES)

    def of_row(at: int, item: Rendered) -> dict[str, Tensor]:
        start, end = ends[at], ends[at + 1]
        values = bytearray(file.read(start * size, (end - start) * size))
        return {name: torch.frombuffer(values, dtype=dtype).view(end - start, *width)}

    return of_row


def weights_sha256(model: nn.Module, config: Any) -> str:
    """Hash of every weight of a model, or of a part of it, and of what else decides what they compute."""
    digest = sha256(config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
