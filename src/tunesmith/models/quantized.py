"""The door to bitsandbytes: weights that are stored in 4 or 8 bits, made as they are loaded and read back as products
need them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from tunesmith.base import InputError

if TYPE_CHECKING:  # what only asks a configuration needs none of it
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Kind = Literal["nf4", "fp4", "int8"]
FOUR_BIT = ("nf4", "fp4")
NO_OTHER_KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'"
"""bitsandbytes says so where an optional package is missing, and goes on with its own kernel."""


@dataclass(frozen=True)
class Quantization:
    """How weights of linear layers are stored: blocks of 64 in 4 bits, or rows in 8.

    Attributes:
        double: the scales of 4-bit blocks are stored in 8 bits too (Dettmers et al. 2023, section 3).
    """

    kind: Kind
    double: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}, scales in fp32" if self.kind in FOUR_BIT and not self.double else self.kind


def quantization(kind: str, double: bool = True) -> Quantization | None:
    """From the words of a recipe; None for `none`."""
    return Quantization(cast(Kind, kind), double) if kind in get_args(Kind) else None


def stored_quantization(config: Any) -> Quantization | None:
    """How the weights of a saved model are quantized already; None when they are not, or not by bitsandbytes."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    if not settings or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit"):
        return Quantization("int8")
    if settings.get("load_in_4bit"):
        double = bool(settings.get("bnb_4bit_use_double_quant", False))
        return Quantization(cast(Kind, settings.get("bnb_4bit_quant_type", "fp4")), double)
    return None


def settled_quantization(asked: Quantization | None, config: Any, where: str) -> Quantization | None:
    """How weights will be held: as they are stored, or as was asked.

    Raises:
        InputError: when stored weights are quantized in another way than was asked: that would round them twice.
    """
    stored = stored_quantization(config)
    if stored is None or asked is None or asked == stored:
        return stored or asked
    raise InputError(
        f"the weights are stored as {stored.name} already, and {asked.name} would round them a second time",
        where=where,
        fix=f"set model.quantize: {stored.kind}"
        + ("" if stored.double else " with model.double_quantization: false")
        + ", or name the model in full precision",
    )


def import_bitsandbytes(what: str, where: str, part: str = "nn") -> Any:
    """A part of the library, without its complaint about an optional kernel.

    Args:
        what: needs it, for the message.

    Raises:
        InputError: when it is not installed.
    """
    silence_optional_kernel()
    try:
        return import_module(f"bitsandbytes.{part}")
    except ImportError as error:
        raise InputError(f"{what} needs bitsandbytes", where=where, fix="pip install 'tunesmith[eight-bit]'") from error


def silence_optional_kernel() -> None:
    """Lets bitsandbytes' log say anything but that one line, whoever imports it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)  # the same one is added once


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_OTHER_KERNEL)


def loading_options(
    held: Quantization | None, stored: bool, dtype: torch.dtype, device: torch.device, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """What transformers is told, so that each weight is quantized as it is read, or read as it is ``stored``.

    Args:
        skip: names of modules that stay as they are, besides the output layer.
    """
    if held is None:
        return {}
    import_bitsandbytes("quantized loading", "model.quantize")
    if stored:
        return {"device_map": {"": device}}
    from transformers import BitsAndBytesConfig

    kept = list(skip) or None
    if held.kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=held.kind,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=held.double,
            llm_int8_skip_modules=kept,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def settle_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets 4-bit layers compute in ``dtype``, and keeps their weights in the layout that they were read in.

    On some CPUs bitsandbytes lays them out anew at the first pass in evaluation, and computes no gradient through that:
    a training pass afterwards would silently lose that of every layer below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu, layer.compute_dtype = False, dtype


def in_full(model: PreTrainedModel) -> PreTrainedModel:
    """A model with plain linear layers, whose weights are what the quantized ones stand for."""
    if not getattr(model, "is_quantized", False):
        return model
    return cast("PreTrainedModel", cast(Any, model).dequantize())


@dataclass(frozen=True)
class PackedWeight:
    """A frozen weight ``[out, in]`` in 4 bits, which products read in a dtype of theirs.

    Attributes:
        weight: bitsandbytes' parameter, with the scales of its blocks.
    """

    weight: Any
    dtype: None = None
    """No dtype of its own: it is always made anew."""

    def to(self, dtype: torch.dtype) -> Tensor:
        """All of it, ``[out, in]``; the same values as bitsandbytes' own products have."""
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        state = copy.copy(self.weight.quant_state)
        state.dtype = dtype  # of the result; as stored it is what the weight had before
        return dequantize_4bit(self.weight.data, state)


def packed_weight(module: nn.Module) -> PackedWeight | None:
    """The weight of a 4-bit linear layer; None for any other module."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is None or not hasattr(module, "compute_dtype"):
        return None
    return None if getattr(state, "packing_format_for_cpu", False) else PackedWeight(weight)
