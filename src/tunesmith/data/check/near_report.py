"""Near duplicates and near leakage in words: which rows, near to which, and where they differ."""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np

from tunesmith.data.check.finding import SHOWN, Finding, Instance, agreeing, counted, quoted
from tunesmith.data.check.near import Near, Texts
from tunesmith.data.check.said import rows_with
from tunesmith.data.check.words import words_of

COMPARED = 400
"""Words of a text that are compared to say where two differ."""


def near_findings(near: Near, texts: Texts, threshold: float) -> list[Finding]:
    return [*_leakage(near, texts), *_duplicates(near, texts, threshold)]


def near_flagged(near: Near, texts: Texts) -> dict[str, list[int]]:
    """Training rows that `--fix` drops: all of a cluster but its first text, and all that are near a held-out row.

    Rows that are the same after folding case and space go together, so a row may be listed here that `rows` of the
    finding, which counts distinct texts, does not count.
    """
    copies = [text for cluster in near.clusters for text in cluster[1:]]
    columns = texts.columns
    return {
        kind: rows_with(np.isin(near.unit, which) & columns.training, columns.number)
        for kind, which in (("near-leakage", list(near.leaks)), ("near-duplicates", copies))
        if which
    }


def _duplicates(near: Near, texts: Texts, threshold: float) -> list[Finding]:
    if not near.clusters:
        return []
    pairs = [(text, cluster[0]) for cluster in near.clusters for text in cluster[1:]]
    first = texts.first_training
    pairs.sort(key=lambda pair: int(first[pair[0]]))
    instances = tuple(
        _instance(texts, int(first[a]), int(first[b]), "nearly the same as an earlier row") for a, b in pairs[:SHOWN]
    )
    title = (
        f"{counted(len(pairs), 'training row')} {agreeing(len(pairs), 'repeats', 'repeat')} an earlier one almost word "
        f"for word ({counted(len(near.clusters), 'group')}, similarity {threshold:g} or more)"
    )
    fix = (
        "`tunesmith data check --fix OUT` keeps the first of each group; with data.group they at least stay on one side"
    )
    of = int((first >= 0).sum())
    return [Finding("near-duplicates", "warning", title, len(pairs), of, instances, fix)]


def _leakage(near: Near, texts: Texts) -> list[Finding]:
    if not near.leaks:
        return []
    training, held = texts.first_training, texts.first_held
    pairs = sorted((int(training[a]), int(held[b])) for a, b in near.leaks.items())
    instances = tuple(_instance(texts, a, b, "nearly the same as a held-out row") for a, b in pairs[:SHOWN])
    count = len(pairs)
    title = (
        f"{counted(count, 'training row')} {agreeing(count, 'is', 'are')} almost word for word in the held-out rows, "
        "so that a score there flatters"
    )
    fix = "`tunesmith data check --fix OUT` drops them from training; or split by data.group"
    return [Finding("near-leakage", "problem", title, count, int((training >= 0).sum()), instances, fix)]


def _instance(texts: Texts, row: int, twin: int, what: str) -> Instance:
    one, other = texts.store.texts(row), texts.store.texts(twin)
    shown = quoted(one[0].strip() or one[1])
    return Instance(
        str(texts.store.source(row)), f"{what}: {shown}{difference(one, other)}", str(texts.store.source(twin))
    )


def difference(one: tuple[str, str], other: tuple[str, str]) -> str:
    """``; here "red", there "blue"`` for the first words that differ."""
    left, right = ([word for text in pair for word in words_of(text)] for pair in (one, other))
    if left == right:
        return "; only punctuation and signs differ"
    for tag, a, b, c, d in SequenceMatcher(None, left[:COMPARED], right[:COMPARED], autojunk=False).get_opcodes():
        if tag != "equal":
            here, there = " ".join(left[a:b]), " ".join(right[c:d])
            return f"; {_said(here, 'here')}, {_said(there, 'there')}"
    return f"; they differ after {COMPARED} words"


def _said(text: str, where: str) -> str:
    return f"{where} {quoted(text, 30)}" if text else f"{where} nothing"
