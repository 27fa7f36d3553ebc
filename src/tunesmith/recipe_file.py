"""Where recipes are read: YAML with the line of every key, overrides from the command line, one error at a time."""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunesmith.base import InputError, Spec, nearest
from tunesmith.metrics import COMPARED, METRICS, OF_DOCUMENTS, REWARD
from tunesmith.models.quantized import FOUR_BIT
from tunesmith.recipe import EvaluateSpec, Recipe
from tunesmith.recipe_limits import DAMAGE
from tunesmith.recipe_overrides import COMMAND_LINE, FROM_COMMAND_LINE, apply_override

PLAIN_WORDS = {
    "model_type": "should be settings, one `key: value` a line",
    "model_attributes_type": "should be settings, one `key: value` a line",
    "dict_type": "should be a mapping, `{name: value, …}`",
    "list_type": "should be a list, `[…]`",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
}
"""What pydantic finds wrong, for people."""

LADDER = "ladder"
"""The section of a recipe that is for `tunesmith advise --measure` alone."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

UNION_MEMBERS = ("str", "int", "float", "bool", "constrained-int", "constrained-float", "constrained-str")
"""Names that pydantic puts into the path of an error inside a union of plain types."""


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies ``key=value`` overrides, with the same checks for both.

    Raises:
        InputError: naming the file, the line and the key, and the nearest valid one.
    """
    values, lines = read_values(path, overrides)
    if "stages" in values:
        raise InputError(
            "this recipe has stages, and a recipe of one job is asked for",
            where=place_of("stages", str(path), lines),
            fix="name the recipe of one stage: that of a run in OUTPUT/stages, or a file of its own",
        )
    values.pop(LADDER, None)  # of `tunesmith advise --measure`, which checks it
    recipe = check_recipe(values, str(path), lines)
    return recipe.model_copy(update={"output": named_after(recipe.output, path)})


def named_after(output: str, path: str | Path) -> str:
    """An output directory with the recipe's file name in it."""
    return output.replace("{name}", Path(path).stem)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a recipe with ``key=value`` overrides, unchecked, and the line of every key.

    Raises:
        InputError: for a file that cannot be read, malformed YAML, or an override that fits nowhere.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            "no such recipe", where=path, fix="check the path; `tunesmith recipe --schema` says what goes into one"
        ) from error
    except OSError as error:
        raise InputError(f"the recipe cannot be read: {error.strerror}", where=path, fix="name a YAML file") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"not UTF-8: byte 0x{content[error.start]:02x}", where=f"{path}:{line}", fix="save the recipe as UTF-8"
        ) from error
    values, lines = parse_yaml(text, str(path))
    for override in overrides:
        apply_override(values, override, lines)
    return values, lines


def parse_yaml(
    text: str, shown: str, *, what: str = "a recipe is", needs: str = "at least `model:` and `data: {train: …}`"
) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the values and, for every dotted key, its line counted from 1.

    Args:
        what: the file is, and what it ``needs``, for messages.

    Raises:
        InputError: for malformed YAML, a key that stands twice, or a file that is no mapping.
    """
    correct = "correct that line"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"not YAML: {error.problem}", where=f"{shown}:{line}", fix=correct) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"U+{ord(text[error.position]):04X}"
        raise InputError(f"not YAML: the character {character}", where=f"{shown}:{line}", fix=correct) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = str(error).splitlines()[0] if not isinstance(error, RecursionError) else "nested too deeply"
        raise InputError(f"not YAML: {said}", where=shown, fix="write plain keys and values") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{what} a mapping of keys to settings",
            where=shown,
            fix=f"it needs {needs}",
        )
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, shown, set())
    return cast(dict[str, Any], values), lines


def check_recipe(values: dict[str, Any], shown: str, lines: dict[str, int] | None = None) -> Recipe:
    """Validates plain values, turning the first thing that is wrong into one error."""
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise explained(error, shown, lines or {}) from None

    def refuse(key: str, what: str, fix: str) -> NoReturn:
        raise InputError(what, where=place_of(key, shown, lines or {}), fix=fix)

    refuse_odd_numbers(values, recipe, "", refuse)
    _refuse_contradictions(recipe, refuse)
    _refuse_unknown_metrics(recipe, refuse)
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with every setting written out, as it is stored with a run."""
    return plain_yaml(recipe.model_dump(mode="json"))


