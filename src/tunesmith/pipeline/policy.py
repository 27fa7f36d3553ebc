"""What a job that trains on its own answers has of its own: its rows, its metrics, its batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.data.prepare import Prepared
from tunesmith.data.record import RowErrors
from tunesmith.data.render import Renderer
from tunesmith.data.render_prompts import PromptRenderer
from tunesmith.data.spec import DataSpec
from tunesmith.evaluation.compare import PERPLEXITY, REWARD
from tunesmith.methods import Lora
from tunesmith.methods.adapted import without_adapter
from tunesmith.metrics import metric
from tunesmith.models.value_head import add_value_head, value_head
from tunesmith.objectives import Policy
from tunesmith.pipeline.rewards import references_of
from tunesmith.plan.memory import BYTES
from tunesmith.recipe import Recipe
from tunesmith.recipe_limits import DAMAGE
from tunesmith.resolved import Plan, Workload
from tunesmith.train.checkpoint import Beside
from tunesmith.train.rollout_server import ServedAnswers
from tunesmith.train.rollouts import Rollouts

if TYPE_CHECKING:
    from tunesmith.pipeline.planning import Planned

_HEAD = "value_head."


def prompt_renderer(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> PromptRenderer:
    """The renderer of a recipe's `data` section for prompts that the model answers.

    Raises:
        InputError: for settings that only given answers have.
    """
    given = DataSpec(train="")
    for name in ("train_on", "answer_after"):
        if getattr(spec, name) != getattr(given, name):
            raise InputError("is about given answers, and this model gives its own", where=f"data.{name}")
    return PromptRenderer(Renderer.of(spec, tokenizer, stop_ids))


def refuse_unfit_recipe(recipe: Recipe, objective: Policy) -> None:
    """Raises InputError for settings that drawing answers does not go with, and for unknown metrics."""
    policy_metrics(recipe)
    if recipe.method.trunk_is_frozen:
        raise InputError(
            "it learns from what the frozen model made of given rows, and answers are drawn anew at every step",
            where="method.kind",
            fix="use lora or full",
        )
    if recipe.budget.memory is not None:
        raise InputError(
            "each token of an answer would read the whole model", where="budget.memory", fix="leave it out"
        )
    refuse_spread_weights(recipe)
    if objective.rollouts is not None:
        _refuse_unserved_method(recipe)
    if recipe.train.kl_to_base:
        raise InputError("objective.kl holds a policy near its base", where="train.kl_to_base", fix="use objective.kl")


def refuse_spread_weights(recipe: Recipe) -> None:
    """Raises InputError where a model that answers between steps has its weights spread over processes."""
    if recipe.train.shard:
        raise InputError(
            "answers cannot be drawn from weights that are spread over processes",
            where="train.shard",
            fix="leave it out; a quantized base (model.quantize) takes less memory",
        )


def _refuse_unserved_method(recipe: Recipe) -> None:
    """Raises InputError for adapters that vLLM does not load while it runs."""
    method = recipe.method
    fix = "use plain lora, or leave objective.rollouts out"
    if not isinstance(method, Lora):
        raise InputError(
            f"vLLM takes new weights as LoRA's adapters, and this is {method.kind}", where="method.kind", fix=fix
        )
    plain = Lora()
    for name in ("dora", "init", "modules_to_save", "trainable_tokens", "rank_pattern", "alpha_pattern"):
        if getattr(method, name) != getattr(plain, name):
            raise InputError("vLLM does not load such an adapter while it runs", where=f"method.{name}", fix=fix)
    if method.quantization_aware != plain.quantization_aware:
        raise InputError(
            "vLLM adds the update to the base without rounding it", where="method.quantization_aware", fix=fix
        )


def refuse_unfit_prompts(prepared: Prepared, recipe: Recipe, objective: Policy, limit: int) -> None:
    """Raises InputError, naming every row, where answers cannot be scored or do not fit behind their prompts.

    Args:
        limit: positions of the model, in tokens.
    """
    comparing = [reward.kind for reward in objective.reward if reward.needs_reference]
    errors = RowErrors()
    for rows in (prepared.train, prepared.validation, prepared.test):
        for at, row in enumerate(rows.sources()):
            if comparing and not references_of(row):
                errors.add(row.source, f"there is no reference answer, with which the reward {comparing[0]} compares")
            if int(rows.lengths[at]) + objective.max_new_tokens > limit:
                errors.add(
                    row.source,
                    f"the prompt has {int(rows.lengths[at])} tokens, and {objective.max_new_tokens} more do not fit "
                    f"into the model's {limit} positions",
                )
    errors.raise_any(
        "give a reference in the column 'completion', lower objective.max_new_tokens, or leave these rows out"
    )
    asked = [] if recipe.evaluate == "off" else recipe.evaluate.metric_names
    comparing = [name for name in ([] if isinstance(asked, str) else asked) if name != REWARD]
    missing = next((row for row in prepared.test.sources() if not references_of(row)), None)
    if comparing and missing is not None:
        raise InputError(
            f"{comparing[0]} compares with reference answers, and {missing.source} has none",
            where="evaluate.metrics",
            fix="judge by reward alone",
        )


def policy_metrics(recipe: Recipe) -> tuple[list[str], str]:
    """The metrics of a model that is rewarded, the deciding one first, and why.

    Raises:
        InputError: for an unknown name, and for perplexity.
    """
    asked = "auto" if recipe.evaluate == "off" else recipe.evaluate.metric_names
    own = set() if recipe.evaluate == "off" else {one.name for one in recipe.evaluate.own_metrics}
    names = [REWARD] if isinstance(asked, str) else list(dict.fromkeys([*asked, REWARD]))
    names += [name for name in recipe.gate if name not in (*names, *DAMAGE)]
    for name in names:
        place = f"gate.{name}" if name in recipe.gate else "evaluate.metrics"
        if name == PERPLEXITY:
            raise InputError("a model that gives its own answers is judged by them", where=place, fix="use reward")
        if name != REWARD and name not in own:
            try:
                metric(name)
            except InputError as error:
                raise InputError(error.what, where=place, fix=f"{error.fix}, {REWARD}") from error
    return names, "what it is trained for" if isinstance(asked, str) else "as the recipe says"


def policy_workload(prepared: Prepared, objective: Policy) -> Workload:
    """Tokens of the training passes when every answer is as long as it may be; each row counts in every pass."""
    train = prepared.train
    answers = objective.group_size * objective.max_new_tokens
    return Workload(
        rows=len(train),
        epoch_rows=prepared.order.epoch_rows * objective.passes,
        tokens=int(train.lengths.sum()) + len(train) * answers,
        targets=len(train) * answers,
        longest=int(train.lengths.max()) + answers,
        estimated=True,
    )


def total_prompts(recipe: Recipe, plan: Plan, prepared: Prepared, objective: Policy) -> int:
    """Where the stream of prompts ends, so that the last epoch ends with its last row."""
    total = -(-plan.steps // objective.passes) * recipe.train.batch_size
    if recipe.train.epochs is not None or recipe.train.steps is None:
        total = min(total, max(1, round(plan.epochs * prepared.order.epoch_rows)))
    return total


def policy_notes(recipe: Recipe, plan: Plan, objective: Policy) -> list[str]:
    """What a user should know before such a job starts."""
    notes = ["the predicted time is that of the training passes; drawing the answers comes on top of it"]
    if objective.kl_weight and not _comes_off(recipe):
        size = plan.parameters.total * BYTES[plan.frozen_dtype]
        notes.append(
            f"the model as it was is kept beside the trained one to compare with: {size / 2**20:,.0f} MiB more; an "
            "adapter, or objective.kl: 0, needs no second model"
        )
    if not objective.kl_weight:
        notes.append("objective.kl is 0: how far the policy moves from the model it started from is not measured")
    if getattr(recipe.method, "dropout", 0.0):
        notes.append("answers are drawn and compared without dropout, and trained on with it: their ratio starts off 1")
    return notes


def _comes_off(recipe: Recipe) -> bool:
    """Whether the model without what is trained is there at any time."""
    return recipe.method.saved_as == "adapter" and not getattr(recipe.method, "modules_to_save", [])


Reference = Callable[[], AbstractContextManager[nn.Module]]


def reference_of(recipe: Recipe, objective: Policy, model: nn.Module) -> Reference:
    """Gives the model as this stage began, for as long as it is entered.

    Args:
        model: adapted, and not trained yet.
    """
    kept = None
    if objective.kl_weight and not _comes_off(recipe):
        kept = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def entered() -> Iterator[nn.Module]:
        if kept is not None:
            yield kept
            return
        with without_adapter(model):
            yield model

    return entered


def served_answers(planned: Planned, objective: Policy, run: Path) -> ServedAnswers | None:
    """The server that draws the answers; None where this process draws them."""
    spec = objective.rollouts
    if spec is None:
        return None
    assert planned.prepared is not None
    return ServedAnswers(
        spec,
        planned.recipe.method,
        planned.location,
        Path(spec.adapters).resolve() if spec.adapters else run.resolve() / "rollout-adapters",
        sha256(str(run.resolve()).encode()).hexdigest()[:12],
        objective.max_new_tokens,
        frozenset(planned.prepared.stop_ids),
        objective.sample_batch,
    )


@dataclass
class Kept(Beside):
    """What checkpoints of such a job keep: the answers at hand, and the value head."""

    rollouts: Rollouts
    model: nn.Module

    def tensors(self) -> dict[str, Tensor]:
        head = value_head(self.model)
        own = {} if head is None else {f"{_HEAD}{name}": weight for name, weight in head.state_dict().items()}
        return {**self.rollouts.tensors(), **{name: weight.detach().cpu().clone() for name, weight in own.items()}}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        head = value_head(self.model)
        if head is not None:
            with torch.no_grad():
                for name, weight in head.state_dict().items():
                    weight.copy_(tensors[f"{_HEAD}{name}"])
        self.rollouts.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(_HEAD)})


def with_value_head(model: nn.Module, objective: object) -> None:
    """Puts a value head beside the model's own where the objective has one."""
    if isinstance(objective, Policy) and objective.has_values:
        add_value_head(model)
