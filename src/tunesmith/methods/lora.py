"""LoRA (Hu et al. 2021, equation 3): W x + (alpha / rank) B A x, with W frozen.

Saved as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.base import InputError, nearest
from tunesmith.methods.low_rank import lora_layers, names_of, wrap
from tunesmith.methods.method import (
    AdaptationMethod,
    freeze,
    refuse_adapted,
    train_in_fp32,
    train_task_head,
    trainable_parameters,
)
from tunesmith.methods.quantized_lora import base_written, is_quantized, refuse_start, round_to, start_by_loftq
from tunesmith.methods.targets import available, compile_pattern, exactly, matches, select_modules
from tunesmith.methods.through_peft import (
    PEFT_PREFIX,
    Peft,
    has_adapter,
    peft_task,
    peft_tensors,
    save_peft,
)
from tunesmith.methods.token_rows import (
    chosen_tokens,
    indices_for_peft,
    row_tensors,
    train_rows,
)
from tunesmith.models.task_head import head_modules


def _grid_name(value: Any) -> Any:
    return "q4_0" if value is True else "none" if value is False else value


class Lora(AdaptationMethod):
    """Low-rank adapters beside frozen layers."""

    kind: Literal["lora"] = "lora"
    """Train low-rank updates of chosen layers."""
    rank: PositiveInt = 16
    """Rank of the update. Source for the default: the ranks of PEFT's method comparison; more rows want more."""
    alpha: PositiveFloat = 32.0
    """Scale of the update, alpha / rank ("LoRA Without Regret", Schulman et al. 2025, fixes 32)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update; 0 as in "LoRA Without Regret" and PEFT's comparison."""
    targets: str | list[str] = "all-linear"
    """`all-linear`, `attention`, `mlp`, `qv`, or regular expressions over module names (a whole name or its last
    components). All linear layers by default: Dettmers et al. 2023 (QLoRA, section 4) and "LoRA Without Regret" find
    attention alone worse at equal parameters."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023), so that large ranks keep learning."""
    rank_pattern: Annotated[
        dict[str, PositiveInt], Field(description="Rank of the modules that match a regular expression, over `rank`.")
    ] = Field(default_factory=dict)
    alpha_pattern: Annotated[
        dict[str, PositiveFloat],
        Field(description="Alpha of the modules that match a regular expression, over `alpha`."),
    ] = Field(default_factory=dict)
    plus_ratio: PositiveFloat = 1.0
    """How many times faster B learns than A (LoRA+, Hayou et al. 2024, who find 16 good for models of 7B)."""
    dora: bool = False
    """Train the length of every output's weights apart from their direction (DoRA, Liu et al. 2024, equation 5),
    through PEFT's layers, which are slower."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "kaiming"
    """How the update starts: A at random and B at zero, both orthogonal to each other, or with the largest part of the
    weight itself, which is taken off the base (PiSSA, Meng et al. 2024; OLoRA, Büyükakyüz 2024); those but `kaiming` go
    through PEFT's layers, which are slower. `loftq` is for a base in 4 bits: the largest part of what quantizing took
    away (LoftQ, Li et al. 2023), so that base and adapter start close to the base as it was; the adapter then belongs
    on the quantized base, and is merged into it."""
    quantization_aware: Annotated[
        Literal["none", "q4_0", "q4_1", "nf4"],
        BeforeValidator(_grid_name),
        Field(
            description="Compute with base and update added and rounded to 4 bits, as they will be when they are "
            "merged and quantized, with the gradient passing through the rounding (Bengio et al. 2013; for LoRA as in "
            "L4Q, Jeon et al. 2024): `q4_0` or `q4_1`, llama.cpp's INT4 blocks of 32 without and with an offset, or "
            "`nf4`, bitsandbytes' blocks of 64. `true` is `q4_0`. The base itself is not changed."
        ),
    ] = "none"
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapters and saved with them, such as `embed_tokens` and `lm_head` when tokens
    were added. Tied weights stay tied."""
    trainable_tokens: Literal["added"] | list[str | int] | None = None
    """Tokens whose rows of the embedding table and of the head are trained whole, while the others stay frozen: those
    of `model.add_tokens` (`added`), or any by their text in the vocabulary or id, such as control tokens of a template
    that a base model has never seen. PEFT's `trainable_token_indices`, and saved as such."""

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 2e-4

    @property
    def needs_autocast(self) -> bool:
        return bool(self.modules_to_save) or self._variant

    @property
    def _variant(self) -> bool:
        """Whether PEFT's layers are needed."""
        return self.dora or self.init not in ("kaiming", "loftq")

    def _through_peft(self, model: nn.Module) -> Peft:
        """The same method in PEFT's layers."""
        refuse_adapted(model)
        chosen = select_modules(model, self.targets, key="method.targets")
        if self.dora and is_quantized(model) and any(isinstance(m, nn.Embedding) for m in chosen.values()):
            raise InputError("DoRA cannot change quantized embeddings", where="method.dora", fix="choose other targets")
        start = {"kaiming": True}.get(self.init, self.init)
        kept_whole = [names_of(model, parameter) for parameter in self._modules_to_save(model, chosen)]
        return Peft.model_validate(
            {
                "type": "lora",
                "r": self.rank,
                "lora_alpha": self.alpha,
                "lora_dropout": self.dropout,
                "target_modules": _shortest_names(model, list(chosen)),
                "use_rslora": self.rslora,
                "use_dora": self.dora,
                "init_lora_weights": start,
                "rank_pattern": self.rank_pattern,
                "alpha_pattern": self.alpha_pattern,
                "modules_to_save": sorted({names[0].rpartition(".")[0] for names in kept_whole}) or None,
                "ensure_weight_tying": any(len(names) > 1 for names in kept_whole),
                "trainable_token_indices": self._indices(model),
                "fan_in_fan_out": any(isinstance(module, Conv1D) for module in chosen.values()),
            }
        )

    def _indices(self, model: nn.Module) -> dict[str, list[int]] | None:
        """The same rows in PEFT's layers."""
        if self.trainable_tokens is None:
            return None
        return indices_for_peft(model, chosen_tokens(model, self.trainable_tokens))

    def rates(self, model: nn.Module) -> dict[str, float]:
        if self.plus_ratio == 1.0:
            return {}
        return {name: self.plus_ratio for name in trainable_parameters(model) if "lora_B" in name}

    def adapt(self, model: nn.Module) -> list[str]:
        refuse_start(model, self.init, self.dora)
        self._refuse_unrounded()
        if self._variant:
            return self._through_peft(model).adapt(model)
        refuse_adapted(model)
        chosen = select_modules(model, self.targets, key="method.targets")
        whole = self._modules_to_save(model, chosen)
        ranks = _matched(self.rank_pattern, chosen, key="method.rank_pattern")
        alphas = _matched(self.alpha_pattern, chosen, key="method.alpha_pattern")
        rows = None if self.trainable_tokens is None else chosen_tokens(model, self.trainable_tokens)
        freeze(model)
        for name in chosen:
            rank, alpha = int(ranks.get(name, self.rank)), alphas.get(name, self.alpha)
            scale = alpha / (math.sqrt(rank) if self.rslora else rank)
            wrap(model, name, rank, scale, self.dropout)
        if self.init == "loftq":
            start_by_loftq(model)
        notes = [] if self.quantization_aware == "none" else round_to(model, self.quantization_aware)
        train_in_fp32(model, whole)
        train_task_head(model)
        if rows is not None:
            train_rows(model, rows, chosen)
        return [*notes, *_unreached(model)]

    def _refuse_unrounded(self) -> None:
        """Raises InputError for what would train something else than the rounded sum of base and update."""
        if self.quantization_aware == "none":
            return
        for key, used in (("dora", self.dora), ("init", self._variant), ("dropout", self.dropout > 0)):
            if used:
                raise InputError(
                    f"quantization-aware training rounds W + scale B A, and method.{key} computes something else",
                    where=f"method.{key}",
                    fix="remove it, or method.quantization_aware",
                )

    def _modules_to_save(self, model: nn.Module, adapted: dict[str, nn.Module]) -> list[nn.Parameter]:
        """The weights of those modules."""
        whole: dict[int, nn.Parameter] = {}
        for pattern in self.modules_to_save:
            compile_pattern(pattern, key="method.modules_to_save")
            named = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters())}
            found = [
                parameter for name in named if name and matches(pattern, name) for parameter in named[name].parameters()
            ]
            if not found:
                leaves = {name: module for name, module in named.items() if not list(module.children())}
                raise InputError(
                    f"{pattern!r} matches no module with weights"
                    + nearest(pattern, [name.rsplit(".", 1)[-1] for name in leaves]),
                    where="method.modules_to_save",
                    fix=f"this model has: {available(leaves)}",
                )
            whole |= {id(parameter): parameter for parameter in found}
        for name, module in adapted.items():
            if any(id(parameter) in whole for parameter in module.parameters()):
                raise InputError(
                    f"{name} is a target of the adapter already, by its own name or by weights that it shares",
                    where="method.modules_to_save",
                    fix="train a weight whole or with an adapter, not both",
                )
        return list(whole.values())

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        if has_adapter(model):
            save_peft(model, directory, base=base)
            return
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_tensors(model).items()}
        for parameter in _whole(model).values():
            first, *others = names_of(model, parameter)
            # PEFT looks for a shared weight under each of its names.
            tensors |= {f"{PEFT_PREFIX}{name}": tensors[f"{PEFT_PREFIX}{first}"].clone() for name in others}
        base_said = base_written(model, bound=self.init == "loftq")
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt", **base_said})
        config = json.dumps(self._peft_config(model, base), indent=2) + "\n"
        (directory / "adapter_config.json").write_text(config, encoding="utf-8")

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        if has_adapter(model):
            return peft_tensors(model)
        tensors: dict[str, Tensor] = {}
        for name, layer in lora_layers(model).items():
            for suffix, parameter in zip(layer.suffixes, (layer.lora_A, layer.lora_B), strict=True):
                tensors[f"{PEFT_PREFIX}{name}.{suffix}"] = parameter
        beside = row_tensors(model) | _whole(model)
        return tensors | {f"{PEFT_PREFIX}{name}": tensor for name, tensor in beside.items()}

    def _peft_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """The settings PEFT needs to rebuild exactly these layers, whatever its own presets mean."""
        layers, whole = lora_layers(model), _whole(model)
        ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items() if layer.lora_A.shape[0] != self.rank}
        alphas = _matched(self.alpha_pattern, layers, key="method.alpha_pattern")
        return {
            "peft_type": "LORA",
            "task_type": peft_task(model),
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _shortest_names(model, list(layers)),
            "rank_pattern": {exactly(name): rank for name, rank in ranks.items()},
            "alpha_pattern": {exactly(name): alpha for name, alpha in alphas.items()},
            "use_rslora": self.rslora,
            "bias": "none",
            "fan_in_fan_out": all(isinstance(layer.base, Conv1D) for layer in layers.values()),
            "init_lora_weights": True,
            "modules_to_save": _modules_of(model, whole) or None,
            "trainable_token_indices": indices_for_peft(model),
            "ensure_weight_tying": any(len(names_of(model, parameter)) > 1 for parameter in whole.values()),
        }


