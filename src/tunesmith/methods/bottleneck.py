"""Bottleneck adapters: small networks behind the sublayers of every block (Houlsby et al. 2019, section 2.1)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.method import AdaptationMethod, freeze, refuse_adapted, task_head_tensors, train_task_head
from tunesmith.methods.sublayers import attention_ends, feed_forward_ends, feed_forwards
from tunesmith.models.decoder import forget_decoder

PEFT_TYPE = "TUNESMITH_BOTTLENECK"
"""PEFT knows no such adapter; the file is laid out as PEFT's are."""
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
START = 1e-3
"""Standard deviation of the first weights: an adapter starts near identity (Houlsby et al. 2019, section 2.1)."""


class Bottleneck(nn.Module):
    """A frozen module with ``up act(down x)`` added to what it returns.

    Attributes:
        base: the module.
        down: fp32 ``[size, width]``; up: fp32 ``[width, size]``; with biases ``[size]`` and ``[width]``.
        reads: `output` adds to what the module returns what that becomes; `input` works beside the module, or beside
            all modules from another one on, where `begins_at` was told which.
    """

    is_adapter: ClassVar[bool] = True

    def __init__(
        self, base: nn.Module, width: int, size: int, activation: str, reads: Literal["output", "input"]
    ) -> None:
        super().__init__()
        self.base, self.reads, self.activation, self.scale = base, reads, activation, 1.0
        self._beside: Tensor | None = None
        device = next(base.parameters()).device
        self.down = nn.Parameter(torch.empty(size, width, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.empty(width, size, dtype=torch.float32, device=device))
        self.down_bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device=device))
        self.up_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=device))
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=START)

    def begins_at(self, first: nn.Module) -> None:
        """Reads what comes into ``first``, which runs before the module that this one stands around."""
        first.register_forward_pre_hook(self._come_by)

    def _come_by(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._beside = cast(Tensor, arguments[0])

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some architectures look at its dtype."""
        return cast(Tensor, self.base.weight)

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Any:
        output = self.base(hidden, *others, **named)
        beside, self._beside = self._beside, None
        source = output if self.reads == "output" else hidden if beside is None else beside
        dtype = source.dtype
        inner = ACTIVATIONS[self.activation](F.linear(source, self.down.to(dtype), self.down_bias.to(dtype)))
        return output + self.scale * F.linear(inner, self.up.to(dtype), self.up_bias.to(dtype)).to(output.dtype)


class Adapter(AdaptationMethod):
    """Bottleneck adapters in every block."""

    kind: Literal["adapter"] = "adapter"
    """Train small networks behind the sublayers of every block."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Behind attention and feed-forward network (Houlsby et al. 2019), behind the latter alone (Pfeiffer et al. 2020),
    or beside it, reading its input (He et al. 2022, section 4.2)."""
    reduction: PositiveFloat = 16.0
    """Width of the model over the size of the bottleneck; 16 as in AdapterHub (Pfeiffer et al. 2020)."""
    size: PositiveInt | None = None
    """Size of the bottleneck, instead of `reduction`."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Between down and up."""

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 1e-3

    def adapt(self, model: nn.Module) -> list[str]:
        refuse_adapted(model)
        width = int(cast(Any, model).config.get_text_config().hidden_size)
        size = self.size or max(1, round(width / self.reduction))
        reads: Literal["output", "input"] = "input" if self.placement == "parallel" else "output"
        first = feed_forwards(model) if self.placement == "parallel" else {}
        places = [*first] or feed_forward_ends(model)
        if self.placement == "houlsby":
            places = [*attention_ends(model), *places]
        freeze(model)
        for name in places:
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(name)
            wrapped = Bottleneck(module, width, size, self.activation, reads).train(module.training)
            setattr(model.get_submodule(parent), leaf, wrapped)
            if first.get(name, name) != name:
                wrapped.begins_at(model.get_submodule(first[name]))
        train_task_head(model)
        forget_decoder(model)
        return []

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        own = {
            f"{name}.{part}": cast(Tensor, getattr(layer, part))
            for name, layer in bottlenecks(model).items()
            for part in ("down", "down_bias", "up", "up_bias")
        }
        return {**own, **task_head_tensors(model)}

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_tensors(model).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": PEFT_TYPE, "base_model_name_or_path": base, "method": self.model_dump(mode="json")}
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def load_bottlenecks(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> Adapter:
    """Adapts ``model`` by adapters that `Adapter.save` wrote, and returns their method.

    Raises:
        InputError: when the settings are damaged, or the file belongs to another model.
    """
    try:
        method = Adapter.model_validate(config["method"])
    except (KeyError, ValidationError) as error:
        raise InputError(
            "the adapter's settings are damaged", where=where.parent / "adapter_config.json", fix="copy it once more"
        ) from error
    method.adapt(model)
    method.load_trained(model, tensors, where=where)
    return method


@contextmanager
def without_bottlenecks(model: nn.Module) -> Iterator[None]:
    """Runs the model as if its bottleneck adapters were not there."""
    layers = bottlenecks(model).values()
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer in layers:
            layer.scale = 1.0
