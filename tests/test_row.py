"""The row itself: what makes two rows the same, and that it survives being written down."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.base import Source
from tunesmith.data.row import Row

USER, ANSWER, WORSE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "Go"},
)
PLACE = Source("rows.jsonl", 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAME = TEXT.filter(lambda name: name not in ("role", "content"))
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
MESSAGE = st.builds(
    lambda role, content, rest: {"role": role, "content": content, **rest},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    TEXT,
    st.dictionaries(NAME, VALUE, max_size=2),
)


def many(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=4).map(tuple)


ROWS = st.builds(
    Row,
    source=st.builds(Source, TEXT, st.integers(1, 10**9)),
    messages=many(MESSAGE),
    text=TEXT,
    references=many(TEXT),
    task=st.none() | TEXT.filter(bool),
    tools=many(st.dictionaries(TEXT, VALUE, max_size=2)),
    rejected=many(MESSAGE),
    words=many(TEXT),
    labels=many(TEXT),
    group=st.none() | TEXT.filter(bool),
    stratum=st.none() | TEXT.filter(bool),
)


@given(ROWS)
def test_a_row_survives_being_written(row: Row) -> None:
    line = row.to_json()
    assert "\n" not in line
    again = Row.from_json(line)
    assert again == row
    assert (again.key, again.prompt_key) == (row.key, row.prompt_key)
    assert again.to_json() == line


def test_an_empty_group_is_not_no_group() -> None:
    row = Row(PLACE, text="x", group="", stratum="", task="")
    assert Row.from_json(row.to_json()) == row


def test_a_value_that_json_does_not_have_is_written_as_text() -> None:
    row = Row(PLACE, ({**USER, "when": datetime.date(2020, 1, 2)}, ANSWER))
    assert Row.from_json(row.to_json()).messages[0]["when"] == "2020-01-02"


def test_pairs_that_differ_in_the_rejected_answer_are_no_duplicates() -> None:
    pair = Row(PLACE, (USER, ANSWER), rejected=(USER, WORSE))
    for other in (
        replace(pair, rejected=(USER, {**WORSE, "content": "Leave"})),
        replace(pair, rejected=()),
        replace(pair, messages=(USER, {**ANSWER, "content": "Hey"})),
    ):
        assert pair.key != other.key and pair.prompt_key == other.prompt_key
    assert pair.key == replace(pair, source=Source("b.jsonl", 7), group="g").key


def test_words_with_other_labels_are_another_row_of_the_same_prompt() -> None:
    row = Row(PLACE, words=("Ada", "sings"), labels=("PER", "O"))
    other = replace(row, labels=("O", "O"))
    assert row.key != other.key and row.prompt_key == other.prompt_key
    assert row.prompt_key == replace(row, words=("ADA", " sings ")).prompt_key
    assert row.key != replace(row, words=("Ada sings",)).key
    assert row.prompt_key != Row(PLACE, text="x").prompt_key


def test_whatever_a_turn_holds_counts() -> None:
    row = Row(PLACE, (USER, ANSWER))
    for more in ({"weight": 0}, {"name": "Ada"}, {"reasoning_content": "Hm"}, {"tool_calls": []}):
        assert row.key != Row(PLACE, (USER, {**ANSWER, **more})).key
        assert row.prompt_key != Row(PLACE, ({**USER, **more}, ANSWER)).prompt_key
    assert len(row.key) == len(row.prompt_key) == 32
