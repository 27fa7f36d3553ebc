"""Prompts that stand in the data with different answers."""

from __future__ import annotations

import numpy as np

from tunesmith.data.check.finding import SHOWN, Finding, Instance, agreeing, counted, quoted
from tunesmith.data.check.said import Columns, Store


def contradictory_answers(store: Store, columns: Columns) -> list[Finding]:
    """Conversations of one split with the same prompt (system turn and tools included, case and white space folded).

    Answers are compared folded too, without punctuation at their ends. Rows that list several right answers and
    preference pairs are left out: there different answers are meant.
    """
    rows = np.flatnonzero(columns.one_answer)
    key = columns.prompt[rows] ^ (columns.split[rows].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    order = np.lexsort((rows, columns.answer[rows], key))
    rows, key = rows[order], key[order]
    answer = columns.answer[rows]
    begins = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(rows) else np.empty(0, dtype=np.int64)
    ends = np.append(begins[1:], len(rows))
    several = answer[begins] != answer[ends - 1] if len(rows) else np.empty(0, dtype=bool)
    concerned = int((ends - begins)[several].sum())
    if not concerned:
        return []
    pairs = []
    for begin, end in zip(begins[several].tolist(), ends[several].tolist(), strict=True):
        first = begin + int(np.argmin(rows[begin:end]))
        others = rows[begin:end][answer[begin:end] != answer[first]]
        pairs.append((int(rows[first]), int(others.min())))
    title = (
        f"{counted(len(pairs), 'prompt')} {agreeing(len(pairs), 'has', 'have')} different answers in "
        f"{counted(concerned, 'row')}"
    )
    fix = (
        "decide on one answer for each; if all of them are right, list them in one row, as in "
        '"completion": ["this", "that"]'
    )
    instances = tuple(_instance(store, *pair) for pair in sorted(pairs)[:SHOWN])
    return [
        Finding("contradictory-answers", "warning", title, concerned, int(columns.one_answer.sum()), instances, fix)
    ]


def _instance(store: Store, first: int, second: int) -> Instance:
    (prompt, answer), (_, other) = store.texts(first), store.texts(second)
    # Templates stand at the beginning, what is asked at the end.
    asked = prompt if len(prompt) <= 60 else "…" + prompt[-50:]
    what = f"{quoted(asked)} is answered {quoted(answer, 40)} and {quoted(other, 40)}"
    return Instance(str(store.source(first)), what, str(store.source(second)))
