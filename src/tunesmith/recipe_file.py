"""Where recipes are read: YAML with the line of every key, overrides from the command line, one error at a time."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.base import InputError, Spec, nearest
from tunesmith.recipe import Recipe

UNION_MEMBERS = ("str", "int", "float", "bool", "constrained-int", "constrained-float", "constrained-str")
"""Names that pydantic puts into the path of an error inside a union of plain types."""


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies ``key=value`` overrides, with the same checks for both.

    Raises:
        InputError: naming the file, the line and the key, and the nearest valid one.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(
            "no such recipe", where=path, fix="see `tunesmith recipe --schema` for what goes into one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe cannot be read: {error}", where=path) from error
    values, lines = parse_yaml(text, str(path))
    for override in overrides:
        _override(values, override)
    recipe = check_recipe(values, str(path), lines)
    return recipe.model_copy(update={"output": recipe.output.replace("{name}", file.stem)})


def parse_yaml(text: str, shown: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the values and, for every dotted key, its line counted from 1.

    Raises:
        InputError: for malformed YAML, a key that stands twice, or a file that is no mapping.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"not YAML: {error.problem}", where=f"{shown}:{line}") from error
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=shown) from error
    if not isinstance(values, dict):
        raise InputError(
            "a recipe is a mapping of keys to settings",
            where=shown,
            fix="it needs at least `model:` and `data: {train: …}`",
        )
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, shown)
    return cast(dict[str, Any], values), lines


def check_recipe(values: dict[str, Any], shown: str, lines: dict[str, int] | None = None) -> Recipe:
    """Validates plain values, turning the first thing that is wrong into one error."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explained(error, shown, lines or {}) from None
    _refuse_contradictions(recipe, shown, lines or {})
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with every setting written out, as it is stored with a run."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _collect_lines(node: Any, prefix: str, lines: dict[str, int], shown: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in lines:
                raise InputError(
                    f"the key {name!r} stands twice (first in line {lines[name]})",
                    where=f"{shown}:{key.start_mark.line + 1}",
                )
            lines[name] = key.start_mark.line + 1
            _collect_lines(value, f"{name}.", lines, shown)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{prefix}{index}"] = value.start_mark.line + 1
            _collect_lines(value, f"{prefix}{index}.", lines, shown)


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{override!r} is not key=value", fix="for example train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value is not YAML: {text!r}", where=name) from error
    place: dict[str, Any] = values
    *parents, leaf = name.strip().split(".")
    for parent in parents:
        inner = place.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"path": inner}
        if inner is None or inner is False or inner == "off":
            inner = {}
        if not isinstance(inner, dict):
            raise InputError(f"{parent!r} holds a value, not settings", where=name)
        place[parent] = inner = dict(inner)
        place = inner
    place[leaf] = value


def _explained(error: ValidationError, shown: str, lines: dict[str, int]) -> InputError:
    """The deepest of pydantic's findings in words; a union reports one finding for each member it tried."""
    details = error.errors()
    first = max(details, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path, model = _real_path(first)
    key = ".".join(path)
    line = next((lines[name] for name in (".".join(path[:n]) for n in range(len(path), 0, -1)) if name in lines), None)
    where = f"{shown}:{line} {key}" if line else f"{shown} {key}"
    if first["type"] == "extra_forbidden" and model is not None:
        known = list(model.model_fields)
        return InputError(
            f"unknown key {path[-1]!r}{nearest(path[-1], known)}",
            where=where,
            fix=f"known keys here: {', '.join(known)}",
        )
    if first["type"] == "missing":
        return InputError("this key is missing", where=where, fix="see `tunesmith recipe --schema`")
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        known = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        tag = str(context.get("tag"))
        return InputError(f"unknown kind {tag!r}{nearest(tag, known)}", where=where, fix=f"known: {', '.join(known)}")
    alternatives = [item for item in details if _real_path(item)[0] == path]
    said = dict.fromkeys(_sentence(item) for item in alternatives)
    return InputError(f"{' or '.join(said)}, found {first['input']!r:.80}", where=where)


def _sentence(item: ErrorDetails) -> str:
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:]


def _real_path(item: ErrorDetails) -> tuple[list[str], type[Spec] | None]:
    """The keys as the file has them, without the union members that pydantic adds; and the class of the last."""
    path: list[str] = []
    holder: type[Spec] | None = None
    current: Any = Recipe
    for part in item["loc"]:
        models = {model.__name__: model for model in _models_in(current)}
        tags = {str(getattr(model.model_fields.get("kind"), "default", "")): model for model in models.values()}
        if isinstance(part, str) and (part in models or (part in tags and "kind" in tags[part].model_fields)):
            current = models.get(part) or tags[part]
            continue
        if isinstance(part, str) and not path and part not in Recipe.model_fields:
            return [part], Recipe
        if isinstance(part, str) and ("[" in part or part in UNION_MEMBERS):
            continue
        choices = [model for model in models.values() if part in model.model_fields]
        holder = (choices or list(models.values()) or [None])[0]
        path.append(str(part))
        if choices:
            current = choices[0].model_fields[str(part)].annotation
        elif models and not isinstance(part, int):
            current = None
    return path or ["recipe"], holder


def _models_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [cast(type[Spec], annotation)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, Annotated):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _refuse_contradictions(recipe: Recipe, shown: str, lines: dict[str, int]) -> None:
    train = recipe.train

    def refuse(key: str, what: str, fix: str) -> None:
        line = lines.get(key)
        raise InputError(what, where=f"{shown}:{line} {key}" if line else f"{shown} {key}", fix=fix)

    if recipe.data.validation is None:
        needing = {
            "train.early_stopping": train.early_stopping != "off",
            "train.evaluate_every": isinstance(train.evaluate_every, int),
            "train.generate_every": train.generate_every != "off",
        }
        for key in (key for key, needed in needing.items() if needed):
            refuse(key, "this needs validation rows", "set data.validation, for example to 0.1, or remove this key")
    if train.early_stopping != "off" and train.evaluate_every == "off":
        refuse("train.early_stopping", "early stopping needs evaluations", "remove train.evaluate_every: off")
    if isinstance(train.micro_batch, int) and train.micro_batch > train.batch_size:
        refuse(
            "train.micro_batch",
            f"{train.micro_batch} is larger than the batch of {train.batch_size} rows",
            "make it at most train.batch_size",
        )
    if recipe.gate and recipe.evaluate == "off":
        refuse("gate", "a gate needs an evaluation", "remove evaluate: off")
    if recipe.model.quantize != "none" and recipe.method.kind == "full":
        refuse("model.quantize", "quantized weights cannot be trained whole", "use method.kind: lora")
    if recipe.evaluate != "off" and "forgetting" in recipe.gate and recipe.evaluate.forgetting == "off":
        refuse("gate.forgetting", "forgetting is not measured", "remove evaluate.forgetting: off")
