"""Penalties for leaving the base, beside any objective: what it says there (KL) and how far the weights have gone (L2).

Both are terms of their own, each divided by its own weights, so that they do not depend on how a step is split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.batch import Batch
from tunesmith.methods import trainable_parameters
from tunesmith.methods.adapted import without_adapter
from tunesmith.methods.low_rank import LoraLayer, lora_layers
from tunesmith.models.embeddings import vocabulary_rows
from tunesmith.models.forward import hidden_at, likeliest_next
from tunesmith.models.head import divergences, has_plain_head
from tunesmith.models.noise import NOISE
from tunesmith.models.projection import projection_of
from tunesmith.objectives import AroundObjective, NextToken, StepObjective
from tunesmith.objectives.distill import kl
from tunesmith.objectives.logps import token_outcomes
from tunesmith.recipe import Recipe, TrainSpec

NO_SHARD = "leave train.shard out, or remove the penalty"
OTHER_START = "use method.init: kaiming"
TAKEN_OFF_THE_BASE = ("pissa", "olora")
REPLAYED = "replayed"
"""Tensor of a batch: fp32, one entry a target: 1 where the row is replayed, else 0."""
KL, L2 = "kl_to_base", "l2_to_base"
BASE_TOKENS, BASE_LOGPS = "base_tokens", "base_logps"
"""Tensors of a batch with what the base found likeliest at each target: int32 ``[targets, k]``, and fp32
``[targets, k + 1]`` in nats, with all other tokens together in the last column."""
KEPT_TOKENS = 64
"""k of those, as of a teacher."""


def refuse_unreachable_base(recipe: Recipe) -> None:
    """Raises InputError when a penalty is asked for that this method or objective cannot have."""
    train, method = recipe.train, recipe.method
    for key, asked in (("train.kl_to_base", train.kl_to_base), ("train.l2_to_base", train.l2_to_base)):
        if asked and train.shard:
            raise InputError("weights that are spread over processes are not there as a whole", where=key, fix=NO_SHARD)
        if asked and getattr(method, "init", "") == "loftq":
            raise InputError("an adapter that starts by LoftQ does not start at the base", where=key, fix=OTHER_START)
    if train.kl_on == "replay":
        if not train.kl_to_base:
            raise InputError("there is no penalty to apply there", where="train.kl_on", fix="set train.kl_to_base")
        if recipe.data.replay is None:
            raise InputError("no rows are replayed", where="train.kl_on", fix="set data.replay, or kl_on: targets")
    if not train.kl_to_base:
        return
    if not isinstance(recipe.objective, NextToken):
        raise InputError(
            f"objective.kind: {recipe.objective.kind} has no divergence from the base beside its own loss",
            where="train.kl_to_base",
            fix="remove it; it is for sft and pretrain",
        )
    if base_is_kept(recipe) and recipe.budget.memory is not None:
        raise InputError(
            f"{method.kind} changes the base itself, and what it says would have to be kept before training, for which "
            "the whole model must be in memory",
            where="train.kl_to_base",
            fix="leave budget.memory out, or use a plain adapter (lora)",
        )


def base_is_kept(recipe: Recipe) -> bool:
    """Whether what the base says of the rows must be kept before training, because it is not there any longer then."""
    method = recipe.method
    changes = method.saved_as != "adapter" or bool(getattr(method, "modules_to_save", []))
    return recipe.train.kl_to_base > 0 and (changes or getattr(method, "init", "") in TAKEN_OFF_THE_BASE)


def said_by_base(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the model, which is the base still, finds likely at the targets: `BASE_TOKENS` and `BASE_LOGPS`."""
    chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    rows = vocabulary_rows(model)
    tokens, logps = likeliest_next(model, batch, batch.before(chosen), KEPT_TOKENS, 1.0, rows)
    return {BASE_TOKENS: tokens.int(), BASE_LOGPS: logps}


def refuse_other_heads(model: nn.Module) -> None:
    """Raises InputError when the divergence cannot be computed from the last hidden states by one frozen product."""
    layer = cast(Any, model).get_output_embeddings()
    head = projection_of(layer)
    plain = head is not None and isinstance(head.weight, Tensor) and head.bias is None and has_plain_head(model)
    if not plain:
        raise InputError(
            f"the output layer of a {type(model).__name__} does more than one product",
            where="train.kl_to_base",
            fix="use train.l2_to_base or data.replay instead",
        )
    if head is not None and (head.update is not None or cast(Tensor, head.weight).requires_grad):
        raise InputError(
            "the output layer is trained itself, so the base's is not there to compare with",
            where="train.kl_to_base",
            fix="leave lm_head out of method.targets and trainable tokens, or use train.l2_to_base",
        )


