"""What every method of adaptation promises."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tunesmith.base import InputError, Spec
from tunesmith.models.sharding import parted_like
from tunesmith.models.task_head import head_modules

RESULT_DIRECTORIES = ("adapter", "model")


class AdaptationMethod(Spec):
    """Makes some part of a model trainable, and knows how that part is saved, loaded and merged.

    `adapt` works on the meta device too, so that a plan can count before anything is loaded.
    """

    saved_as: ClassVar[str]
    """Name of the directory of the result inside a run: `adapter` or `model`."""
    can_pack: ClassVar[bool] = True
    """Whether rows may be laid end to end under this method."""
    must_pack: ClassVar[bool] = False
    """Whether it needs attention over segments, and so a model whose rows can be packed."""
    default_learning_rate: ClassVar[float]
    trunk_is_frozen: ClassVar[bool] = False
    """Whether what the head reads never changes, so that it can be computed once."""

    @property
    def needs_autocast(self) -> bool:
        """Whether trained fp32 weights stand where the model's own arithmetic meets them."""
        return False

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained."""
        return False

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Factors on the learning rate, by the names of trained parameters that have one."""
        return {}

    @abstractmethod
    def adapt(self, model: nn.Module) -> list[str]:
        """Freezes what stays and makes the rest trainable (fp32 parameters).

        Returns:
            Notes a user should read, such as parts of the model that the method does not reach.

        Raises:
            InputError: when a setting does not fit this model.
        """

    @abstractmethod
    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        """Writes the trained part in the ecosystem's format; ``base`` names the model it belongs to."""

    @abstractmethod
    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained tensors under the names by which `save` writes them."""

    def load_trained(self, model: nn.Module, tensors: dict[str, Tensor], *, where: str | Path) -> None:
        """Copies saved tensors into an adapted model.

        Raises:
            InputError: when names or shapes differ from those of the adapted model.
        """
        own = self.trained_tensors(model)
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise InputError(
                f"the saved weights do not fit the model: {len(missing)} missing (first: {missing[:1]}), "
                f"{len(extra)} unknown (first: {extra[:1]})",
                where=where,
                fix="use the base model and the method that the weights were trained with",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != tensors[name].shape:
                    raise InputError(
                        f"{name} has shape {list(tensors[name].shape)}, the model needs {list(tensor.shape)}",
                        where=where,
                    )
                tensor.copy_(parted_like(tensors[name], tensor))


def train_task_head(model: nn.Module) -> None:
    """Makes the head of a model that judges trainable: it is new, whatever the method does to the trunk."""
    for parameter in task_head_tensors(model).values():
        make_trainable(parameter)


def task_head_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of that head by name; none in a model that writes."""
    return {
        f"{name}.{inner}": parameter
        for name in head_modules(model)
        for inner, parameter in model.get_submodule(name).named_parameters()
    }


def refuse_task_head(model: nn.Module, kind: str) -> None:
    """Raises InputError for a method that keeps no head beside its own weights."""
    if head_modules(model):
        raise InputError(
            f"{kind} keeps no head for labels or numbers",
            where="method.kind",
            fix="use lora, adapter, head or full",
        )


def refuse_adapted(model: nn.Module) -> None:
    """Raises InputError when a method has put layers of its own into the model already."""
    if hasattr(model, "peft_config") or any(hasattr(type(module), "is_adapter") for module in model.modules()):
        raise InputError("the model has an adapter already", fix="merge it first, or load the model anew")


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_trainable(parameter: nn.Parameter) -> None:
    """Trains a weight in fp32 whatever the dtype it was loaded in: bf16 cannot hold small updates."""
    parameter.data = parameter.data.float()
    parameter.requires_grad_(True)


@dataclass(frozen=True)
class CastIn:
    """A forward hook: what enters a module becomes fp32."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(argument, torch.float32) for argument in arguments)


@dataclass(frozen=True)
class CastOut:
    """A forward hook: what leaves a module gets the dtype that the model had there before."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return (
            tuple(_cast(value, self.dtype) for value in output)
            if isinstance(output, tuple)
            else _cast(output, self.dtype)
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True)
class NarrowIn:
    """A forward hook: weights trained in fp32 lend a narrow copy to a module whose other weights are narrow.

    The gradient goes through the copy to the weight itself, as it does under autocast.
    """

    dtype: torch.dtype
    lent: dict[str, nn.Parameter] = field(default_factory=dict)

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dtype == torch.float32 and parameter.requires_grad:
                self.lent[name] = parameter
                module._parameters[name] = cast(nn.Parameter, parameter.to(self.dtype))


@dataclass(frozen=True)
class NarrowOut:
    """A forward hook: the weights that lent a copy are back in their places."""

    dtype: torch.dtype
    lent: dict[str, nn.Parameter]

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        module._parameters.update(self.lent)
        self.lent.clear()


def train_in_fp32(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Makes some weights trainable in fp32 inside a model of any dtype, which goes on to run without autocast.

    Modules that share one of them, such as a tied head, are cared for too.
    """
    chosen: dict[int, torch.dtype] = {}
    for parameter in parameters:
        chosen.setdefault(id(parameter), parameter.dtype)
        make_trainable(parameter)
    for module in model.modules():
        before = {chosen[id(own)] for own in module.parameters(recurse=False) if id(own) in chosen}
        whole = all(id(own) in chosen for own in module.parameters(recurse=False))
        for dtype in before - {torch.float32}:
            if whole:
                module.register_forward_pre_hook(CastIn())
                module.register_forward_hook(CastOut(dtype))
            else:
                narrow = NarrowIn(dtype)
                module.register_forward_pre_hook(narrow)
                module.register_forward_hook(NarrowOut(dtype, narrow.lent), always_call=True)


def settle(model: nn.Module) -> None:
    """Undoes `train_in_fp32` for a model that is no longer trained: one dtype everywhere, and no hooks."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, CastOut | NarrowOut):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(hook.dtype)
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, CastIn | NarrowIn):
                del module._forward_pre_hooks[key]


def read_adapter_config(directory: Path) -> dict[str, Any]:
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read the adapter's settings: {error}", where=path) from error
    if not isinstance(config, dict):
        raise InputError("the adapter's settings are not a JSON object", where=path)
    return config
