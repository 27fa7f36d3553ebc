"""Verbs whose options are the fields of a dataclass, for those with many of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def as_command(options: type[T], verb: Callable[[T], None]) -> Callable[..., None]:
    """What typer makes a command of: a function with one parameter for each field of ``options``.

    Args:
        options: a dataclass whose fields have defaults and are annotated as typer's parameters are.
        verb: takes an object of it; its name and docstring become the command's.
    """
    hints = get_type_hints(options, include_extras=True)

    def command(**given: Any) -> None:
        verb(options(**given))

    parameters = []
    for field in fields(options):  # type: ignore[arg-type]
        assert field.default is not MISSING, f"{field.name} needs a default"
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
        )
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__annotations__ = hints
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
