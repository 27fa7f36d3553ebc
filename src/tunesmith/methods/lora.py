"""LoRA (Hu et al. 2021, equation 3): W x + (alpha / rank) B A x, with W frozen.

Saved as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.base import InputError, nearest
from tunesmith.methods.method import AdaptationMethod, freeze, make_trainable, read_adapter_config
from tunesmith.methods.targets import available, compile_pattern, linear_modules, matches, select_modules

PEFT_PREFIX = "base_model.model."


class LoraLayer(nn.Module):
    """A frozen layer with a trained low-rank update beside it.

    Attributes:
        base: the frozen layer as it was found (plain, fused or quantized).
        lora_A: fp32 ``[rank, in_features]``; lora_B: fp32 ``[out_features, rank]``.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    suffixes: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        in_features, out_features = _features(base)
        device = cast(Tensor, base.weight).device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some architectures look at its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.base(hidden)
        low_rank = F.linear(self.dropout(hidden), self.lora_A.to(hidden.dtype)) * self.scale  # [..., rank]
        update = low_rank.reshape(-1, low_rank.shape[-1])
        # One fused product and sum: a separate sum would pass over the whole output once more.
        flat = torch.addmm(output.reshape(-1, output.shape[-1]), update, self.lora_B.to(output.dtype).T)
        return flat.view(output.shape)

    def delta(self) -> Tensor:
        """The update of the weight in fp32, laid out as the base's weight."""
        update = (self.lora_B @ self.lora_A) * self.scale
        return update.T if isinstance(self.base, Conv1D) else update


