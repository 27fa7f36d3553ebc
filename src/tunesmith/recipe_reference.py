"""The reference page of recipes, written from the types themselves."""

from __future__ import annotations

import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.data.spec import DataSpec, ReplaySpec, SourceSpec
from tunesmith.methods import Method
from tunesmith.metrics.spec import PythonMetric, SqlMetric
from tunesmith.objectives import Objective
from tunesmith.objectives.policy import RolloutServer
from tunesmith.objectives.rewards import Reward
from tunesmith.recipe import EarlyStopping, EvaluateSpec, GroupSpec, MemorisationSpec, ModelSpec, Recipe, TrainSpec
from tunesmith.recipe_ladder import FactsSpec, LadderSection, LadderSpec
from tunesmith.recipe_limits import BudgetSpec

METHODS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Method)[0])
OBJECTIVES: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Objective)[0])
REWARDS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(Reward)[0])
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("", Recipe),
    ("model", ModelSpec),
    ("data", DataSpec),
    ("data.train[]", SourceSpec),
    ("data.replay", ReplaySpec),
    *((f"method (kind: {kind.model_fields['kind'].default})", kind) for kind in METHODS),
    *((f"objective (kind: {kind.model_fields['kind'].default})", kind) for kind in OBJECTIVES),
    *((f"objective.reward[] (kind: {kind.model_fields['kind'].default})", kind) for kind in REWARDS),
    ("objective.rollouts", RolloutServer),
    ("train", TrainSpec),
    ("train.groups[]", GroupSpec),
    ("train.early_stopping", EarlyStopping),
    ("evaluate", EvaluateSpec),
    ("evaluate.memorisation", MemorisationSpec),
    ("evaluate.metrics[] (a function of yours)", PythonMetric),
    ("evaluate.metrics[] (SQL)", SqlMetric),
    ("budget", BudgetSpec),
    ("ladder", LadderSpec),
    ("ladder.facts", FactsSpec),
)
HEAD = """# Recipe reference

Written by `tunesmith recipe --reference`; `tunesmith recipe --schema` prints the same as JSON schema. An unknown key is
an error. `auto` is resolved by the plan, which says what it became and why.
"""

STAGES = (
    "Several jobs one after the other, by name: each is laid over the keys that stand above it and may start from an "
    "earlier one (`model: stages.NAME`); docs/stages.md."
)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, of one job or with stages, whose own keys are those of a recipe; and of a ladder."""
    schema, ladder = Recipe.model_json_schema(), LadderSection.model_json_schema()
    schema["$defs"] = {**ladder["$defs"], **schema["$defs"]}
    stages = {"type": "object", "additionalProperties": {"type": ["object", "null"]}, "description": STAGES}
    needed = schema.pop("required")
    schema["properties"] = {**schema["properties"], **ladder["properties"], "stages": stages}
    return {**schema, "anyOf": [{"required": needed}, {"required": ["stages"]}]}


def recipe_reference() -> str:
    """Markdown: every field with its type, default and meaning."""
    parts = [HEAD]
    for name, model in SECTIONS:
        parts.append(f"## {f'`{name}`' if name else 'Top level'}\n")
        parts.append("| key | values | default | meaning |\n|---|---|---|---|")
        parts += [_line(key, field) for key, field in model.model_fields.items()]
        if model is Recipe:
            parts += [_line(key, field) for key, field in LadderSection.model_fields.items()]
            parts.append(f"| `stages` | mapping of names to recipes | none | {STAGES} |")
        parts.append("")
    return "\n".join(parts)


def _line(key: str, field: FieldInfo) -> str:
    values = _values(field.annotation, field.metadata)
    if field.default_factory is not None:
        default = "empty"
    elif field.default is PydanticUndefined:
        default = "required"
    elif isinstance(field.default, BaseModel):
        default = "see below"
    else:
        default = f"`{_plain(field.default)}`"
    meaning = re.sub(r"\s+", " ", field.description or "")
    return f"| `{key}` | {values} | {default} | {meaning} |"


def _values(annotation: Any, metadata: list[Any] | None = None) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = typing.get_args(annotation)
        return _values(inner, metadata)
    if origin is Literal:
        return " · ".join(f"`{_plain(value)}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        parts = [_values(part) for part in typing.get_args(annotation) if part is not type(None)]
        return " · ".join(dict.fromkeys(parts))
    if origin is list:
        return f"list of {_values(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"mapping to {_values(typing.get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    names = {str: "text", int: "whole number", float: "number", bool: "`true` · `false`"}
    return names.get(annotation, "value") + _bounds(metadata or [])


def _bounds(metadata: list[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {bound}"
        for item in metadata
        for name, sign in signs.items()
        if (bound := getattr(item, name, None)) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")
