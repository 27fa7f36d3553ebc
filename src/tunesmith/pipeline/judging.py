"""What a job whose model judges has of its own: labels on rows, the renderer, the base that it is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.data.prepare import Prepared
from tunesmith.data.record import RowErrors
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.render_labelled import LabelRenderer
from tunesmith.data.spec import DataSpec
from tunesmith.data.stored import RenderedRows
from tunesmith.evaluation.labels import answers_of
from tunesmith.metrics import CALIBRATION_ERROR, COMPARED, metric
from tunesmith.models.task_head import looks_back_only
from tunesmith.objectives import Classify, Regress, Reward, TaskObjective
from tunesmith.recipe import Recipe
from tunesmith.recipe_limits import DAMAGE

OWN_TEXT = ("auto", "plain")
"""Templates that leave a text as it is."""


def label_renderer(
    objective: TaskObjective,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    trunk: nn.Module,
    stop_ids: set[int],
    *,
    in_conversation: bool | None = None,
) -> LabelRenderer:
    """The renderer of a recipe's `data` section for a model that judges.

    Args:
        in_conversation: whether a chat template writes the text; None where the recipe's template says it.

    Raises:
        InputError: for settings that only answers have.
    """
    given = DataSpec(train="")
    for name in ("train_on", "answer_after"):
        if getattr(spec, name) != getattr(given, name):
            raise InputError("is about answers that a model writes, and this one judges", where=f"data.{name}")
    asked = spec.template not in OWN_TEXT if in_conversation is None else in_conversation
    if objective.words:
        if asked:
            raise InputError("words stand in no conversation", where="data.template", fix="remove it")
        reads: Literal["first", "last"] = "last" if looks_back_only(trunk) else "first"
        return LabelRenderer(tokenizer, reads)
    conversation = Renderer.of(spec, tokenizer, stop_ids) if asked else None
    several = isinstance(objective, Classify) and objective.multi_label
    return LabelRenderer(tokenizer, "row", conversation, answers_optional=several)


def with_labels(prepared: Prepared, objective: TaskObjective) -> tuple[Prepared, TaskObjective]:
    """Every row with its labels as numbers, and the objective with what the training rows settle.

    Raises:
        InputError: naming every row whose labels the head cannot give.
    """
    answers = [answers_of(row) for row in prepared.train.sources()]
    if isinstance(objective, Regress):  # numbers are numbers before anything is known of them all
        refuse_wrong_labels(prepared.train, objective, "training")
    settled = objective.settled(answers)
    for rows, what in ((prepared.train, "training"), (prepared.validation, "validation"), (prepared.test, "test")):
        refuse_wrong_labels(rows, settled, what)
    parts = {name: labelled(getattr(prepared, name), settled) for name in ("train", "validation", "test")}
    return replace(prepared, **parts), settled


def refuse_wrong_labels(rows: RenderedRows, objective: TaskObjective, what: str) -> None:
    errors = RowErrors()
    for row in rows.sources():
        try:
            objective.encoded(answers_of(row), len(row.words))
        except ValueError as error:
            errors.add(row.source, str(error))
    errors.raise_any(f"correct the labels of these {what} rows, or name all labels in objective.labels")


def labelled(rows: RenderedRows, objective: TaskObjective) -> RenderedRows:
    def labels(at: int, item: Rendered) -> dict[str, Tensor]:
        return {"labels": objective.encoded(answers_of(item.row), item.example.targets)}

    return rows.adding(labels)


def baseline_of(prepared: Prepared, objective: TaskObjective) -> Tensor:
    """The best constant outputs by the training rows, fp32 ``[labels]``."""
    return objective.baseline([answers_of(row) for row in prepared.train.sources()])


def chosen_metrics(recipe: Recipe, objective: TaskObjective) -> tuple[list[str], str]:
    """The metrics of a model that judges, the deciding one first, and why."""
    asked = "auto" if recipe.evaluate == "off" else recipe.evaluate.metric_names
    own = set() if recipe.evaluate == "off" else {one.name for one in recipe.evaluate.own_metrics}
    names = list(objective.metrics if isinstance(asked, str) else dict.fromkeys(asked))
    why = (
        f"what objective.kind: {recipe.objective.kind} is judged by" if isinstance(asked, str) else "as the recipe says"
    )
    for name in recipe.gate:
        if name in DAMAGE:
            raise InputError(
                "this is measured on text that a model writes, and this one judges",
                where=f"gate.{name}",
                fix="remove it",
            )
    for place, wanted in (("evaluate.metrics", names), ("gate", [*recipe.gate])):
        for name in wanted:
            if name == "perplexity":
                raise InputError("a model that judges writes no text to be surprised by", where=place, fix="remove it")
            if name in own or (name in COMPARED and isinstance(objective, Reward)):
                continue
            if name == CALIBRATION_ERROR and isinstance(objective, Classify) and not objective.multi_label:
                continue
            try:
                metric(name)
            except InputError as error:
                raise InputError(error.what, where=place, fix=error.fix) from error
    return [*names, *(name for name in recipe.gate if name not in names)], why


def refuse_settings_of_writing(recipe: Recipe, layers: int) -> None:
    """Raises InputError for settings that mean nothing where nothing is written, or fit no such trunk."""
    if recipe.train.generate_every != "off":
        raise InputError("a model that judges writes no answers", where="train.generate_every", fix="remove it")
    objective = recipe.objective
    assert isinstance(objective, TaskObjective)
    if objective.layer is not None and objective.layer > layers:
        raise InputError(f"the model has {layers} blocks", where="objective.layer", fix=f"use at most {layers}")
    if recipe.evaluate != "off" and recipe.evaluate.max_new_tokens != "auto":
        raise InputError("a model that judges writes no answers", where="evaluate.max_new_tokens", fix="remove it")
    for name in ("benchmarks", "kl_prompts"):
        if recipe.evaluate != "off" and getattr(recipe.evaluate, name):
            raise InputError("a model that judges writes no text", where=f"evaluate.{name}", fix="remove it")
