"""Whom a student learns from: found and compared with the student before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.batch import Example
from tunesmith.data.prepare import Prepared
from tunesmith.data.record import BadRow
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.row import Row
from tunesmith.data.turns import OPENING, with_system
from tunesmith.models.embeddings import cover_tokens
from tunesmith.models.load import load_model, load_tokenizer, locate_model, read_config
from tunesmith.models.measure import position_limit
from tunesmith.models.quantized import Quantization
from tunesmith.models.templates import choose_template
from tunesmith.objectives import Distill
from tunesmith.pipeline.loaded import Location, load, locate
from tunesmith.pipeline.policy import refuse_spread_weights
from tunesmith.plan.hardware import DTYPES, detect_hardware
from tunesmith.recipe import Recipe
from tunesmith.resolved import Plan, Resolved
from tunesmith.train.near_base import KEPT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEACHER, PROMPT = "objective.teacher", "objective.teacher_prompt"


@dataclass(frozen=True)
class Teacher:
    """A model that says how likely tokens are.

    Attributes:
        name: as the recipe names it.
        itself: whether it is the student's own base.
        prompt: system text that it alone reads.
        positions: tokens that it can read at once.
        template: its own chat template; None when it has none.
        revision: of its weights, where they come from a hub.
        quantized: how the base that teaches itself is held.
    """

    name: str
    location: Location
    itself: bool
    prompt: str | None
    positions: int
    template: str | None
    revision: str | None = None
    quantized: Quantization | None = None

    def load(self, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress) -> PreTrainedModel:
        """The model, in the dtype of the plan's arithmetic.

        Raises:
            InputError: when it cannot be loaded.
        """
        if not self.itself:
            model = load(self.name, dtype=plan.dtype, progress=progress)
        else:
            progress("loading the model", 0, None)
            device = detect_hardware().device
            model = load_model(
                self.location.base,
                dtype=DTYPES[plan.dtype],
                device=device,
                revision=self.revision,
                quantized=self.quantized,
            )
        cover_tokens(model, tokenizer)
        return model.eval()

    def reads(self, item: Rendered, renderer: Renderer) -> Rendered:
        """A row as the teacher reads it: with its prompt before the conversation, the same targets in their order.

        Raises:
            InputError: when the row cannot be rendered so, is too long, or its answer becomes other tokens.
        """
        if self.prompt is None:
            return item
        place = str(item.row.source)
        try:
            found = renderer.render(prompted_row(item.row, self.prompt))
        except BadRow as error:
            raise InputError(f"behind the teacher's prompt: {error}", where=place, fix=choose_template()) from error
        example, own = found.example, _targets(item.example)
        places = torch.nonzero(example.tensors["target_weights"] > 0).squeeze(1)[: len(own)]
        if not torch.equal(example.token_ids[places], own):
            raise InputError(
                "behind the teacher's prompt the answer becomes other tokens, so that they cannot be compared",
                where=place,
                fix=f"end {PROMPT} differently, or choose another data.template",
            )
        return replace(found, example=self._fitting(example, int(places[-1]) + 1, place))

    def _fitting(self, example: Example, length: int, place: str) -> Example:
        """The row up to its last target: what was cut off for the student is not learned."""
        if length > self.positions:
            raise InputError(
                f"with {PROMPT} this row has {length} tokens, and the model {self.positions} positions",
                where=place,
                fix="shorten the prompt, or lower data.max_length",
            )
        weights = example.tensors["target_weights"][:length]
        return replace(example, token_ids=example.token_ids[:length], tensors={"target_weights": weights})


def _targets(example: Example) -> torch.Tensor:
    return example.token_ids[example.tensors["target_weights"] > 0]


def prompted_row(row: Row, prompt: str) -> Row:
    """A conversation behind a system text; its own system turn, if it has one, follows in the same turn."""
    first = row.messages[0]
    if first["role"] not in OPENING:
        return replace(row, messages=with_system(row.messages, prompt))
    return replace(row, messages=({**first, "content": f"{prompt}\n\n{first['content']}"}, *row.messages[1:]))


def find_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Teacher | None:
    """The teacher that a recipe names; None where nobody is to be learned from.

    Raises:
        InputError: when there is no such model, it writes nothing, or its tokens are others than the student's.
    """
    objective = recipe.objective
    if not isinstance(objective, Distill):
        return None
    if objective.teacher is None:
        spec = recipe.model
        base = locate_model(spec.path, progress)
        location = Location(base, None, base, None)
        teacher_tokenizer, config = load_tokenizer(base, spec.revision), read_config(base, spec.revision)
        key, quantized, revision = "model.add_tokens", spec.quantization, spec.revision
    else:
        location, teacher_tokenizer, config = _there(objective.teacher, progress)
        key, quantized = TEACHER, None
        revision = None if location.recipe is None else location.recipe.model.revision
    _refuse_other_tokens(tokenizer, teacher_tokenizer, key)
    template = teacher_tokenizer.chat_template
    return Teacher(
        name=objective.teacher or recipe.model.path,
        location=location,
        itself=objective.own_base,
        prompt=objective.teacher_prompt,
        positions=position_limit(config),
        template=template if isinstance(template, str) else None,
        revision=revision,
        quantized=quantized,
    )


def _there(name: str, progress: Progress) -> tuple[Location, PreTrainedTokenizerBase, Any]:
    try:
        location = locate(name, progress)
        if location.head is not None:
            raise InputError("this model judges and writes nothing", fix="name a model that writes")
        directory = Path(location.base)
        if directory.is_dir() and not any(directory.glob("*.safetensors")):
            raise InputError("there are no safetensors weights in this directory", fix="name a whole model")
        return location, load_tokenizer(location.tokenizer), read_config(location.base)
    except InputError as error:
        raise InputError(f"the teacher {name}: {error.what}", where=TEACHER, fix=error.fix) from error


def _refuse_other_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, key: str) -> None:
    """Raises InputError when a token's number, or its text, means something else to the teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    other = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = other[0]
    numbers = [f"id {found[token]}" if token in found else "not there" for found in (ours, theirs)]
    raise InputError(
        f"teacher and student have different tokenizers: {len(other):,} tokens differ, for example {token!r}, which is "
        f"{numbers[0]} for the student and {numbers[1]} for the teacher",
        where=key,
        fix="learn from a model with the student's own tokenizer, one of the same family",
    )


