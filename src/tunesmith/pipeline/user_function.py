"""Functions of the user's own, named as `file.py:function`: the one place where a recipe's code is loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from hashlib import sha256
from numbers import Real
from pathlib import Path
from types import ModuleType

from tunesmith.base import InputError

OfAnswer = Callable[[str, str, list[str]], float]
"""What an answer is worth, from its prompt, itself and the references of its row."""


def file_hash(path: Path, where: str) -> str:
    """SHA-256 of a small file. Raises InputError when it cannot be read."""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=f"{where} {path}", fix="check the path") from error


def loaded_function(named: str, what: str, key: str) -> tuple[OfAnswer, str]:
    """The function that `file.py:function` names, and the hash of the file.

    Args:
        what: what the function is, for messages: `reward`, `metric`.
        key: of the recipe, where it is named.

    Raises:
        InputError: when the file cannot be read or run, or has no such function; and the function itself, called, for
            what is no finite number.
    """
    file, _, name = named.rpartition(":")
    where = f"{key} {named}"
    digest = file_hash(Path(file), key)
    module = _module(Path(file), digest, what, where)
    function = getattr(module, name, None)
    if not callable(function):
        known = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        raise InputError(
            f"there is no function {name!r} in this file",
            where=where,
            fix=f"it has {', '.join(known)}" if known else "define it there",
        )

    def of_answer(prompt: str, answer: str, references: list[str]) -> float:
        fix = f"make it give a number for every answer, also for this one: {answer[:80]!r}"
        try:
            value = function(prompt, answer, list(references))
        except Exception as error:
            raise InputError(
                f"the {what} function raised {type(error).__name__}: {error}", where=where, fix=fix
            ) from error
        if not isinstance(value, Real) or not math.isfinite(float(value)):
            raise InputError(f"the {what} function gave {value!r:.60}, which is no finite number", where=where, fix=fix)
        return float(value)

    return of_answer, digest


def _module(file: Path, digest: str, what: str, where: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tunesmith_{what}_{digest[:16]}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"the file of the {what} function cannot be run: {error}", where=where) from error
    return module
