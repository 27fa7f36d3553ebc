"""Rows of preferences: their renderer, and what an objective over single answers puts beside them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.data.prepare import Prepared
from tunesmith.data.render import Renderer
from tunesmith.data.render_pairs import AnswerRenderer, PairRenderer, RewardRenderer, refuse_settings_of_imitation
from tunesmith.data.spec import DataSpec
from tunesmith.models.task_head import looks_back_only
from tunesmith.objectives import Pairwise, Preference, Reward


def preference_renderer(
    objective: Preference | Reward, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]
) -> PairRenderer:
    """The renderer of a recipe's `data` section for an objective over preferences.

    Raises:
        InputError: for settings that only answers to imitate have.
    """
    refuse_settings_of_imitation(spec)
    single = Renderer.of(spec.model_copy(update={"train_on": "last-answer"}), tokenizer, stop_ids)
    if isinstance(objective, Reward):
        return RewardRenderer(single)
    return PairRenderer(single) if isinstance(objective, Pairwise) else AnswerRenderer(single)


def refuse_encoder(trunk: nn.Module) -> None:
    """Raises InputError for a model in which a prompt sees the answers behind it."""
    if not looks_back_only(trunk):
        raise InputError(
            "a reward is read behind an answer, and tokens of this model see what follows them",
            where="objective.kind",
            fix="use a causal language model",
        )


def with_partners(prepared: Prepared, objective: Preference, limit: int) -> Prepared:
    """Rows of single answers with the answers of other rows behind their prompts, from which a baseline is measured."""
    if isinstance(objective, Pairwise):
        return prepared
    parts = {name: getattr(prepared, name) for name in ("train", "validation")}
    return replace(prepared, **{name: rows.with_partners(limit) for name, rows in parts.items() if len(rows)})
