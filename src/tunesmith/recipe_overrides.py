"""Settings from the command line, laid over those of a recipe's file."""

from __future__ import annotations

from typing import Any

import yaml

from tunesmith.base import InputError

COMMAND_LINE = "command line"
FROM_COMMAND_LINE = 0
"""Stands for a line in the table of lines, which are counted from 1."""

SHORT_FORMS = {"model": "path", "method": "kind", "objective": "kind"}
"""Sections that may be written as one text, and the key that it stands for."""


def apply_override(values: dict[str, Any], override: str, lines: dict[str, int]) -> None:
    """Sets one key in place, such as `train.steps=100`, and notes that it came from the command line.

    Args:
        lines: of every key; the new ones get `FROM_COMMAND_LINE`.

    Raises:
        InputError: when it is no ``key=value``, its value is no YAML, or it fits nowhere.
    """
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not all(name.split(".")):
        raise InputError(f"{override!r} is not key=value", where=COMMAND_LINE, fix="for example train.steps=100")
    where = f"{COMMAND_LINE} {name}"
    try:
        value = yaml.safe_load(text)
        if isinstance(value, dict) and not text.lstrip().startswith("{"):
            value = text  # a marker such as "Answer: " is meant as text, not as a mapping
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"the value is not YAML: {text!r}", where=where, fix="put it into quotes") from error
    place: Any = values
    *parents, leaf = name.split(".")
    for depth, parent in enumerate(parents):
        inner = _item(place, parent, where)
        top = depth == (2 if parents[0] == "stages" else 0)
        if top and isinstance(inner, str) and parent in SHORT_FORMS:
            inner = {SHORT_FORMS[parent]: inner}
        if inner is None or inner is False or inner == "off":
            inner = {}
        if not isinstance(inner, (dict, list)):
            raise InputError(f"{parent!r} holds a value, not settings", where=where, fix=f"set {parent} itself")
        lines.setdefault(".".join(parents[: depth + 1]), FROM_COMMAND_LINE)
        inner = inner.copy()
        _set_item(place, parent, inner)
        place = inner
    _item(place, leaf, where)
    _set_item(place, leaf, value)
    for known in [known for known in lines if known.startswith(f"{name}.")]:
        del lines[known]
    lines[name] = FROM_COMMAND_LINE


def _item(place: Any, key: str, where: str) -> Any:
    if isinstance(place, dict):
        return place.get(key)
    if not key.isdigit() or int(key) >= len(place):
        raise InputError(
            f"there is no item {key} in this list", where=where, fix=f"it has the items 0 to {len(place) - 1}"
        )
    return place[int(key)]


def _set_item(place: Any, key: str, value: Any) -> None:
    place[int(key) if isinstance(place, list) else key] = value
