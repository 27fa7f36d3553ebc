"""The names that lm-eval has, read off its files, so that a wrong one is told before anything is loaded or imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tunesmith.base import InputError, nearest

NAME = re.compile(rb"""^["']?(?:task|group)["']?:\s*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
TAGS = re.compile(rb"""^["']?tag["']?:((?:.*)(?:\n\s*-\s.*)*)""", re.MULTILINE)


def require_harness() -> None:
    """Raises InputError when lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError("benchmarks need the package lm-eval", fix="pip install 'tunesmith[benchmarks]'")


def refuse_unknown(names: Sequence[str], where: str | None = None) -> None:
    """Raises InputError for a name that lm-eval does not have, or without lm-eval.

    Args:
        where: what named them.
    """
    require_harness()
    files, tags = named_in(harness_tasks())
    for name in names:
        if name not in files and name not in tags:
            raise InputError(
                f"lm-eval has no benchmark {name!r}{nearest(name, [*files, *tags])}",
                where=where,
                fix="use names that lm-eval has, for example hellaswag, mmlu, arc_easy, piqa, winogrande",
            )


def harness_tasks() -> Path:
    """The directory of lm-eval's tasks."""
    found = find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


@cache
def named_in(root: Path) -> tuple[dict[str, Path], set[str]]:
    """The file that defines each task or group, and the tags there are."""
    files: dict[str, Path] = {}
    tags: set[str] = set()
    for path in sorted(root.rglob("*.yaml")):
        content = path.read_bytes()
        for match in NAME.finditer(content):
            files.setdefault(match[1].decode(), path)
        for match in TAGS.finditer(content):
            tags.update(re.findall(r"[\w.-]*\w", match[1].decode()))
    return files, tags
