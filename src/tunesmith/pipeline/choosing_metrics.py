"""What a job's evaluation will be, as far as recipe, rows and objective decide it."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.base import InputError
from tunesmith.data.prepare import Prepared
from tunesmith.evaluation.compare import LIKELIHOODS, choose_metrics
from tunesmith.metrics import MARGIN, OF_DOCUMENTS, PREFERENCE_ACCURACY, REWARD_ACCURACY
from tunesmith.objectives import Pairwise, Policy, Preference, Pretrain, TaskObjective, TrainingObjective
from tunesmith.pipeline.judging import chosen_metrics
from tunesmith.pipeline.policy import policy_metrics
from tunesmith.plan.given import Judged
from tunesmith.recipe import Recipe
from tunesmith.recipe_limits import DAMAGE


def judged_by(recipe: Recipe, prepared: Prepared, objective: TrainingObjective) -> Judged:
    """What the evaluation will be.

    Raises:
        InputError: when a metric that the recipe or its gate names does not go with the rows.
    """
    lengths = [len(row.example) for row in prepared.test]
    judged = _judged_by(recipe, prepared, objective)
    return replace(judged, row=sum(lengths) / max(1, len(lengths)), longest=max(lengths, default=0))


def _judged_by(recipe: Recipe, prepared: Prepared, objective: TrainingObjective) -> Judged:
    count = 0 if recipe.evaluate == "off" else min(recipe.evaluate.rows, len(prepared.test))
    if isinstance(objective, TaskObjective):
        return Judged(*chosen_metrics(recipe, objective), count, 0, writes=False)
    if isinstance(objective, Policy):
        return Judged(*policy_metrics(recipe), count, 0, limit=objective.max_new_tokens)
    if isinstance(objective, Pretrain):
        return Judged(*_metrics_of_documents(recipe), count, 0, writes=False)
    rows = prepared.test or prepared.train
    references = [row.row.references[0] for row in rows if row.row.messages]
    asked = asked_metrics(recipe)
    own = own_names(recipe)
    if isinstance(objective, Preference) and asked == "auto":
        names = _metrics_of_preferences(objective)
        metrics, why = choose_metrics(names, references)[0], "what preferences are judged by"
    else:
        metrics, why = choose_metrics(asked, references, own)
    gated = [name for name in recipe.gate if name not in (*metrics, *DAMAGE)]
    if gated:
        try:
            metrics, _ = choose_metrics([*metrics, *gated], references, own)
        except InputError as error:
            raise InputError(error.what, where=f"gate.{gated[0]}", fix=error.fix) from error
    if not references and (generated := [name for name in metrics if name not in LIKELIHOODS]):
        raise InputError(
            f"{generated[0]} needs prompts and answers; these rows are raw text",
            where="evaluate.metrics",
            fix="use perplexity, or split the rows with data.answer_after",
        )
    answers = tuple(len(row.example) - len(row.prompt_ids) for row in rows if row.prompt_ids)
    return Judged(metrics, why, count, max(answers, default=0), answers=answers)


def asked_metrics(recipe: Recipe) -> list[str] | str:
    """Names of the recipe's metrics; `auto` when nothing is evaluated."""
    if recipe.evaluate == "off":
        return "auto"
    return recipe.evaluate.metric_names


def own_names(recipe: Recipe) -> list[str]:
    """Names of the metrics that the recipe brings along."""
    return [] if recipe.evaluate == "off" else [metric.name for metric in recipe.evaluate.own_metrics]


def _metrics_of_preferences(objective: Preference) -> list[str]:
    """Which answer gained more decides where the objective is about that, else which is likelier."""
    if not isinstance(objective, Pairwise):
        return [MARGIN]
    accuracies = [PREFERENCE_ACCURACY, REWARD_ACCURACY]
    return [*(reversed(accuracies) if objective.uses_reference else accuracies), MARGIN]


def _metrics_of_documents(recipe: Recipe) -> tuple[list[str], str]:
    """What documents are judged by, the deciding metric first, and why; settings about answers are refused."""
    answers = "documents have no answers"
    if recipe.train.generate_every != "off":
        raise InputError(answers, where="train.generate_every", fix="remove it")
    if recipe.evaluate == "off":
        return [*OF_DOCUMENTS], "the rows are documents"
    if recipe.evaluate.max_new_tokens != "auto":
        raise InputError(answers, where="evaluate.max_new_tokens", fix="remove it")
    asked = recipe.evaluate.metric_names
    for where, names in (("evaluate.metrics", [] if asked == "auto" else asked), ("gate", [*recipe.gate])):
        for name in names:
            if name not in (*OF_DOCUMENTS, *DAMAGE):
                raise InputError(f"{name} needs answers, and {answers}", where=where, fix="use perplexity")
    metrics = [*asked] if isinstance(asked, list) else []
    why = "as the recipe says" if metrics else "the rows are documents"
    return list(dict.fromkeys([*metrics, *OF_DOCUMENTS])), why