def refuse_unfit_rows(teacher: Teacher, recipe: Recipe, prepared: Prepared, renderer: Renderer) -> list[str]:
    """What a user should know of rows and teacher.

    Raises:
        InputError: when there are rows without a conversation, and a prompt or answers are about one.
    """
    objective = recipe.objective
    assert isinstance(objective, Distill)
    for key, wanted in ((PROMPT, teacher.prompt is not None), ("objective.answers", objective.answers == "teacher")):
        _refuse_raw_text(prepared, key, wanted)
    _refuse_raw_text(prepared, "objective.on_policy", objective.on_policy > 0)
    if objective.on_policy:
        refuse_spread_weights(recipe)
    if recipe.budget.memory is not None:
        raise InputError(
            "a budget counts one model, and a teacher is another one",
            where="budget.memory",
            fix="leave it out; the teacher runs before the student is loaded",
        )
    if teacher.prompt is not None:
        teacher.reads(prepared.train[0], renderer)  # what is wrong with the prompt is wrong with the first row
    notes = []
    if not teacher.itself and teacher.template != renderer.template.jinja:
        notes.append("rows are written by the student's template, and the teacher's own chat template is another one")
    if objective.on_policy:
        notes.append("the teacher stays in memory beside the student, which the plan's memory does not count")
    return notes


def _refuse_raw_text(prepared: Prepared, key: str, wanted: bool) -> None:
    for rows in (prepared.train, prepared.validation, prepared.test) if wanted else ():
        lengths = rows.stored.tokens.index["prompt"][rows.numbers]
        if len(rows) and not lengths.all():
            row = rows[int(lengths.argmin())].row
            raise InputError(
                f"{row.source} is raw text, in which nobody is asked anything",
                where=key,
                fix="use rows of prompts and answers, or split the text with data.answer_after",
            )


def kept_on_disk(recipe: Recipe, prepared: Prepared) -> Resolved:
    """What the teacher's log-probabilities will take."""
    objective = recipe.objective
    assert isinstance(objective, Distill)
    targets = int(prepared.train.targets.sum() + prepared.validation.targets.sum())
    if objective.weight == 0:
        return Resolved(name="from the teacher", value="answers", reason="objective.weight is 0")
    return _of_targets("from the teacher", targets, objective.top_k)


def base_on_disk(prepared: Prepared) -> Resolved:
    """What the log-probabilities of a base that will be changed will take."""
    return _of_targets("from the base", int(prepared.train.targets.sum()), KEPT_TOKENS)


def _of_targets(name: str, targets: int, top_k: int) -> Resolved:
    size = targets * (8 * top_k + 4)
    reason = f"about {top_k} tokens and the rest at {targets:,} targets; they are kept on disk"
    return Resolved(name=name, value=f"{size / 1e6:,.1f} MB", reason=reason)