class NearBase(AroundObjective):
    """An objective with a penalty for leaving the base.

    - KL (`train.kl_to_base`): KL(base || model) at the targets, in the mean over them: the old model's answers are soft
      targets (Li & Hoiem 2016, Learning without Forgetting, equation 2, at temperature 1). The base is this model with
      its adapter off, so there is no second one in memory. Where a method changes the base itself, rows carry what it
      said before training, and the divergence is that of a choice among its likeliest tokens and the rest together,
      which is never more than that of the whole vocabulary.
    - L2 (`train.l2_to_base`): half the squared distance of the trained weights from where they started (Li et al. 2018,
      L2-SP, equation 2); for LoRA the squared norm of its update of each weight.

    Args:
        objective: what is minimised besides.
        model: adapted, at its start.
    """

    def __init__(self, objective: StepObjective, model: nn.Module, spec: TrainSpec) -> None:
        super().__init__(objective)
        self._kl, self._l2, self._on = spec.kl_to_base, spec.l2_to_base, spec.kl_on
        self.terms = (*objective.terms, *((KL,) if self._kl else ()), *((L2,) if self._l2 else ()))
        self._start = _Start(model) if self._l2 else None

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        found = super().weights(batch)
        if self._kl:
            found = {**found, KL: self._counted(batch).double().sum()}
        if self._l2:
            found = {**found, L2: torch.ones((), dtype=torch.float64, device=batch.token_ids.device)}
        return found

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        counted = self._counted(batch) if self._kl else None
        further = {}
        if self._start is not None:
            further[L2] = self._l2 / 2 * self._start.squared_distance(model)
        if counted is None:
            return {**super().loss(model, batch), **further}
        if not counted.any():
            return {**super().loss(model, batch), **further, KL: counted.sum()}
        chosen = torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
        if BASE_LOGPS in batch.tensors:
            return {**self._near_kept(model, batch, chosen, counted), **further}
        places = batch.before(chosen)
        other = _states_of_base(model, batch, places)
        hidden = hidden_at(model, batch, places)  # once, for the objective too
        read = replace(
            batch,
            tensors={**batch.tensors, "features": hidden},
            scopes={**batch.scopes, "features": "target"},
        )
        at = torch.nonzero(counted).squeeze(1)
        found = (divergences(hidden[at], other[at], _head(model)) * counted[at]).sum()
        return {**super().loss(model, read), **further, KL: self._kl * found}

    def _near_kept(self, model: nn.Module, batch: Batch, chosen: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """The objective's own terms, and the divergence from what the base had said."""
        if has_plain_head(model):  # the trunk runs once for both
            hidden = hidden_at(model, batch, batch.before(chosen))
            tensors, scopes = {**batch.tensors, "features": hidden}, {**batch.scopes, "features": "target"}
            batch = replace(batch, tensors=tensors, scopes=cast(Any, scopes))
        found = token_outcomes(model, batch, batch.tensors[BASE_TOKENS].long(), 1.0).outcomes
        divergence = kl(batch.tensors[BASE_LOGPS], found)
        return {**super().loss(model, batch), KL: self._kl * (divergence * counted).sum()}

    def _counted(self, batch: Batch) -> Tensor:
        """What the divergence at each target counts, fp32 ``[targets]``."""
        weights = batch.tensors["target_weights"]
        counted = (weights[weights > 0] > 0).float()
        return counted * batch.tensors[REPLAYED] if self._on == "replay" else counted


def _head(model: nn.Module) -> Tensor:
    head = projection_of(cast(Any, model).get_output_embeddings())
    assert head is not None and isinstance(head.weight, Tensor)
    return head.weight


def _states_of_base(model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
    """What the head reads of the base at ``places``, ``[n, width]``, without noise and dropout."""
    kept = {name: tensor for name, tensor in batch.tensors.items() if name != NOISE}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_adapter(model):
            return hidden_at(model, replace(batch, tensors=kept), places)
    finally:
        model.train(was_training)


class _Start:
    """Where the trained weights began; LoRA's updates begin at zero and need no copy."""

    def __init__(self, model: nn.Module) -> None:
        inside = {id(weight) for layer in lora_layers(model).values() for weight in (layer.lora_A, layer.lora_B)}
        self._start = {
            name: weight.detach().clone()
            for name, weight in trainable_parameters(model).items()
            if id(weight) not in inside
        }

    def squared_distance(self, model: nn.Module) -> Tensor:
        """Squared L2 distance of all trained weights from their start, fp32 scalar."""
        own = dict(model.named_parameters())
        parts = [(own[name].float() - start).square().sum() for name, start in self._start.items()]
        parts += [_squared_norm(layer) for layer in lora_layers(model).values()]
        return torch.stack(parts).sum()


def _squared_norm(layer: LoraLayer) -> Tensor:
    """||scale B A||^2 = scale^2 tr((B^T B) (A A^T)), without the product's size in memory."""
    return layer.scale**2 * ((layer.lora_B.T @ layer.lora_B) * (layer.lora_A @ layer.lora_A.T)).sum()
