"""Safetensors read piece by piece with plain reads.

A mapped file, which is what safetensors' own reader gives, counts as the memory of whoever touches its pages. The
format is 8 bytes (little-endian) with the length of a JSON header, the header, and the tensors' bytes:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.base import InputError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own bound."""
_STAGED = 1 << 20
"""Bytes that are read at a time where the file's dtype is not the one that is wanted."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: file, offset in bytes, dtype and shape."""

    file: io.FileIO
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of a model's safetensors files, by name.

    Args:
        directory: holds one or more `*.safetensors`.

    Raises:
        InputError: when there are none, or one of them is not what the format says.
    """

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, _Place] = {}
        paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise InputError(
                "there are no safetensors weights in this directory",
                where=directory,
                fix="convert other formats to safetensors first; pickled weights are not loaded",
            )
        for path in paths:
            self._add(path)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.shape for name, place in self._places.items()}

    def read(self, name: str, target: Tensor, first_row: int = 0) -> None:
        """Fills ``target`` with as many rows of a tensor as it has, from ``first_row`` on, in its own dtype.

        Args:
            target: contiguous, on the CPU.
        """
        place = self._places[name]
        row = torch.Size(place.shape[1:]).numel() * place.dtype.itemsize
        at = place.start + first_row * row
        with torch.no_grad():
            flat = target.detach().view(-1)
            if place.dtype == target.dtype:
                _fill(place.file, flat, at)
                return
            staged = torch.empty(min(flat.numel(), _STAGED // place.dtype.itemsize), dtype=place.dtype)
            for done in range(0, flat.numel(), len(staged)):
                piece = staged[: flat.numel() - done]
                _fill(place.file, piece, at + done * place.dtype.itemsize)
                flat[done : done + len(piece)] = piece

    def rows(self, name: str, numbers: list[int], dtype: torch.dtype) -> Tensor:
        """Chosen rows of a matrix, ``[len(numbers), width]``; neighbours that follow each other are one read."""
        found = torch.empty(len(numbers), *self._places[name].shape[1:], dtype=dtype)
        start = 0
        for end in range(1, len(numbers) + 1):
            if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
                self.read(name, found[start:end], numbers[start])
                start = end
        return found

    def _add(self, path: Path) -> None:
        file, size = io.FileIO(path), path.stat().st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError("its header is longer than the file may have")
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                place = _Place(file, start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if end > size or end - start != torch.Size(place.shape).numel() * place.dtype.itemsize:
                    raise ValueError(f"{name} does not fit into it")
                self._places[name] = place
        except KeyError as error:
            raise InputError(
                f"weights of the kind {error} cannot be streamed", where=path, fix="use F32, BF16 or F16, or no budget"
            ) from error
        except (struct.error, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"this is no safetensors file: {error}", where=path) from error


def _fill(file: io.FileIO, flat: Tensor, offset: int) -> None:
    """Reads bytes from a file straight into a tensor's memory."""
    view = memoryview(cast(Any, flat.view(torch.uint8).numpy()))
    file.seek(offset)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise InputError("a file of weights has become shorter since it was opened", where=str(file.name))
        view = view[count:]
