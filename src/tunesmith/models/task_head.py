"""Heads that judge instead of write: one output a row or a token, on any trunk that transformers has."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.batch import Batch
from tunesmith.models.forward import hidden_at
from tunesmith.models.sentence_settings import POOLING_FILE, SentenceSettings, read_sentence_settings

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
"""Names of transformers' `problem_type`."""
Pooling = Literal["auto", "pooler", "cls", "mean", "last"]
HEAD_FILE = "head_config.json"
CONFIG_FILE = "config.json"
HEAD_MODULES = ("score", "classifier", "classification_head", "logits_proj", "pre_classifier", "pooler", "head")
"""What transformers calls modules behind a trunk: they are never quantized."""
HEADS = ("score", "classifier", "classification_head", "logits_proj")
"""What transformers calls the layer that gives the outputs."""


@dataclass(frozen=True)
class TaskHead:
    """What a model is asked for besides text.

    Attributes:
        kind: one output a row, or one a token.
        labels: their names in the order of the outputs; one for a number.
        problem: what the outputs mean.
        pooling: what of a row the head reads: what the trunk's own pooler makes of the first token, the first or the
            last token, or the mean of all; `auto` is what the model was made for.
        layer: hidden states behind this many blocks instead of the last ones.
        asks: whether it is given a bare text, or a conversation in the tokenizer's chat template.
    """

    kind: Literal["sequence", "token"]
    labels: tuple[str, ...]
    problem: Problem = "single_label_classification"
    pooling: Pooling = "auto"
    layer: int | None = None
    asks: Literal["text", "conversation"] = "text"

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / HEAD_FILE).write_text(text + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any]:
        """What transformers' configurations say of it."""
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: at for at, label in enumerate(self.labels)},
            "problem_type": self.problem if self.kind == "sequence" else None,
        }


def saved_head(directory: Path) -> TaskHead | None:
    """The head of a saved model or adapter: what Tunesmith wrote of it, or what transformers' configuration says."""
    try:
        found = json.loads((directory / HEAD_FILE).read_text(encoding="utf-8"))
        return TaskHead(**{**found, "labels": tuple(found["labels"])})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read the settings of the head: {error}", where=directory / HEAD_FILE) from error
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        name = next(iter(config.get("architectures") or [""]), "")
    except (FileNotFoundError, NotADirectoryError):  # a hub id, or an adapter: no head that is saved there
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot read the model's configuration: {error}", where=directory / CONFIG_FILE) from error
    kind = next((kind for kind, suffix in _CLASSES.items() if name.endswith(suffix)), None)
    if kind is None:
        return None
    labels = config.get("id2label") or {str(at): f"LABEL_{at}" for at in range(config.get("num_labels", 2))}
    names = tuple(labels[key] for key in sorted(labels, key=int))
    problem = config.get("problem_type") or ("regression" if len(names) == 1 else "single_label_classification")
    return TaskHead(cast(Any, kind), names, problem)


_CLASSES = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}


_HEADS: WeakKeyDictionary[nn.Module, TaskHead] = WeakKeyDictionary()


def head_of(model: nn.Module) -> TaskHead | None:
    """The head that a model was loaded with, its pooling settled."""
    return _HEADS.get(model)


def remember_head(model: nn.Module, head: TaskHead) -> None:
    _HEADS[model] = head


def model_class(head: TaskHead | None) -> Any:
    """transformers' class that builds a trunk with such a head."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if head is None:
        return AutoModelForCausalLM
    return AutoModelForSequenceClassification if head.kind == "sequence" else AutoModelForTokenClassification


def has_task_head(model: nn.Module) -> bool:
    return type(model).__name__.endswith(tuple(_CLASSES.values()))


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules with weights that stand behind the trunk; none in a model that writes text."""
    if not has_task_head(model):
        return []
    trunk = cast(Any, model).base_model
    return [
        name for name, child in model.named_children() if child is not trunk and any(True for _ in child.parameters())
    ]


def draw_anew(module: nn.Module, spread: float) -> None:
    """Draws the linear layers of a head from a normal distribution of that standard deviation, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=spread)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def looks_back_only(model: nn.Module) -> bool:
    """Whether a token sees only those before it."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


@dataclass(frozen=True)
class SettledPooling:
    """What `auto` is for a model, why, and what could not be found out about it."""

    pooling: Pooling
    why: str
    note: str | None = None


def settled_pooling(
    head: TaskHead, model: nn.Module, missing: list[str], location: str, revision: str | None
) -> SettledPooling:
    """What the head reads of a row.

    Args:
        missing: names of weights that the model's files lack.
        location: directory or hub id of those files.
    """
    if head.pooling != "auto":
        if head.pooling == "pooler" and getattr(cast(Any, model).base_model, "pooler", None) is None:
            raise InputError("this model has no pooler", where="objective.pooling", fix="use cls, mean or last")
        return SettledPooling(head.pooling, "as the recipe says")
    said = SentenceSettings() if head.kind == "token" else read_sentence_settings(location, revision)
    if said.pooling is not None:
        return SettledPooling(said.pooling, "as the model's own settings for sentences say")
    pooling, why = _pooling_of_the_architecture(head, model, missing)
    if said.unknown is None or pooling == "last":
        return SettledPooling(pooling, why)
    note = f"whether the model has settings of its own for sentences ({POOLING_FILE}) is not known: {said.unknown}"
    return SettledPooling(pooling, why, f"{note}; pooling is {pooling}, and objective.pooling chooses another")


