"""OpenAssistant's trees: nested or scattered over a table, each becomes the path of its best-ranked replies."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversions import convert, refusal, stream, turns
from tunesmith.data.record import RowErrors


def message(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    role = "prompter" if text.startswith("q") else "assistant"
    return {"text": text, "role": role, "replies": list(replies), **more}


TREE = message(
    "q1",
    message("a-unranked"),
    message("a-second", rank=1),
    message("a-deleted", rank=-1, deleted=True),
    message(
        "a-best",
        message("q2", message("b-last"), message("b-first", message("q3"), rank=0), rank=0),
        message("q2-worse", message("c"), rank=2),
        rank=0,
    ),
)
BEST = [("user", "q1"), ("assistant", "a-best"), ("user", "q2"), ("assistant", "b-first")]


def flat(tree: dict[str, Any], parent: str | None = None, name: str = "m") -> list[dict[str, Any]]:
    """The messages of a tree as the table on the hub has them."""
    fields = {key: value for key, value in tree.items() if key != "replies"}
    found = [{"message_id": name, "parent_id": parent, "rank": None, "deleted": False, "lang": "en", **fields}]
    for at, reply in enumerate(tree["replies"]):
        found += flat(reply, name, f"{name}.{at}")
    return found


@pytest.mark.parametrize("declared", ["auto", "openassistant"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_tree_becomes_the_path_of_the_best_replies(nested: bool, declared: str) -> None:
    rows = [{"message_tree_id": "m", "prompt": TREE}] if nested else flat(TREE)
    name, [row] = convert(*rows, format=declared)
    assert name == "openassistant"
    assert turns(row) == BEST and row.references == ("b-first",)
    assert row.source.line == 1


def test_a_tree_without_its_id_and_replies_in_their_order() -> None:
    _, [row] = convert({"prompt": message("q", message("a"), message("b"))})
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    _, [only] = convert({"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}})
    assert turns(only) == [("user", "q"), ("assistant", "a")]


@given(st.permutations(flat(TREE, name="x") + flat(message("q", message("a")), name="y")))
def test_a_scattered_tree_is_put_together(messages: list[dict[str, Any]]) -> None:
    _, rows = convert(*messages, format="openassistant")
    assert sorted((turns(row) for row in rows), key=len) == [[("user", "q"), ("assistant", "a")], BEST]


@pytest.mark.parametrize("nested", [True, False])
def test_trees_without_an_answer_are_counted_and_no_error(nested: bool) -> None:
    trees = [TREE, message("q"), message("q", message("a", deleted=True)), message("q", message("a"), deleted=True)]
    rows = [{"prompt": tree} for tree in trees]
    if not nested:
        rows = [row for at, tree in enumerate(trees) for row in flat(tree, name=f"t{at}")]
    opened = stream(*rows)
    assert len(list(opened)) == 1
    assert opened.notes == ["rows.jsonl: 3 trees without an answer were left out"]
    opened = stream(
        *rows[:1] if nested else rows[: len(flat(TREE))],
        {"prompt": message("q")} if nested else flat(message("q"), name="z")[0],
    )
    assert len(list(opened)) == 1
    assert opened.notes == ["rows.jsonl: 1 tree without an answer was left out"]


def test_messages_whose_tree_has_no_beginning_are_counted() -> None:
    circle = [{**flat(message("q"), name=name)[0], "parent_id": other} for name, other in (("c", "d"), ("d", "c"))]
    opened = stream(*flat(TREE), *flat(message("a", message("q")), parent="gone", name="o"), *circle)
    assert len(list(opened)) == 1
    assert opened.notes == ["rows.jsonl: 4 messages whose trees have no beginning were left out"]
    opened = stream(*flat(TREE), *flat(message("a"), parent="gone", name="o"))
    list(opened)
    assert opened.notes == ["rows.jsonl: 1 message whose tree has no beginning was left out"]


def test_trees_are_grouped_by_a_field_and_mapped() -> None:
    _, [row] = convert(*flat(TREE), group="lang", system="Be")
    assert row.group == "en" and turns(row)[0] == ("system", "Be")
    named = [{"id": f["message_id"], "up": f["parent_id"], "said": f["text"], "role": f["role"]} for f in flat(TREE)]
    columns = {"message_id": "id", "parent_id": "up", "text": "said", "role": "role"}
    name, [row] = convert(*named, columns=columns)
    assert name == "openassistant" and turns(row)[1] == ("assistant", "a-unranked")


ONE = flat(message("q"))[0]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"prompt": "text"}, "'prompt' must be a message with its replies, found str"),
        ({"prompt": {**message("q"), "replies": [5]}}, "'replies' must be a list of messages"),
        ({"prompt": message("q", {"text": 5, "role": "assistant"})}, "the text of a message must be text, found int"),
        ({"prompt": {"role": "prompter"}}, "the text of a message must be text, found nothing"),
        ({"prompt": {"text": "x", "role": "prmpter"}}, "unknown role 'prmpter'"),
        ({"prompt": message("q", message("a", rank="0"))}, "the rank of a message must be a number, found '0'"),
        ({"prompt": message("q", message("q2", message("a")))}, "two user turns in a row"),
        ({"prompt": message("q", message("a\0"))}, "a NUL character"),
    ],
)
def test_trees_that_are_none(fields: dict[str, Any], what: str) -> None:
    error = refusal({"prompt": TREE}, fields)
    assert error.what.startswith("rows.jsonl:2: ") and what in error.what


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({**ONE, "message_id": None}, "a message needs a 'message_id'"),
        ({**ONE, "message_id": "m"}, "the message_id 'm' stands twice"),
        ({**ONE, "message_id": "n", "parent_id": 5}, "'parent_id' must be text or nothing, found int"),
        ({**ONE, "message_id": "n", "role": "user "}, "unknown role 'user '"),
    ],
)
def test_messages_that_are_none(fields: dict[str, Any], what: str) -> None:
    rows = flat(message("q", message("a")))
    error = refusal(*rows, fields)
    assert error.what.startswith("rows.jsonl:3: ") and what in error.what


def test_a_wrong_path_is_named_with_the_first_message() -> None:
    errors = RowErrors()
    assert list(stream(*flat(message("a", message("q", message("a")))), errors=errors)) == []
    assert errors.shown == ["rows.jsonl:1: roles out of order: the assistant speaks first (turn 1)"]
