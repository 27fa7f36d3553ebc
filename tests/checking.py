"""Rows for the tests of checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunesmith.base import Source
from tunesmith.data.check import Checks, Finding
from tunesmith.data.row import Row


def exchange(prompt: str, answer: str, line: int = 1, *, system: str = "", rejected: str | None = None) -> Row:
    before = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    worse = (*before, {"role": "assistant", "content": rejected}) if rejected is not None else ()
    return Row(
        source=Source("rows.jsonl", line),
        messages=(*before, {"role": "assistant", "content": answer}),
        references=(answer,),
        rejected=tuple(worse),
    )


def text_row(text: str, line: int = 1) -> Row:
    return Row(source=Source("rows.jsonl", line), text=text)


def exchanges(pairs: Iterable[tuple[str, str]]) -> list[Row]:
    return [exchange(prompt, answer, line) for line, (prompt, answer) in enumerate(pairs, start=1)]


def checked(train: Sequence[Row], held: Sequence[Row] = (), **options: object) -> Checks:
    checks = Checks(**options)  # pyright: ignore[reportArgumentType]
    for number, row in enumerate([*train, *held]):
        checks.add(row, "train" if number < len(train) else "test", number)
    return checks


def found(checks: Checks, kind: str) -> list[Finding]:
    return [finding for finding in checks.findings() if finding.kind == kind]


def one(checks: Checks, kind: str) -> Finding:
    findings = found(checks, kind)
    assert len(findings) == 1, checks.findings()
    return findings[0]
