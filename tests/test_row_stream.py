"""Rows as a stream: mixed formats, groups and strata, what is not used, and one pass that counts every defect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversions import ANSWER, USER, convert, refusal, stream
from tunesmith.base import InputError
from tunesmith.data.read import Reading
from tunesmith.data.record import RowErrors
from tunesmith.data.rows import PEEKED, open_rows

PAIR = {"prompt": "Hi", "completion": "Hello"}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"text": "a"}, {"text": "a", "label": "b"}, "in the format 'labelled'"),
        ({"text": "a"}, {"text": "a", "summary": "b"}, "a text with 'summary' beside it"),
        (PAIR, {"messages": [USER, ANSWER]}, "in the format 'messages'"),
        (PAIR, {**PAIR, "chosen": "a", "rejected": "b"}, "in the format 'preference'"),
        ({"messages": [USER, ANSWER]}, {"conversations": [USER, ANSWER]}, "in the format 'sharegpt'"),
    ],
)
def test_mixed_formats_are_named(first: dict[str, Any], second: dict[str, Any], said: str) -> None:
    error = refusal(first, second)
    assert error.what.startswith(f"rows.jsonl:2: mixed formats: this row ({', '.join(sorted(second))}) is {said}")
    assert "which the first row has" in (error.fix or "")


def test_rows_of_formats_that_are_read_alike_may_be_mixed() -> None:
    _, rows = convert({"instruction": "a", "context": "b", "response": "c"}, {"instruction": "a", "response": "c"})
    assert len(rows) == 2
    assert len(convert({"text": "a", "label": "b"}, {"text": "a", "category": "c"})[1]) == 2
    assert len(convert({"text": "a"}, {"text": "a", "label": "b"}, format="text")[1]) == 2


def test_the_columns_of_the_first_thousand_rows_are_known() -> None:
    rows = [PAIR] * (PEEKED - 1) + [{**PAIR, "kind": "x"}] + [{**PAIR, "later": "y"}]
    assert stream(*rows).columns == ["completion", "kind", "prompt"]
    with pytest.raises(InputError, match="there is no column 'later'"):
        stream(*rows, columns={"prompt": "later", "completion": "completion"})


def test_what_is_not_used_is_told() -> None:
    assert stream({**PAIR, "id": 7, "url": "x"}).notes == ["rows.jsonl: columns not used: id, url"]
    assert stream({**PAIR, "id": 7}, group="id").notes == []
    assert stream({"q": "a", "a": "b", "x": 1}, columns={"prompt": "Ask {q}", "completion": "a"}).notes == [
        "rows.jsonl: columns not used: x"
    ]
    [many] = stream({**PAIR, **{f"c{at}": 1 for at in range(11)}}).notes
    assert many.endswith("and 3 more")


def test_groups_and_strata() -> None:
    rows = [
        {**PAIR, "user": {"id": 7, "of": ["a"]}, "a.b": "x"},
        {**PAIR, "user": {"id": "7"}, "a.b": "y"},
        {**PAIR, "user": None, "a.b": "z"},
    ]
    errors = RowErrors()
    found = list(stream(*rows, errors=errors, group="user.id", stratify="a.b"))
    assert [(row.group, row.stratum) for row in found] == [("7", "x"), ("7", "y")]
    assert errors.shown == ["rows.jsonl:3: there is no 'user.id', by which rows are put together"]
    assert convert(*rows[:1], group="user.of")[1][0].group == '["a"]'
    for key in ("group", "stratify"):
        error = refusal(*rows, **{key: "usr.id"})
        assert f"there is no field 'usr.id'; did you mean 'user'?, which `{key}` names" in error.what


def test_a_nul_character_is_no_text() -> None:
    for row in (
        {"prompt": "a\0", "completion": "b"},
        {"prompt": "a", "completion": "b\0"},
        {"prompt": "a", "chosen": "b", "rejected": "c\0"},
        {"text": "a\0"},
    ):
        assert "rows.jsonl:1: a NUL character (\\u0000) stands in the text" in refusal(row).what


def test_one_pass_counts_defects_of_the_reader_and_of_the_rows(tmp_path: Path) -> None:
    lines = [json.dumps(PAIR), "{", json.dumps({"prompt": "a"}), json.dumps({"text": "a"}), json.dumps(PAIR)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(lines))
    errors = RowErrors()
    for name in ("a.jsonl", "b.jsonl"):
        assert len(list(open_rows(Reading(str(tmp_path / name)), errors))) == 2
    with pytest.raises(InputError) as caught:
        errors.raise_any()
    shown = caught.value.what.splitlines()
    assert [line.rpartition("/")[2][:9] for line in shown[:-1]] == [f"{n}.jsonl:{at}" for n in "ab" for at in (2, 3, 4)]
    assert shown[-1] == "6 rows are wrong"
    assert caught.value.fix == (
        "every line of a JSONL file is one JSON object\n  → every row must be in the format 'prompt-completion', "
        "which the first row has; declare another in data.format"
    )
    assert str(errors.first) == f"{tmp_path / 'a.jsonl'}:2"


def test_a_source_of_which_nothing_can_be_read_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n[\n")
    with pytest.raises(InputError, match="2 rows are wrong"):
        open_rows(Reading(str(tmp_path / "a.jsonl")), RowErrors())