def plain_yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts text with Unicode's rarer line ends into double quotes: elsewhere YAML reads them back as plain ones."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def _collect_lines(node: Any, prefix: str, lines: dict[str, int], shown: str, seen: set[int]) -> None:
    """Notes the line of every key; what an alias repeats keeps the lines of its first place."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in lines:
                raise InputError(
                    f"the key {name!r} stands twice (first in line {lines[name]})",
                    where=f"{shown}:{key.start_mark.line + 1}",
                    fix="remove one of them",
                )
            lines[name] = key.start_mark.line + 1
            _collect_lines(value, f"{name}.", lines, shown, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{prefix}{index}"] = value.start_mark.line + 1
            _collect_lines(value, f"{prefix}{index}.", lines, shown, seen)


def place_of(key: str, shown: str, lines: dict[str, int]) -> str:
    """Where a key stands: file and line, the command line, or just the file for one that is missing."""
    parts = key.split(".")
    known = (name for name in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if name in lines)
    line = lines.get(next(known, ""))
    if line is None:
        return f"{shown} {key}"
    return f"{COMMAND_LINE} {key}" if line == FROM_COMMAND_LINE else f"{shown}:{line} {key}"


def explained(error: ValidationError, shown: str, lines: dict[str, int], root: type[Spec] = Recipe) -> InputError:
    """The deepest of pydantic's findings about ``root`` in words; a union reports one for each member it tried."""
    details = error.errors()
    first = max(details, key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path, model = _real_path(first, root)
    where = place_of(".".join(path), shown, lines)
    if first["type"] in ("extra_forbidden", "invalid_key") and model is not None:
        known = list(model.model_fields)
        return InputError(
            f"unknown key {path[-1]!r}{nearest(path[-1], known)}",
            where=where,
            fix=f"known keys here: {', '.join(known)}",
        )
    meaning = _meaning(path, root)
    if first["type"] == "missing":
        return InputError("this key is missing", where=where, fix=f"add it; {meaning}")
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        known = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
        tag = str(context.get("tag"))
        return InputError(f"unknown kind {tag!r}{nearest(tag, known)}", where=where, fix=f"known: {', '.join(known)}")
    alternatives = [item for item in details if _real_path(item, root)[0] == path]
    said = dict.fromkeys(_sentence(item) for item in alternatives)
    found = first["input"]
    shown_value = "nothing" if found is None else f"{_SHORT.repr(found):.120}"
    known = [
        text for item in alternatives for text in re.findall(r"'([^']+)'", item.get("ctx", {}).get("expected", ""))
    ]
    close = nearest(found, known) if isinstance(found, str) else ""
    wanted = " or ".join(said).replace(" or should be ", " or ")
    return InputError(f"{wanted}, found {shown_value}{close}", where=where, fix=meaning)


def _meaning(path: Sequence[str], root: type[Spec]) -> str:
    """The first sentence of the documentation of the deepest key that has one."""
    found, current = "`tunesmith recipe --schema` says what is allowed", cast(Any, root)
    for part in path:
        holder = next((model for model in _models_in(current) if part in model.model_fields), None)
        if holder is not None:
            field = holder.model_fields[part]
            current = field.annotation
            sentence = re.split(r"(?<!et al)\. ", " ".join((field.description or "").split()))[0].rstrip(".")
            found = f"{part}: {sentence}" if sentence else found
    return found


def _sentence(item: ErrorDetails) -> str:
    kind = item["type"]
    if kind in PLAIN_WORDS:
        return PLAIN_WORDS[kind]
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message[0].lower() + message[1:]


def _real_path(item: ErrorDetails, root: type[Spec]) -> tuple[list[str], type[Spec] | None]:
    """The keys as the file has them, without the union members that pydantic adds; and the class of the last."""
    path: list[str] = []
    holder: type[Spec] | None = None
    current: Any = root
    for part in item["loc"]:
        models = {model.__name__: model for model in _models_in(current)}
        tags = {str(getattr(model.model_fields.get("kind"), "default", "")): model for model in models.values()}
        if isinstance(part, str) and (part in models or (part in tags and "kind" in tags[part].model_fields)):
            current = models.get(part) or tags[part]
            continue
        if isinstance(part, str) and not path and part not in root.model_fields:
            return [part], root
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


Refuse = Callable[[str, str, str], NoReturn]
"""Key, what is wrong, what to do."""


def refuse_odd_numbers(given: Any, checked: Any, key: str, refuse: Refuse) -> None:
    """Infinity, NaN, and `yes` or `off` where a number is meant: pydantic takes them for numbers."""
    inner = {}
    if isinstance(checked, BaseModel) and isinstance(given, dict):
        inner = {name: (given[name], getattr(checked, name)) for name in type(checked).model_fields if name in given}
    elif isinstance(checked, dict) and isinstance(given, dict):
        inner = {name: (given[name], value) for name, value in checked.items() if name in given}
    elif isinstance(checked, list) and isinstance(given, list):
        inner = dict(enumerate(zip(given, checked, strict=True)))
    elif isinstance(checked, (int, float)) and not isinstance(checked, bool):
        if isinstance(given, bool):
            word = "yes, on or true" if given else "no, off or false"
            refuse(key, f"should be a number, found {word}", "write a number")
        if not math.isfinite(checked):
            refuse(key, f"should be a number, found {given}", "write a finite number")
    for name, pair in inner.items():
        refuse_odd_numbers(*pair, f"{key}.{name}" if key else str(name), refuse)


def _refuse_unknown_metrics(recipe: Recipe, refuse: Refuse) -> None:
    own = [] if recipe.evaluate == "off" else [metric.name for metric in recipe.evaluate.own_metrics]
    known = [*METRICS, *OF_DOCUMENTS, *COMPARED, REWARD, *own]
    asked = recipe.evaluate.metric_names if recipe.evaluate != "off" else "auto"
    named = {f"evaluate.metrics.{at}": name for at, name in enumerate(asked if isinstance(asked, list) else [])}
    named |= {f"gate.{name}": name for name in recipe.gate if name not in DAMAGE}
    for key, name in named.items():
        if name not in known:
            refuse(key, f"unknown metric {name!r}{nearest(name, known)}", f"choose one of {', '.join(known)}")


def _refuse_unmeasured_damage(recipe: Recipe, evaluate: EvaluateSpec, refuse: Refuse) -> None:
    if "benchmarks" in recipe.gate and not evaluate.benchmarks:
        refuse("gate.benchmarks", "no benchmark is measured", "name some: evaluate.benchmarks: [hellaswag, arc_easy]")
    if "kl" in recipe.gate and not evaluate.kl_prompts:
        refuse("gate.kl", "no divergence from the base is measured", "set evaluate.kl_prompts, for example to 32")
    for name in ("benchmark_limit", "benchmark_shots", "benchmark_data"):
        if getattr(evaluate, name) is not None and not evaluate.benchmarks:
            refuse(f"evaluate.{name}", "there are no benchmarks here", "name some in evaluate.benchmarks, or remove it")


def _holds_back(recipe: Recipe) -> bool:
    """Whether rows are taken from the training rows for validation or test."""
    data = recipe.data
    carved = data.test == "auto" and recipe.evaluate != "off"
    return carved or isinstance(data.test, float) or isinstance(data.validation, float)


def _refuse_contradictions(recipe: Recipe, refuse: Refuse) -> None:
    train = recipe.train
    for key, share in (("data.validation", recipe.data.validation), ("data.test", recipe.data.test)):
        if isinstance(share, float) and not 0 < share < 1:
            refuse(key, f"{share:g} is not a fraction between 0 and 1", "use 0.1 for a tenth, or a path")
    if recipe.data.benchmarks and not recipe.data.checks:
        refuse("data.benchmarks", "this needs the checks of training rows", "remove data.checks: false")
    if recipe.data.stratify is not None and not _holds_back(recipe):
        refuse("data.stratify", "no rows are held back here", "remove it, or hold back a fraction with data.test")
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
    if recipe.model.quantize != "none" and train.shard:
        refuse(
            "train.shard", "quantized weights cannot be spread over processes", "remove train.shard or model.quantize"
        )
    if not recipe.model.double_quantization and recipe.model.quantize not in FOUR_BIT:
        refuse("model.double_quantization", "there are no 4-bit scales here", "set model.quantize to nf4 or fp4")
    if recipe.evaluate != "off" and "forgetting" in recipe.gate and recipe.evaluate.forgetting == "off":
        refuse("gate.forgetting", "forgetting is not measured", "remove evaluate.forgetting: off")
    if recipe.evaluate != "off":
        _refuse_unmeasured_damage(recipe, recipe.evaluate, refuse)
    unknown = [name for name in re.findall(r"\{([^{}]*)\}", recipe.output) if name != "name"]
    if unknown or not recipe.output.strip():
        what = f"unknown placeholder {{{unknown[0]}}}" if unknown else "the path is empty"
        refuse("output", what, "name a new directory; {name} stands for the recipe's file name")
