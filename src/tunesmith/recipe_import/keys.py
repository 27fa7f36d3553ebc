"""Every key of a YAML or JSON file with its line, under the name that stands in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tunesmith.base import InputError

MOST_NODES = 100_000
"""Aliases can make a small file enormous; no settings file comes near this."""


class Found(NamedTuple):
    """A key's line, counted from 1, and its value as plain lists, texts and numbers; mappings have text keys."""

    line: int
    value: Any


def read_keys(path: Path) -> dict[str, Found]:
    """Returns dotted keys, parents before children.

    Raises:
        InputError: when the file cannot be read, is malformed, names a key twice, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError("no such file", where=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file cannot be read: {error}", where=path) from error
    try:
        reader = _Reader(text, str(path))
        return reader.read()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"not YAML: {error.problem}", where=f"{path}:{line}") from error
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", where=path) from error
    except RecursionError as error:
        raise InputError("the file nests too deeply", where=path) from error


class _Reader:
    """Works on YAML's nodes, because the values alone no longer know that a key was written `no` or `07`."""

    def __init__(self, text: str, shown: str) -> None:
        self.loader = yaml.SafeLoader(text)
        self.shown = shown
        self.found: dict[str, Found] = {}
        self.nodes = 0

    def read(self) -> dict[str, Found]:
        node = self.loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise InputError("a settings file is a mapping of keys to values", where=self.shown)
        self._value(node, "")
        return self.found

    def _value(self, node: yaml.Node, prefix: str) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise InputError(f"the file unfolds to more than {MOST_NODES} values", where=self.shown)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, prefix)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, f"{prefix}{index}.") for index, item in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            line = node.start_mark.line + 1
            raise InputError(f"this value cannot be read: {error}", where=f"{self.shown}:{line}") from error

    def _mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key must be plain text")
            if key.value in names:
                self._refuse(key, f"the key {key.value!r} stands twice")
            names.add(key.value)
        self.loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key, value in {key.value: (key, value) for key, value in node.value}.values():
            dotted = f"{prefix}{key.value}"
            if dotted in self.found:
                self._refuse(key, f"the key {dotted!r} stands twice")
            line = key.start_mark.line + 1
            self.found[dotted] = Found(line, None)
            values[key.value] = self._value(value, f"{dotted}.")
            self.found[dotted] = Found(line, values[key.value])
        return values

    def _refuse(self, node: yaml.Node, what: str) -> None:
        raise InputError(what, where=f"{self.shown}:{node.start_mark.line + 1}")
