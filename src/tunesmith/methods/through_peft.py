"""Methods that PEFT has and that are not on the hot path, under the same rules as the others.

The layers, their files and their arithmetic are PEFT's own. Adapters that PEFT wrote are loaded here too.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.base import InputError, nearest
from tunesmith.methods.method import (
    AdaptationMethod,
    CastOut,
    freeze,
    make_trainable,
    refuse_adapted,
    settle,
    task_head_tensors,
    train_in_fp32,
    train_task_head,
    trainable_parameters,
)
from tunesmith.methods.targets import select_modules
from tunesmith.models.decoder import forget_decoder
from tunesmith.models.task_head import head_modules

PEFT_PREFIX = "base_model.model."
SETTLED = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision"}
"""Settings of PEFT's that Tunesmith fills in."""
OWN_KINDS = {"LORA": "lora"}
NEEDS_MORE = {
    "ADALORA": "it moves rank between layers while it trains, in a loop of its own",
    "ADAMSS": "it chooses what it trains while it trains, in a loop of its own",
    "XLORA": "it mixes adapters that exist already",
    "POLY": "it needs the number of a task beside every row",
}


class ThroughPeft(AdaptationMethod):
    """A method whose layers PEFT puts into the model."""

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 1e-3

    @property
    def needs_autocast(self) -> bool:
        return True

    @abstractmethod
    def peft_settings(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's settings for a model, `peft_type` among them."""

    def adapt(self, model: nn.Module) -> list[str]:
        from peft import inject_adapter_in_model

        refuse_adapted(model)
        config = _peft_config(self.peft_settings(model), where="method", task=peft_task(model))
        if (heads := head_modules(model)) and getattr(config, "target_modules", None) == "all-linear":
            config.exclude_modules = heads  # PEFT knows to leave them out for rows, and not for words
        freeze(model)
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        try:
            with _quietly():
                inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
            kind = config.peft_type.value
            raise InputError(
                f"PEFT cannot adapt this model by {kind}: {str(error).strip() or type(error).__name__}",
                where="method",
                fix="name modules that the model has in target_modules, or use another method",
            ) from error
        kept_whole = [p for wrapper in _wrappers(model).values() for p in wrapper.modules_to_save.parameters()]
        train_in_fp32(model, kept_whole)
        for parameter in trainable_parameters(model).values():
            make_trainable(parameter)
        for layer in _layers(model).values():
            dtype = next((p.dtype for p in layer.get_base_layer().parameters() if p.is_floating_point()), None)
            if dtype not in (None, torch.float32):
                layer.register_forward_hook(CastOut(cast(torch.dtype, dtype)))
        train_task_head(model)
        forget_decoder(model)
        return []

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return peft_tensors(model)

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        save_peft(model, directory, base=base)


class Peft(ThroughPeft):
    """Any method of PEFT's that changes layers, by its name there; further keys are the settings of its config."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["peft"] = "peft"
    """Train an adapter of PEFT's."""
    type: str
    """PEFT's name of the method, such as `loha`, `lokr`, `oft`, `boft`, `hra`, `miss`, `ln_tuning` or `fourierft`."""

    def peft_settings(self, model: nn.Module) -> dict[str, Any]:
        own = OWN_KINDS.get(self.type.upper())
        if own is not None and not self.model_extra:
            raise InputError(f"{self.type} is a method of its own", where="method.type", fix=f"write kind: {own}")
        return {"peft_type": self.type.upper(), **(self.model_extra or {})}


class Ia3(ThroughPeft):
    """(IA)³ (Liu et al. 2022, section 3.3): keys, values and the inside of the feed-forward network are rescaled."""

    kind: Literal["ia3"] = "ia3"
    """Train one factor for each key, value and feed-forward feature."""
    targets: list[str] | Literal["auto"] = "auto"
    """Regular expressions over module names; `auto` is keys, values and the last layer of the feed-forward network."""
    feedforward: list[str] | Literal["auto"] = "auto"
    """Those of the targets whose input is rescaled and not their output; `auto` is the feed-forward ones."""

    default_learning_rate: ClassVar[float] = 3e-3
    """Liu et al. 2022, section 3.5."""

    def peft_settings(self, model: nn.Module) -> dict[str, Any]:
        inner = _present(model, FEED_FORWARD_ENDS) if self.feedforward == "auto" else self.feedforward
        targets = [*_present(model, KEYS_AND_VALUES), *inner] if self.targets == "auto" else self.targets
        if not targets:
            raise InputError(
                "no keys, values or feed-forward layers are known by their names in this model",
                where="method.targets",
                fix="name them: targets: [...], feedforward: [...]",
            )
        chosen = select_modules(model, targets, key="method.targets")
        ends = select_modules(model, inner, key="method.feedforward") if inner else {}
        return {
            "peft_type": "IA3",
            "target_modules": sorted(chosen),
            "feedforward_modules": sorted(ends.keys() & chosen.keys()),
        }


KEYS_AND_VALUES = (
    *("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "wk", "wv"),
    *("qkv_proj", "c_attn", "query_key_value", "Wqkv"),  # fused ones, whose queries are rescaled too
)
FEED_FORWARD_ENDS = ("down_proj", "fc2", "dense_4h_to_h", r"mlp\.c_proj", "wo", r"layer\.\d+\.output\.dense", "lin2")


def _present(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Those patterns that match linear layers of the model."""
    found = []
    for pattern in patterns:
        try:
            chosen = select_modules(model, [pattern], key="")
        except InputError:
            continue
        if chosen:
            found.append(pattern)
    return found


def _peft_config(settings: dict[str, Any], *, where: str, task: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration object.

    Raises:
        InputError: for a method that PEFT does not have or that cannot be trained here, and for a wrong setting.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = str(settings["peft_type"])
    known = {member.value: member for member in PEFT_TYPE_TO_TUNER_MAPPING}
    if kind in NEEDS_MORE:
        raise InputError(f"{kind.lower()} cannot be trained here: {NEEDS_MORE[kind]}", where=f"{where}.type")
    if kind not in known:
        names = [name.lower() for name in known]
        raise InputError(
            f"PEFT has no method {kind.lower()!r}{nearest(kind.lower(), names)}",
            where=f"{where}.type",
            fix=f"one of {', '.join(sorted(names))}",
        )
    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[known[kind]]
    fields = sorted({field.name for field in dataclasses.fields(config_class)} - SETTLED)
    given = {name: value for name, value in settings.items() if name not in SETTLED}
    if unknown := sorted(given.keys() - set(fields)):
        raise InputError(
            f"{kind.lower()} has no setting {unknown[0]!r}{nearest(unknown[0], fields)}",
            where=f"{where}.{unknown[0]}",
            fix=f"its settings are {', '.join(fields)}",
        )
    try:
        config: PeftConfig = config_class(task_type=task, inference_mode=False, **given)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"PEFT refuses these settings: {error}", where=where) from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"{kind.lower()} adds tokens instead of changing layers", where=f"{where}.type", fix="use another method"
        )
    return config


def load_through_peft(model: nn.Module, directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Peft:
    """Adapts ``model`` by an adapter of PEFT's, and returns its method.

    Args:
        config: what stands in ``adapter_config.json``.
        tensors: of the adapter's file, under the names they have there.

    Raises:
        InputError: when it cannot be used here or belongs to another model.
    """
    where = directory / "adapter_config.json"
    kind = str(config.get("peft_type"))
    plain = _peft_config({"peft_type": kind}, where=str(where))
    usual = plain.to_dict()
    known = {field.name for field in dataclasses.fields(plain)} - SETTLED
    given = {name: value for name, value in config.items() if name in known and value != usual.get(name)}
    if beside := set(given.get("modules_to_save") or ()) & set(head_modules(model)):
        given["modules_to_save"] = sorted(set(given["modules_to_save"]) - beside) or None
    method = Peft.model_validate({"type": kind.lower(), **given})
    method.adapt(model)
    method.load_trained(model, tensors, where=directory / "adapter_model.safetensors")
    return method


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors of PEFT's layers under the names that its files have."""
    from peft import get_peft_model_state_dict

    with _quietly():
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"{PEFT_PREFIX}{name}": tensor for name, tensor in {**found, **task_head_tensors(model)}.items()}


def peft_task(model: nn.Module) -> str:
    """PEFT's name for what a model is asked for."""
    if not head_modules(model):
        return "CAUSAL_LM"
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "TOKEN_CLS"


def save_peft(model: nn.Module, directory: Path, *, base: str) -> None:
    """Writes PEFT's layers as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in peft_tensors(model).items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(cast(Any, model).peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    if heads := head_modules(model):
        config.task_type = peft_task(model)
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), *heads]
    config.save_pretrained(str(directory))


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT has put layers into a model."""
    return hasattr(model, "peft_config")


def _layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name."""
    if not has_adapter(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _wrappers(model: nn.Module) -> dict[str, Any]:
    """What stands in the place of modules that are trained whole beside PEFT's layers, by name."""
    from peft.utils import ModulesToSaveWrapper

    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


@contextmanager
def without_peft(model: nn.Module) -> Iterator[None]:
    """Runs the model as if PEFT's layers were not there."""
    layers = [*_layers(model).values(), *(_wrappers(model).values() if has_adapter(model) else ())]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_peft(model: nn.Module) -> int:
    """Folds PEFT's layers into the weights below them and puts plain layers back; returns how many there were.

    Raises:
        InputError: when this method cannot be merged.
    """
    layers = _layers(model)
    if not layers:
        return 0
    kind = cast(Any, model).peft_config["default"].peft_type.value.lower()
    for name, layer in layers.items():
        try:
            with _quietly(), torch.no_grad():
                layer.merge(safe_merge=True)
        except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"an adapter of kind {kind} cannot be merged: {error}", where=name) from error
    for name, layer in layers.items():
        parent, _, leaf = name.removesuffix(".token_adapter").rpartition(".")  # which PEFT puts into a wrapper
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    _unwrap(model)
    del cast(Any, model).peft_config
    settle(model)
    freeze(model)
    forget_decoder(model)
    return len(layers)


def _unwrap(model: nn.Module) -> None:
    """Puts modules that were trained whole in the place of the ones they were copied from."""
    for name, wrapper in _wrappers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapper.modules_to_save["default"])
    table, head = cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings()
    if head is not None and table.weight is not head.weight:  # or it would be one weight again when it is loaded
        cast(Any, model).config.tie_word_embeddings = False


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT warns of what is meant here, such as layers that are already in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
