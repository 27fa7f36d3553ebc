"""What a frozen trunk makes of every row, computed once and kept on disk: later epochs cost only the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.base import InputError, Progress
from tunesmith.batch import Batch, Example, pack
from tunesmith.data.cache import cached
from tunesmith.data.render import Rendered
from tunesmith.data.stored import RenderedRows
from tunesmith.evaluation.answers import groups_of_rows
from tunesmith.files import BytesAt, read_json, write_json
from tunesmith.models.attention import use_default_attention
from tunesmith.models.forward import hidden_at
from tunesmith.models.head import has_plain_head
from tunesmith.objectives.task import FEATURES
from tunesmith.pipeline.planning import Planned

_VALUES, _SHAPE = "features.bin", "features.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def with_features(planned: Planned, model: nn.Module, progress: Progress) -> Planned:
    """Rows that carry what the head reads, where the method leaves the trunk as it is.

    Raises:
        InputError: when the head of a model that writes does more than one product, or the disk is full.
    """
    prepared = planned.prepared
    if not planned.recipe.method.trunk_is_frozen or prepared is None:
        return planned
    if planned.judges is None and not has_plain_head(model):
        raise InputError(
            f"the output layer of a {type(model).__name__} does more than one product",
            where="method.kind",
            fix="use full or lora",
        )
    read = _reader(planned)
    trunk, parts = _sha256(model), {}
    for name in ("train", "validation", "test"):
        rows: RenderedRows = getattr(prepared, name)
        if not len(rows) or (name == "test" and planned.judges is None):
            continue  # text is written token by token, through the trunk
        made_from = {
            "trunk": trunk,
            "tokens": rows.stored.rows.identity,
            "rows": sha256(rows.numbers.astype("<i8").tobytes()).hexdigest(),
            "limit": rows.limit,
            "read": _said(planned),
        }
        directory = cached({FEATURES: made_from}, _Build(model, rows, read, planned.plan.packing, progress))
        parts[name] = rows.adding(_stored(directory))
    use_default_attention(model)
    return replace(planned, prepared=replace(prepared, **parts))


def _said(planned: Planned) -> dict[str, Any]:
    """What of a row the head reads, as JSON values."""
    assert planned.renderer is not None
    head = None if planned.judges is None else planned.judges.task_head()
    where = None if head is None else [head.kind, head.pooling, head.layer]
    return {"where": where, "packed": planned.plan.packing, "text": planned.renderer.identity()}


def _reader(planned: Planned) -> Callable[[nn.Module, Batch], Tensor]:
    objective = planned.judges
    if objective is not None:
        return objective.features

    def before_targets(model: nn.Module, batch: Batch) -> Tensor:
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        return hidden_at(model, batch, chosen - 1)

    return before_targets


class _Build:
    """Fills a directory with the features of all rows, one after the other in their order."""

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
        dtype, done = torch.float32, 0
        model.eval()
        try:
            with torch.no_grad():
                for group in groups_of_rows(rows.lengths.tolist()):
                    self.progress("reading rows with the frozen model", done, len(rows))
                    examples = [_plain(rows[at].example) for at in group]
                    found = self.read(model, pack(examples, self.layout).to(device)).cpu()
                    dtype = found.dtype
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
        entry = {"dtype": str(dtype).removeprefix("torch."), "bytes": int(written.shape[1]), "ends": ends.tolist()}
        write_json(directory / _SHAPE, entry)


def _plain(example: Example) -> Example:
    names = ("target_weights",)
    return replace(
        example,
        tensors={name: example.tensors[name] for name in names},
        scopes={name: example.scopes[name] for name in names},
    )


def _stored(directory: Path) -> Callable[[int, Rendered], dict[str, Tensor]]:
    """Reads the features of a row, ``[targets, width]`` in the trunk's dtype."""
    shape = read_json(directory / _SHAPE)
    dtype, size, ends = _DTYPES[shape["dtype"]], int(shape["bytes"]), shape["ends"]
    file = BytesAt(directory / _VALUES)

    def features(at: int, item: Rendered) -> dict[str, Tensor]:
        start, end = ends[at], ends[at + 1]
        values = bytearray(file.read(start * size, (end - start) * size))
        return {FEATURES: torch.frombuffer(values, dtype=dtype).view(end - start, -1)}

    return features


def _sha256(model: nn.Module) -> str:
    """Hash of every weight behind the inputs and before the head, and of what else decides what they compute."""
    trunk = cast(Any, model).base_model
    digest = sha256(cast(Any, model).config.to_json_string().encode())
    for name, tensor in trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
