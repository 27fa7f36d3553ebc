"""`tunesmith quantize`: a model saved with its linear layers in 4 or 8 bits, for use as a base that is loaded so."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.base import InputError, Progress, silent
from tunesmith.files import committed_directory
from tunesmith.models.load import load_model, load_tokenizer, read_config
from tunesmith.models.quantized import quantization, stored_quantization
from tunesmith.pipeline.loaded import default_dtype
from tunesmith.pipeline.locating import locate
from tunesmith.plan.hardware import detect_hardware


@dataclass(frozen=True)
class Saved:
    """What came of saving a model quantized.

    Attributes:
        bytes_before, bytes_after: of the weights' files; before is 0 for a hub id.
    """

    out: str
    quantized: str
    bytes_before: int
    bytes_after: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize_model(path: str, out: Path, to: str, *, double: bool = True, progress: Progress = silent) -> Saved:
    """Loads a model with its linear layers quantized, and writes it as transformers does.

    Args:
        to: `nf4`, `fp4` or `int8`.
        double: quantize the scales of 4-bit blocks too.

    Raises:
        InputError: for another word, an adapter, a target that exists, or weights that are quantized already.
    """
    asked = quantization(to, double)
    if asked is None:
        raise InputError(f"unknown quantization {to!r}", where="--to", fix="use nf4, fp4 or int8")
    if out.exists():
        raise InputError("this exists already; it is not overwritten", where=out, fix="name a new directory")
    location = locate(path, progress)
    if location.adapter is not None:
        raise InputError(
            "an adapter has no weights of its own to quantize", where=path, fix="merge it first, or name its base"
        )
    if (stored := stored_quantization(read_config(location.base))) is not None:
        raise InputError(f"the weights are stored as {stored.name} already", where=path, fix="use the model as it is")
    progress("quantizing the model", 0, None)
    model = load_model(location.base, dtype=default_dtype(), device=detect_hardware().device, quantized=asked)
    with committed_directory(out) as directory:
        model.save_pretrained(directory)
        load_tokenizer(location.tokenizer).save_pretrained(directory)
    return Saved(str(out), asked.name, _bytes(Path(location.base)), _bytes(out))


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