def _pooling_of_the_architecture(head: TaskHead, model: nn.Module, missing: list[str]) -> tuple[Pooling, str]:
    if looks_back_only(model):
        return "last", "only the last token has seen the whole row"
    trunk = cast(Any, model).base_model
    if getattr(trunk, "pooler", None) is not None and head.layer is None:
        if any(".pooler." in name or name.startswith("pooler.") for name in missing):
            return "mean", "the model's files have no weights for its pooler"
        return "pooler", "the model's own pooler"
    return "cls", "the token that the model puts before every row"


def row_features(model: nn.Module, batch: Batch, head: TaskHead) -> Tensor:
    """What the head reads of each row, ``[rows, width]``.

    Args:
        head: with its pooling settled.
    """
    device = batch.token_ids.device
    starts, lengths = batch.segments[:, 0], batch.segments[:, 1]
    if head.pooling == "mean":
        total = int(lengths.sum())
        hidden = hidden_at(model, batch, torch.arange(total, device=device), head.layer)
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
        sums = torch.zeros(len(lengths), hidden.shape[1], device=device).index_add(0, row, hidden.float())
        return sums / lengths.to(device)[:, None]
    places = starts + lengths - 1 if head.pooling == "last" else starts
    hidden = hidden_at(model, batch, places.to(device), head.layer)
    return cast(Any, model).base_model.pooler(hidden[:, None]) if head.pooling == "pooler" else hidden


def token_features(model: nn.Module, batch: Batch, positions: Tensor, head: TaskHead) -> Tensor:
    """What the head reads at ``positions``, ``[n, width]``."""
    return hidden_at(model, batch, positions, head.layer)


def outputs_of(model: nn.Module, features: Tensor) -> Tensor:
    """What the head makes of ``[n, width]`` features: fp32 ``[n, labels]``.

    The head computes in fp32 whatever the trunk does: it is small, and its outputs decide.
    """
    parts = cast(Any, model)
    with torch.autocast(features.device.type, enabled=False):
        states = features.float()
        if (pooler := getattr(parts, "pooler", None)) is not None:  # DeBERTa's stands outside of its trunk
            states = pooler(states[:, None])
        if (between := getattr(parts, "head", None)) is not None:  # ModernBERT
            states = between(states)
        if (between := getattr(parts, "pre_classifier", None)) is not None:  # DistilBERT
            states = torch.relu(between(states))
        for name in ("dropout", "drop"):
            if isinstance(dropout := getattr(parts, name, None), nn.Dropout):
                states = dropout(states)
        last = next((getattr(parts, name) for name in HEADS if hasattr(parts, name)), None)
        if last is None:
            raise InputError(f"where the head of a {type(model).__name__} is, is not known", where="model.path")
        linear = isinstance(getattr(last, "original_module", last), nn.Linear)
        # What is no plain layer takes the states of a whole row and reads the first (RoBERTa, ELECTRA).
        return last(states) if linear else last(states[:, None])


def refuse_another_head(model: nn.Module, head: TaskHead) -> None:
    """Raises InputError when `row_features` and `outputs_of` are not what the model's own forward pass computes.

    A model that is saved for others must mean the same to them; with a pooling of one's own it cannot.
    """
    own: Pooling = "pooler" if getattr(cast(Any, model).base_model, "pooler", None) is not None else "cls"
    own = "last" if looks_back_only(model) else own
    if head.kind == "sequence" and (head.pooling != own or head.layer is not None):
        return
    from tunesmith.batch import Example, pack
    from tunesmith.models.attention import as_transformers_runs_it

    device = next(model.parameters()).device
    ids = torch.arange(5, 14, device=device)
    batch = pack([Example(ids.cpu())], layout="padded").to(device)
    dtype = cast(Any, model).base_model.dtype
    exact = dtype == torch.float32
    with torch.no_grad(), as_transformers_runs_it(model):
        with torch.autocast(device.type, dtype=dtype, enabled=not exact):  # the head alone is in fp32 already
            expected = model(input_ids=ids[None]).logits[0].float()
        if head.kind == "sequence":
            found = outputs_of(model, row_features(model, batch, head))[0]
        else:
            found = outputs_of(model, token_features(model, batch, torch.arange(9, device=device), head))
    scale = expected.norm().clamp_min(1e-12)
    if float((found - expected).norm() / scale) > (1e-3 if exact else 5e-2):
        raise InputError(
            f"the head of a {type(model).__name__} is laid out in a way that is not known",
            where="model.path",
            fix="use objective.pooling: mean, or another model",
        )
