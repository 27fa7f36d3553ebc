"""Rows for timing: functions of Python's standard library (prompt) and the beginning of their docstrings (answer)."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Write the docstring of this Python function."
LONGEST_SOURCE, LONGEST_ANSWER = 680, 1000
"""Characters. With the demo model's tokenizer and template a prompt then has about 140 tokens, an answer 50."""
FEWEST_LINES = 3
POOL = 2000
"""Rows that are read before some are drawn, so that they come from many modules."""
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__"}


def docstring_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """``count`` rows (at most `POOL`) of ``prompt`` and ``completion``, no prompt twice.

    The same Python, count and seed give the same rows.

    Raises:
        SystemExit: this Python carries too little source code of its standard library.
    """
    draw = random.Random(seed)
    found = dict[str, dict[str, str]]()
    for row in _all_rows(Path(sysconfig.get_path("stdlib")), draw):
        found.setdefault(row["prompt"], row)
        if len(found) == POOL:
            break
    if len(found) < count:
        raise SystemExit(f"this Python's standard library gives only {len(found)} rows of the {count} that are needed")
    return draw.sample(list(found.values()), count)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _all_rows(root: Path, draw: random.Random) -> Iterator[dict[str, str]]:
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    for path in draw.sample(paths, len(paths)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (row := _row(node)) is not None:
                yield row


def _row(node: ast.FunctionDef) -> dict[str, str] | None:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) < 2:
        return None
    answer = _whole_lines(docstring.split("\n\n\n")[0], LONGEST_ANSWER)
    node.body = node.body[1:]
    source = _whole_lines(ast.unparse(node), LONGEST_SOURCE)
    if not answer or source.count("\n") + 1 < FEWEST_LINES:
        return None
    return {"prompt": f"{INSTRUCTION}\n\n{source}", "completion": answer}


def _whole_lines(text: str, most: int) -> str:
    """As many lines as fit into ``most`` characters."""
    kept, room = list[str](), most
    for line in text.strip().splitlines():
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join(kept).strip()
