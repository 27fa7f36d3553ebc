"""Dated figures (prices, machines) in a YAML file of the package, which a user can replace by one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from tunesmith.base import InputError, Spec, nearest
from tunesmith.recipe_file import parse_yaml

T = TypeVar("T", bound=Spec)


@dataclass(frozen=True)
class DatedFile(Generic[T]):
    """One kind of file.

    Attributes:
        whole: what the file holds, and `sections` what stands under its keys.
        package, name: where the package's own lies.
        noun: what it holds, in the plural; `entry` is what one key is called.
    """

    whole: type[T]
    sections: Mapping[str, type[Spec]]
    package: str
    name: str
    noun: str
    entry: str

    def read(self, path: Path | None) -> T:
        """The figures of a file, or those that come with the package.

        Raises:
            InputError: naming the file, the line and the key.
        """
        shown = self.name if path is None else str(path)
        try:
            place = files(self.package).joinpath(self.name) if path is None else path
            text = place.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InputError(f"the {self.noun} cannot be read: {said}", where=shown, fix="name a YAML file") from error
        needs = f"the keys {', '.join(self.whole.model_fields)}"
        values, lines = parse_yaml(text, shown, what=f"{self.noun} are", needs=needs)
        try:
            return self.whole.model_validate(values)
        except ValidationError as error:
            raise self._refusal(error, shown, lines) from None

    def _refusal(self, error: ValidationError, shown: str, lines: Mapping[str, int]) -> InputError:
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        place = [str(part) for part in first["loc"]]
        key = ".".join(place)
        line = next((lines[at] for at in (key, ".".join(place[:-1]), place[0]) if at in lines), None)
        where = f"{shown} {key}" if line is None else f"{shown}:{line} {key}"
        if first["type"] == "extra_forbidden":
            holder = self.sections.get(place[0], self.whole) if len(place) > 1 else self.whole
            known = list(holder.model_fields)
            return InputError(
                f"unknown {self.entry} {place[-1]!r}{nearest(place[-1], known)}",
                where=where,
                fix=f"known here: {', '.join(known)}",
            )
        missing = first["type"] == "missing"
        said = f"this {self.entry} is missing" if missing else first["msg"].removeprefix("Input ")
        return InputError(said, where=where, fix=f"copy the package's {self.name} and change its numbers")
