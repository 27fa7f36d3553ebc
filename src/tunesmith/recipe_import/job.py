"""One import while it goes on: what the file says, what the recipe becomes, and what is said about every key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from tunesmith.base import InputError, nearest
from tunesmith.recipe_import.keys import Found

Outcome = Literal["taken", "translated", "ignored", "no counterpart"]

LOUD = "changes the result: "
"""Opens every note about something that the recipe does not do as the other file would."""

FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
OFF = (False, 0, "false", "no", "off", "none", "0")


@dataclass(frozen=True)
class ImportedKey:
    """What became of one key.

    Attributes:
        key: dotted, as the file has it; positions in lists count from 0.
        to: the key or keys of the recipe that it set, if any.
        note: what a user should know; it opens with `LOUD` when the recipe will train differently because of it.
    """

    key: str
    line: int
    outcome: Outcome
    to: str | None = None
    note: str = ""


class Job:
    """Reads keys of the file and fills the recipe.

    Args:
        found: every key of the file.
        shown: the file's name in messages.
        folder: where the file stands.
        tool: the other tool's name in notes.
    """

    def __init__(self, found: dict[str, Found], shown: str, folder: Path, tool: str) -> None:
        self.found, self.shown, self.folder, self.tool = found, shown, folder, tool
        self.recipe: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.said: dict[str, ImportedKey] = {}
        self.defaults: list[str] = []
        self.opened: dict[str, Sequence[str]] = {}
        """Keys whose inner keys are each looked at, with the names that those may have."""

    def get(self, key: str) -> Any:
        """The value, or None when the key is missing or empty: both tools then use their default."""
        value = self.found[key].value if key in self.found else None
        return None if value in ("", [], {}) else value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return self.unfit(key, "text")

    def number(self, key: str) -> float | None:
        """Numbers written as `1e-4` are text to YAML 1.1, and numbers to both tools."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return self.unfit(key, "a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return self.unfit(key, "a number")
        return number if math.isfinite(number) else self.unfit(key, "a finite number")

    def whole(self, key: str, least: int = 0) -> int | None:
        number = self.number(key)
        if number is None:
            return None
        if number != int(number) or number < least:
            return self.unfit(key, f"a whole number of at least {least}")
        return int(number)

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return value
        flag = FLAGS.get(str(value).lower()) if isinstance(value, (str, int)) else None
        return self.unfit(key, "true or false") if flag is None else flag

    def texts(self, key: str) -> list[str] | None:
        """A list of texts, or one text with commas."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, list):
            if all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in value):
                return [str(item) for item in value]
            return self.unfit(key, "a list of texts")
        return [item.strip() for item in (self.text(key) or "").split(",") if item.strip()]

    def put(self, to: str, value: Any, key: str, note: str = "", outcome: Outcome | None = None) -> None:
        """Sets a key of the recipe and says that ``key`` did it."""
        self.recipe[to] = value
        self.origin[to] = key
        self.defaults = [line for line in self.defaults if not line.startswith(f"{to}: ")]
        self.say(key, outcome or ("taken" if _alike(self.get(key), value) else "translated"), to, note)

    def default(self, to: str, value: Any, why: str) -> None:
        """Writes out what the other tool does when its key is absent."""
        self.recipe[to] = value
        self.defaults.append(f"{to}: {value} ({why})")

    def say(self, key: str, outcome: Outcome, to: str | None = None, note: str = "") -> None:
        """Does nothing when the file does not have the key."""
        if key in self.found:
            self.said[key] = ImportedKey(key, self.found[key].line, outcome, to, note)

    def lose(self, key: str, why: str, *, loud: bool = True, to: str | None = None) -> None:
        self.say(key, "no counterpart", to, (LOUD if loud else "") + why)

    def unfit(self, key: str, expected: str) -> NoReturn:
        self.refuse(key, f"{expected} is expected, found {self.get(key)!r:.60}")

    def refuse(self, key: str, what: str, fix: str | None = None) -> NoReturn:
        line = f":{self.found[key].line}" if key in self.found else ""
        raise InputError(what, where=f"{self.shown}{line} {key}", fix=fix)

    def finish(self, known: Sequence[str]) -> list[ImportedKey]:
        """Says something about the keys that nothing has been said about, and returns all in the file's order."""
        for key in self.found:
            if key in self.said:
                continue
            above = next((self.said[part] for part in _parents(key) if part in self.said), None)
            if self.get(key) is None:
                self.say(key, "ignored", note=f"empty: {self.tool} then uses its default, and so does this recipe")
            elif above and above.key not in self.opened:
                note = above.note if above.note.startswith("part of ") else f"part of `{above.key}`"
                self.say(key, above.outcome, above.to, note)
            else:
                hint = nearest(key.rpartition(".")[2], self.opened[above.key] if above else known)
                self.lose(key, f"not known as a key of {self.tool}{hint}; check whether it matters", loud=False)
        return [self.said[key] for key in self.found]


@dataclass(frozen=True)
class Entry:
    """A line of a tool's table: some of its keys, and what they become.

    Attributes:
        to: the recipe's keys, for the page; empty when there are none.
        meaning: the rule in words, for the page.
        apply: reads the keys and fills the recipe.
    """

    keys: tuple[str, ...]
    to: str
    meaning: str
    apply: Callable[[Job], None]


def same(key: str, to: str, read: Callable[[Job, str], Any], meaning: str = "as it is") -> Entry:
    """A key that means the same here under another name."""

    def apply(job: Job) -> None:
        if (value := read(job, key)) is not None:
            job.put(to, value, key)

    return Entry((key,), to, meaning, apply)


def ignored(why: str, *keys: str) -> Entry:
    """Keys that cannot change what is learned."""

    def apply(job: Job) -> None:
        for key in keys:
            if job.get(key) is not None and key not in job.said:
                job.say(key, "ignored", note=why)

    return Entry(keys, "", f"ignored: {why}", apply)


def lost(why: str, *keys: str, loud: bool = True, adapter: bool = False) -> Entry:
    """Keys of things that Tunesmith does not have; it is said unless they are switched off.

    Args:
        adapter: whether they only matter when an adapter is trained.
    """

    def apply(job: Job) -> None:
        for key in keys:
            value = job.get(key)
            plain = value.lower() if isinstance(value, str) else value
            if value is None:
                continue
            if isinstance(plain, (bool, int, float, str)) and plain in OFF:
                job.say(key, "ignored", note="off, as here")
            elif adapter and job.recipe.get("method.kind") == "full":
                job.say(key, "ignored", note="there is no adapter")
            else:
                job.lose(key, why, loud=loud)

    return Entry(keys, "", f"no counterpart: {why}", apply)


def _alike(given: Any, value: Any) -> bool:
    """Whether the recipe's value is the file's, which may have a number as text."""
    if isinstance(given, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(given) == value
    return given == value


def _parents(key: str) -> list[str]:
    """`a.b`, then `a` for `a.b.c`."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
