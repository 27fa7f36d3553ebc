"""Adapters that were written to a directory, by Tunesmith or by PEFT: which method they are, and loading them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.bottleneck import PEFT_TYPE as BOTTLENECK
from tunesmith.methods.bottleneck import load_bottlenecks
from tunesmith.methods.lora import Lora
from tunesmith.methods.low_rank import names_of, untie, wrap
from tunesmith.methods.method import (
    AdaptationMethod,
    freeze,
    read_adapter_config,
    refuse_adapted,
    task_head_tensors,
    train_in_fp32,
    train_task_head,
)
from tunesmith.methods.prefix import PEFT_TYPE as PREFIX
from tunesmith.methods.prefix import load_prefix
from tunesmith.methods.prompt import PEFT_TYPE as PROMPT
from tunesmith.methods.prompt import load_prompt
from tunesmith.methods.targets import exactly, matches
from tunesmith.methods.through_peft import PEFT_PREFIX, load_through_peft
from tunesmith.methods.token_rows import SUFFIX, indices_from_peft, make_room_for, train_rows

HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of PEFT's `init_lora_weights` that leave the base as it is."""


def load_adapter(model: nn.Module, directory: Path) -> AdaptationMethod:
    """Adapts ``model`` by an adapter that PEFT or Tunesmith saved, and returns its method.

    LoRA is loaded into layers of our own, those for which the file holds tensors; other kinds, and variants of LoRA
    with another arithmetic, into PEFT's.

    Raises:
        InputError: when files are missing, the adapter is of a kind or uses a variant that would be silently wrong if
            ignored, or belongs to another architecture.
    """
    config = read_adapter_config(directory)
    weights = directory / "adapter_model.safetensors"
    refuse_adapted(model)
    _refuse_unknown_variants(config, directory / "adapter_config.json")
    tensors = _read_tensors(weights)
    make_room_for(model, config, tensors)
    if config.get("peft_type") == BOTTLENECK:
        return load_bottlenecks(model, config, tensors, weights)
    if config.get("peft_type") == PREFIX:
        return load_prefix(model, config, tensors, weights)
    if config.get("peft_type") == PROMPT:
        return load_prompt(model, config, tensors, weights)
    if config.get("peft_type") != "LORA" or _peft_variants(model, config):
        return load_through_peft(model, directory, config, {f"{PEFT_PREFIX}{name}": t for name, t in tensors.items()})
    return _load_lora(model, config, tensors, weights)


def _load_lora(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], weights: Path) -> Lora:
    ranks = {
        name.rpartition(".lora_")[0]: tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith((".lora_A.weight", ".lora_embedding_A"))
    }
    below = {name: tensor for name, tensor in tensors.items() if ".base_layer." in name}
    rows = indices_from_peft(model, config)
    plain_tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(SUFFIX)}
    whole = {name: tensor for name, tensor in plain_tensors.items() if ".lora_" not in name and name not in below}
    plain = [name.replace(".base_layer.", ".") for name in (*below, *whole)]
    if unknown := sorted(set(ranks) - dict(model.named_modules()).keys() | set(plain) - model.state_dict().keys()):
        raise InputError(
            f"the adapter changes {unknown[0]}, which this model does not have",
            where=weights,
            fix=f"load it on the model it was trained on: {config.get('base_model_name_or_path')}",
        )
    _refuse_other_base(model, below, weights)
    _separate(model, whole)
    patterns = cast(dict[str, float], config.get("alpha_pattern") or {})
    usual = float(config["lora_alpha"])
    alphas = {name: next((a for key, a in patterns.items() if matches(key, name)), usual) for name in ranks}
    freeze(model)
    for name, rank in ranks.items():
        wrap(model, name, rank, alphas[name] / (math.sqrt(rank) if config.get("use_rslora") else rank), 0.0)
    heads = task_head_tensors(model)
    train_in_fp32(model, [model.get_parameter(name) for name in whole if name not in heads])
    train_task_head(model)
    if rows is not None:
        train_rows(model, rows, ranks)
    method = Lora(
        rank=config["r"],
        alpha=usual,
        dropout=config.get("lora_dropout") or 0.0,
        targets=[exactly(name) for name in ranks],
        rslora=bool(config.get("use_rslora")),
        rank_pattern={exactly(name): rank for name, rank in ranks.items() if rank != config["r"]},
        alpha_pattern={exactly(name): alpha for name, alpha in alphas.items() if alpha != usual},
        modules_to_save=sorted({exactly(name.rpartition(".")[0]) for name in whole if name not in heads}),
        trainable_tokens=None if rows is None else [*rows],
    )
    again = {name for name in whole if name != names_of(model, model.get_parameter(name))[0]}
    trained = {f"{PEFT_PREFIX}{name}": tensors[name] for name in tensors.keys() - below.keys() - again}
    method.load_trained(model, trained, where=weights)
    return method


def _read_tensors(weights: Path) -> dict[str, Tensor]:
    """The file's tensors under the names that their modules have in the model."""
    try:
        return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in load_file(weights).items()}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot read the adapter's weights: {error}", where=weights) from error


def _refuse_other_base(model: nn.Module, below: dict[str, Tensor], where: Path) -> None:
    """PEFT saves the embeddings below an adapter along with it; they must be those of this model."""
    for name, saved in below.items():
        own = model.get_parameter(name.replace(".base_layer.", "."))
        narrow = min((own.dtype, saved.dtype), key=lambda dtype: dtype.itemsize)
        if own.shape != saved.shape or not torch.equal(own.detach().cpu().to(narrow), saved.to(narrow)):
            raise InputError(
                f"the adapter was trained over another {name.partition('.base_layer.')[0]} than this model has "
                f"(its shape is {list(saved.shape)}, here {list(own.shape)})",
                where=where,
                fix="merge it with PEFT, which keeps the changed weights in the adapter's file",
            )


def _separate(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Gives modules that share a weight in the base, but not in the adapter, weights of their own."""
    for name, saved in whole.items():
        sharing = names_of(model, model.get_parameter(name))
        if any(other not in whole or not torch.equal(whole[other], saved) for other in sharing):
            untie(model, name)


def _refuse_unknown_variants(config: dict[str, Any], path: Path) -> None:
    changes_the_pass = ["layer_replication", "alora_invocation_tokens", "arrow_config", "monteclora_config"]
    used = [name for name in changes_the_pass if config.get(name)]
    if config.get("peft_type") == "LORA" and config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise InputError(
            f"the adapter uses {', '.join(used)}, which is not supported yet",
            where=path,
            fix="merge it with PEFT, or train it again without that variant",
        )


def _peft_variants(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """What an adapter uses that only PEFT's own layers compute."""
    changes_arithmetic = [
        "use_dora",
        "lora_bias",
        "target_parameters",
        "use_qalora",
        "use_bdlora",
        "velora_config",
        "kasa_config",
    ]
    used = [name for name in changes_arithmetic if config.get(name)]
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:  # it changes the base weights too
        used.append("init_lora_weights")
    if config.get("trainable_token_indices") and indices_from_peft(model, config) is None:
        used.append("trainable_token_indices")
    return used