def _modules_of(model: nn.Module, whole: dict[str, nn.Parameter]) -> list[str]:
    """Modules that PEFT is told to keep beside an adapter: the layers of those weights, or the head of a task."""
    heads = head_modules(model)
    return sorted(heads) + sorted({name.rpartition(".")[0] for name in whole if name.partition(".")[0] not in heads})


class QLora(Lora):
    """LoRA over a base in 4 bits (Dettmers et al. 2023, equation 5), with every field of `lora`."""

    kind: Literal["qlora"] = "qlora"  # pyright: ignore[reportIncompatibleVariableOverride]  # models are frozen
    """Train low-rank updates beside weights in 4 bits: `lora`, and `model.quantize: nf4` unless that says otherwise."""


def _whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that are trained whole beside adapters, shared ones once."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith((".lora_A", ".lora_B", ".rows"))
    }


def _matched(patterns: dict[str, Any], modules: dict[str, Any], *, key: str) -> dict[str, Any]:
    """The value of the first matching pattern for each module that one matches."""
    values: dict[str, Any] = {}
    for pattern, value in patterns.items():
        compile_pattern(pattern, key=key)
        found = [name for name in modules if matches(pattern, name)]
        if not found:
            raise InputError(
                f"{pattern!r} matches none of the adapted layers", where=key, fix=f"adapted are: {available(modules)}"
            )
        for name in found:
            values.setdefault(name, value)
    return values


def _shortest_names(model: nn.Module, adapted: list[str]) -> list[str]:
    """Last components where they pick exactly the adapted layers, else whole names (PEFT accepts both)."""
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    inside = tuple(f"{name}." for name in adapted)
    picked = {
        name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in leaves and not name.startswith(inside)
    }
    return sorted(leaves) if picked == set(adapted) else sorted(adapted)


def _unreached(model: nn.Module) -> list[str]:
    """Large weights that are no linear layers, such as the experts of a mixture, get no adapter: say so."""
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if not experts:
        return []
    return [f"{len(experts)} expert weights (first: {experts[0]}) are not linear layers and get no adapter"]