class LoraEmbedding(LoraLayer):
    """LoRA of an embedding table: lora_A ``[rank, vocabulary]``, lora_B ``[dimension, rank]``, as PEFT has it."""

    suffixes: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank, scale, dropout)
        # PEFT starts an embedding's A at zero and B at random, so that only rows of seen tokens ever move.
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, hidden: Tensor) -> Tensor:
        token_ids = hidden
        output = self.base(token_ids)
        low_rank = F.embedding(token_ids, self.lora_A.T)  # [..., rank]
        scale = self.scale * getattr(self.base, "embed_scale", 1.0)  # Gemma scales what the table returns
        return output + (F.linear(low_rank, self.lora_B) * scale).to(output.dtype)

    def delta(self) -> Tensor:
        return (self.lora_B @ self.lora_A).T * self.scale


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
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapters and saved with them, such as `embed_tokens` and `lm_head` when tokens
    were added. Tied weights stay tied."""

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 2e-4

    def adapt(self, model: nn.Module) -> list[str]:
        chosen = select_modules(model, self.targets, key="method.targets")
        whole = self._modules_to_save(model, chosen)
        ranks = _matched(self.rank_pattern, chosen, key="method.rank_pattern")
        alphas = _matched(self.alpha_pattern, chosen, key="method.alpha_pattern")
        freeze(model)
        for name in chosen:
            rank, alpha = int(ranks.get(name, self.rank)), alphas.get(name, self.alpha)
            scale = alpha / (math.sqrt(rank) if self.rslora else rank)
            wrap(model, name, rank, scale, self.dropout)
        for module in whole.values():
            for parameter in module.parameters():
                make_trainable(parameter)
        return _unreached(model)

    def _modules_to_save(self, model: nn.Module, adapted: dict[str, nn.Module]) -> dict[str, nn.Module]:
        whole: dict[str, nn.Module] = {}
        for pattern in self.modules_to_save:
            compile_pattern(pattern, key="method.modules_to_save")
            found = {name: module for name, module in model.named_modules() if name and matches(pattern, name)}
            if not found:
                leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
                raise InputError(
                    f"{pattern!r} matches no module" + nearest(pattern, [n.rsplit(".", 1)[-1] for n in leaves]),
                    where="method.modules_to_save",
                    fix=f"this model has: {available(leaves)}",
                )
            if both := sorted(found.keys() & adapted.keys()):
                raise InputError(
                    f"{both[0]} is a target of the adapter already",
                    where="method.modules_to_save",
                    fix="train a module whole or with an adapter, not both",
                )
            whole.update(found)
        return whole

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained_tensors(model).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(self._peft_config(model, base), indent=2) + "\n"
        (directory / "adapter_config.json").write_text(config, encoding="utf-8")

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, layer in lora_layers(model).items():
            for suffix, parameter in zip(layer.suffixes, (layer.lora_A, layer.lora_B), strict=True):
                tensors[f"{PEFT_PREFIX}{name}.{suffix}"] = parameter
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith((".lora_A", ".lora_B")):
                tensors[f"{PEFT_PREFIX}{name}"] = parameter
        return tensors

    def _peft_config(self, model: nn.Module, base: str) -> dict[str, Any]:
        """The settings PEFT needs to rebuild exactly these layers, whatever its own presets mean."""
        layers = lora_layers(model)
        ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items() if layer.lora_A.shape[0] != self.rank}
        alphas = _matched(self.alpha_pattern, layers, key="method.alpha_pattern")
        convolutions = [isinstance(layer.base, Conv1D) for layer in layers.values()]
        whole = sorted(
            {
                name.rpartition(".")[0]
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and not name.endswith((".lora_A", ".lora_B"))
            }
        )
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _shortest_names(model, list(layers)),
            "rank_pattern": {f"^{_escaped(name)}": rank for name, rank in ranks.items()},
            "alpha_pattern": {f"^{_escaped(name)}": alpha for name, alpha in alphas.items()},
            "use_rslora": self.rslora,
            "bias": "none",
            "fan_in_fan_out": all(convolutions),
            "init_lora_weights": True,
            "modules_to_save": whole or None,
            "ensure_weight_tying": bool(whole) and _ties_embeddings(model),
        }


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def wrap(model: nn.Module, name: str, rank: int, scale: float, dropout: float) -> None:
    """Puts a LoRA layer in the place of the module ``name``."""
    parent_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    layer = LoraEmbedding if isinstance(module, nn.Embedding) else LoraLayer
    setattr(model.get_submodule(parent_name), leaf, layer(module, rank, scale, dropout))


def merge_layers(model: nn.Module) -> int:
    """Folds every LoRA layer into the weight beside it and puts the plain layer back.

    A weight that another module shares (a tied head) is first given a copy of its own, so that only the adapted
    module changes. Quantized weights cannot take an update; merge into the unquantized base instead.

    Returns:
        Number of layers merged.
    """
    layers = lora_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            base = layer.base
            weight = cast(nn.Parameter, base.weight)
            if not weight.is_floating_point():
                raise InputError(f"{name} is quantized and cannot take a merged update", where="model.quantize")
            merged = weight.float() + layer.delta()
            if _is_shared(model, weight, base):
                base.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
                cast(Any, model).config.tie_word_embeddings = False
            else:
                weight.copy_(merged)
            parent_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent_name), leaf, base)
    return len(layers)


def load_adapter(model: nn.Module, directory: Path) -> Lora:
    """Adapts ``model`` by a LoRA that PEFT or Tunesmith saved, and returns its method.

    The layers are those for which the file holds tensors; PEFT's own target rules are not needed.

    Raises:
        InputError: when files are missing, the adapter is of another kind, uses variants of LoRA that would be
            silently wrong if ignored, or belongs to another architecture.
    """
    config = read_adapter_config(directory)
    weights = directory / "adapter_model.safetensors"
    _refuse_unknown_variants(config, directory / "adapter_config.json")
    try:
        tensors = load_file(weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot read the adapter's weights: {error}", where=weights) from error
    names = {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in tensors.items()}
    ranks = {
        name.rpartition(".lora_")[0]: shape[0]
        for name, shape in names.items()
        if name.endswith(("lora_A.weight", "lora_embedding_A"))
    }
    modules = {name for name, _ in model.named_modules()}
    if unknown := sorted(ranks.keys() - modules):
        raise InputError(
            f"the adapter changes {unknown[0]}, which this model does not have",
            where=weights,
            fix=f"load it on the model it was trained on: {config.get('base_model_name_or_path')}",
        )
    freeze(model)
    alphas = cast(dict[str, float], config.get("alpha_pattern") or {})
    for name, rank in ranks.items():
        alpha = next((value for pattern, value in alphas.items() if matches(pattern, name)), config["lora_alpha"])
        wrap(model, name, rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), 0.0)
    for name in names:
        if ".lora_" not in name:
            make_trainable(model.get_parameter(name))
    method = Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=[_escaped(name) for name in ranks],
        rslora=bool(config.get("use_rslora")),
        alpha_pattern=alphas,
    )
    method.load_trained(model, tensors, where=weights)
    return method


def _refuse_unknown_variants(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"the adapter is of kind {config.get('peft_type')!r}; only LORA can be loaded", where=path)
    changes_arithmetic = [
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
        "layer_replication",
        "target_parameters",
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "velora_config",
        "monteclora_config",
        "kasa_config",
        "arrow_config",
    ]
    used = [name for name in changes_arithmetic if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise InputError(
            f"the adapter uses {', '.join(used)}, which is not supported yet",
            where=path,
            fix="merge it with PEFT, or train it again without that variant",
        )


def _features(base: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer; vocabulary and dimension of an embedding."""
    if isinstance(base, Conv1D):
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    linear = cast(nn.Linear, base)
    return linear.in_features, linear.out_features


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
    present = {
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) or (name in linear_modules(model) and not name.endswith(".base"))
    }
    picked = {name for name in present if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves) if picked == set(adapted) else sorted(adapted)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _is_shared(model: nn.Module, weight: nn.Parameter, owner: nn.Module) -> bool:
    return any(
        module is not owner and getattr(module, "weight", None) is weight
        for module in model.modules()
        if not isinstance(module, LoraLayer)
    )


def _ties_embeddings(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _unreached(model: nn.Module) -> list[str]:
    """Large weights that are no linear layers, such as the experts of a mixture, get no adapter: say so."""
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if not experts:
        return []
    return [f"{len(experts)} expert weights (first: {experts[0]}) are not linear layers and get no adapter"]
