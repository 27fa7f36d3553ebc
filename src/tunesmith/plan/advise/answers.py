"""What somebody answers who asks whether to fine-tune, read from a file, from flags, or one question at a time."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from tunesmith.base import InputError, Spec, nearest
from tunesmith.recipe_file import parse_yaml

Change = Literal["facts", "style", "format", "behaviour", "domain-language"]
How = Literal["never", "yearly", "monthly", "weekly", "daily"]
Tried = Literal["prompting", "few-shot", "rag"]
Task = Literal["generate", "classify", "tag", "regress"]

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def _counted(value: Any) -> Any:
    """Reads `10k`, `2.5M`, `10B` and `1,000` as numbers."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kmb]?)", value.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{value!r} is not a number such as 1500, 10k or 2.5M")
    number = float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2].lower()]
    return int(number) if number == int(number) else number


def _listed(value: Any) -> Any:
    """One word where a list is meant; `nothing` is the empty list."""
    words = [value] if isinstance(value, str) else value
    return [] if words == ["nothing"] else words


def _yes_or_no(value: Any) -> Any:
    words = {"yes": True, "y": True, "true": True, "no": False, "n": False, "false": False}
    if isinstance(value, str) and value.strip().lower() not in words:
        raise ValueError(f"{value!r} is neither yes nor no{nearest(value.lower(), list(words))}")
    return words[value.strip().lower()] if isinstance(value, str) else value


Count = Annotated[NonNegativeInt, BeforeValidator(_counted)]
Answer = Annotated[bool, BeforeValidator(_yes_or_no)]


class Answers(Spec):
    """All of it may be left out: what is not said is not known, which is an answer too."""

    change: Annotated[list[Change], BeforeValidator(_listed)] = Field(default_factory=list)
    """What must change in what the model does: what it knows (`facts`), how it sounds (`style`), the shape of what it
    writes (`format`), what it does when it is asked (`behaviour`), or the language of a field (`domain-language`)."""
    knowledge_changes: How | None = None
    """How often the facts change that answers depend on."""
    examples: Count | None = None
    """Pairs of a question and a good answer that exist; counted when `data` is named."""
    tokens: Count | None = None
    """Tokens of raw text of the field that exist."""
    data: str | None = None
    """The file with those examples or that text."""
    metric: str | None = None
    """How success is measured: a name of yours or one of `evaluate.metrics`; `none` when nothing measures it."""
    tried: Annotated[list[Tried], BeforeValidator(_listed)] | None = None
    """What has been tried, measured and found too weak."""
    latency: Annotated[PositiveFloat, BeforeValidator(_counted)] | None = None
    """Milliseconds within which the first token must be there."""
    prompt_tokens: Count | None = None
    """Length of the prompt that works today, instructions and examples included."""
    shots: Count | None = None
    """Examples that have to stand in the prompt for it to work."""
    context: Annotated[PositiveInt, BeforeValidator(_counted)] = 8192
    """Positions of the model, in tokens."""
    maintained: Answer | None = None
    """Whether somebody will train again when base model or data change."""
    private: Answer | None = None
    """Whether the data hold what nobody outside may read."""
    task: Task | None = None
    """What the model gives: text, one label a row, one label a word, or a number."""
    model: str = "demo"
    """The base model of the recipe."""
    parameters: Annotated[PositiveInt, BeforeValidator(_counted)] | None = None
    """Parameters of that model."""
    memory: Annotated[PositiveFloat, BeforeValidator(_counted)] | None = None
    """Memory for training, in GB."""
    money: Annotated[PositiveFloat, BeforeValidator(_counted)] | None = None
    """What one training may cost, in the currency of the prices."""

    @property
    def measured(self) -> bool:
        return self.metric is not None and self.metric != "none"

    @property
    def prompting_tried(self) -> bool:
        return bool({"prompting", "few-shot"} & set(self.tried or ()))


def read_answers(path: Path | None, flags: Mapping[str, Any]) -> Answers:
    """The answers of a YAML file, and over them those given by flags, which are named as the keys are.

    Raises:
        InputError: naming the file and line or the flag, the nearest thing that would be right, and what it means.
    """
    values, lines = _read(path) if path is not None else ({}, {})
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Answers.model_validate({**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag = f"--{name.replace('_', '-')}"
        key = name if name not in lines else f"{path}:{lines[name]} {name}"
        raise _explained(first, flag if name in given else key) from None


def check_answer(name: str, value: Any) -> Any:
    """One answer as the field of that name holds it, or InputError."""
    return getattr(read_answers(None, {name: value}), name)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(
            f"the answers cannot be read: {said}", where=path, fix="name a YAML file, or answer by flags"
        ) from error
    if not text.strip():
        return {}, {}
    values, lines = parse_yaml(
        text, str(path), what="answers are", needs="answers such as `change: [style]` and `examples: 5000`"
    )
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    return named, {name.replace("-", "_"): line for name, line in lines.items()}


def _explained(first: Any, where: str) -> InputError:
    name, given = str(first["loc"][0]), first["input"]
    known = list(Answers.model_fields)
    if first["type"] == "extra_forbidden":
        return InputError(
            f"unknown answer {name!r}{nearest(name, known)}", where=where, fix=f"known are {', '.join(known)}"
        )
    choices = choices_of(name)
    meaning = " ".join((Answers.model_fields[name].description or "").split())
    if choices and isinstance(given, str):
        return InputError(
            f"{given!r} is not an answer here{nearest(given, choices)}", where=where, fix=f"one of {', '.join(choices)}"
        )
    said = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    found = "" if isinstance(given, str) and repr(given) in said else f", found {given!r}"
    return InputError(f"{said}{found}", where=where, fix=f"{name}: {meaning}")


def choices_of(name: str) -> list[str]:
    """The words that an answer may be; none where it is free."""
    return _words(Answers.model_fields[name].annotation) if name in Answers.model_fields else []


def _words(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(word) for word in typing.get_args(annotation)]
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        return [word for part in typing.get_args(annotation) for word in cast(list[str], _words(part))]
    return []
