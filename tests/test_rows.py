"""Every format, detected and declared; columns and templates; and each row that says less than it seems to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conversions import ANSWER, USER, Turns, convert, refusal, turns
from tunesmith.data.formats import preference_advice
from tunesmith.data.record import SHOWN_ERRORS
from tunesmith.data.rows import Row

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}


FORMATS: dict[str, tuple[str, dict[str, Any], Turns]] = {
    "messages": ("messages", {"messages": [USER, ANSWER], "id": 7}, [("user", "Hi"), ("assistant", "Hello")]),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be brief"},
        [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello")],
    ),
    "sharegpt with OpenAI's names": (
        "sharegpt",
        {"conversations": [USER, ANSWER]},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        [("user", "Add\n\n1 and 2"), ("assistant", "3")],
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Sing", "input": "", "output": "La"},
        [("user", "Sing"), ("assistant", "La")],
    ),
    "alpaca with a system": (
        "alpaca",
        {"instruction": "Sing", "output": "La", "system": "You sing"},
        [("system", "You sing"), ("user", "Sing"), ("assistant", "La")],
    ),
    "dolly": (
        "dolly",
        {"instruction": "Why?", "context": "It rains.", "response": "Clouds", "category": "closed_qa"},
        [("user", "Why?\n\nIt rains."), ("assistant", "Clouds")],
    ),
    "instruction-response": (
        "instruction-response",
        {"instruction": "Why?", "response": "Clouds"},
        [("user", "Why?"), ("assistant", "Clouds")],
    ),
    "prompt-completion": (
        "prompt-completion",
        {"prompt": "Hi", "completion": "Hello", "source": "x"},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    "prompt-completion of turns": (
        "prompt-completion",
        {"prompt": [{"role": "system", "content": "Be"}, USER], "completion": [ANSWER]},
        [("system", "Be"), ("user", "Hi"), ("assistant", "Hello")],
    ),
    "task": (
        "task",
        {"task": "upper", "input": "hi", "output": "HI"},
        [("user", "hi"), ("assistant", "HI")],
    ),
    "alpaca with the name of a task": (
        "alpaca",
        {"task": "upper", "instruction": "Upper-case", "input": "hi", "output": "HI"},
        [("user", "Upper-case\n\nhi"), ("assistant", "HI")],
    ),
    "labelled": ("labelled", {"text": "Great", "label": "good"}, [("user", "Great"), ("assistant", "good")]),
    "labelled by category": (
        "labelled",
        {"text": "Where is my card?", "category": "card_arrival"},
        [("user", "Where is my card?"), ("assistant", "card_arrival")],
    ),
    "text": ("text", {"text": "Once upon a time", "title": "Tale"}, []),
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("declared", [False, True])
def test_every_format_is_detected_and_can_be_declared(case: str, declared: bool) -> None:
    name, fields, expected = FORMATS[case]
    found, [row] = convert(fields, format=name if declared else "auto")
    assert found == name
    assert turns(row) == expected
    if expected:
        assert row.references == (expected[-1][1],)
    else:
        assert (row.text, row.references) == ("Once upon a time", ())
    assert row.task == ("upper" if name == "task" else None)


def test_columns_are_mapped_and_templates_filled() -> None:
    paper = {"id": "x1", "document": "We show {things}.", "summaries": ["Things.", "Shown."], "prompt": "not this"}
    columns = {"prompt": "Summarise: {document}", "completion": "summaries"}
    name, [row] = convert(paper, columns=columns)
    assert name == "prompt-completion"
    assert turns(row) == [("user", "Summarise: We show {things}."), ("assistant", "Things.")]
    assert row.references == ("Things.", "Shown.")
    _, [braces] = convert(paper, columns={**columns, "prompt": 'Answer as {{"id": "{id}"}}: {document}'})
    assert braces.messages[0]["content"] == 'Answer as {"id": "x1"}: We show {things}.'
    odd = {"School/Club": "Ajax", "What {x}": "1"}
    _, [named] = convert(odd, columns={"prompt": "Of {School/Club}", "completion": "What {x}"})
    assert turns(named) == [("user", "Of Ajax"), ("assistant", "1")]


def test_parts_that_are_not_mapped_are_read_only_where_they_are_needed() -> None:
    both = {"instruction": "Sing", "input": "softly", "output": "La", "better": "La la"}
    _, [completed] = convert(both, columns={"output": "better"})
    assert turns(completed) == [("user", "Sing\n\nsoftly"), ("assistant", "La la")]
    _, [only] = convert(both, columns={"instruction": "instruction", "output": "better"})
    assert turns(only) == [("user", "Sing"), ("assistant", "La la")]


def test_a_column_that_only_some_rows_have() -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d", "more": "e"}]
    _, found = convert(*rows, columns={"instruction": "q", "input": "more", "output": "a"})
    assert [row.messages[0]["content"] for row in found] == ["a", "c\n\ne"]
    error = refusal(*rows, columns={"prompt": "{q} {more}", "completion": "a"})
    assert "rows.jsonl:1: there is no column 'more'" in error.what and "1 row is wrong" in error.what
    error = refusal(*rows, columns={"prompt": "q", "completion": "more"})
    assert "rows.jsonl:1: there is no 'completion'" in error.what


@pytest.mark.parametrize(
    ("columns", "key", "what", "fix"),
    [
        ({"promt": "q", "completion": "a"}, "promt", "no part of a row; did you mean 'prompt'?", "parts: "),
        ({"prompt": "quest", "completion": "a"}, "prompt", "no column 'quest'; did you mean 'question'?", "question"),
        ({"prompt": "Ask: {questoin}", "completion": "a"}, "prompt", "did you mean 'question'?", "in braces"),
        ({"prompt": "Ask:", "completion": "a"}, "prompt", "there is no column 'Ask:'", "'Summarise: {document}'"),
        ({"prompt": 'As {"a": 1}', "completion": "a"}, "prompt", "there is no column '\"a\": 1'", "write {{ and }}"),
        ({"prompt": "Ask: {}", "completion": "a"}, "prompt", "there is no column ''", "in braces"),
    ],
)
def test_a_mapping_that_names_nothing_is_refused(columns: dict[str, str], key: str, what: str, fix: str) -> None:
    error = refusal({"question": "Hi", "a": "Hello"}, columns=columns)
    assert error.where == f"data.columns.{key}"
    assert what in error.what and fix in (error.fix or "")


@pytest.mark.parametrize(
    ("columns", "what", "fix"),
    [
        (["id", "document", "summaries"], "document, id, summaries", "{prompt: document, completion: summaries}"),
        (["Question", "Answer"], "Answer, Question", "{prompt: Question, completion: Answer}"),
        (["query", "sql"], "query, sql", "{prompt: query, completion: sql}"),
        (["promt", "completion"], "(promt; did you mean 'prompt'?)", "data.columns"),
        (["a", "b"], "a, b", "{prompt: question, completion: answer}"),
        ([], "(none)", "{prompt: question, completion: answer}"),
    ],
)
def test_unknown_columns_are_answered_with_a_mapping(columns: list[str], what: str, fix: str) -> None:
    error = refusal(dict.fromkeys(columns, "x"))
    assert error.where == "rows.jsonl:1"
    assert what in error.what and fix in (error.fix or "")


def test_a_declared_format_that_the_file_does_not_have_is_one_error() -> None:
    error = refusal(*[{"prompt": "a", "completion": "b"}] * 30, format="alpaca")
    assert "rows of the format 'alpaca' have the columns instruction, output" in error.what
    assert len(error.what.splitlines()) == 1
    error = refusal({"text": "a", "lable": "b"}, format="labelled")
    assert "there is no 'label'; did you mean 'lable'?" in error.what


def test_text_beside_answers_is_not_taken_for_raw_text() -> None:
    """Training on every token of a text whose summary stands beside it would go unnoticed."""
    error = refusal({"text": "Long", "summary": "Short"})
    assert "'summary'" in error.what and "{prompt: text, completion: summary}" in (error.fix or "")
    assert convert({"text": "Long", "summary": "Short"}, format="text")[1][0].text == "Long"
    assert convert({"text": "Long", "title": "T", "url": "u"})[0] == "text"


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, {"completion": "chosen"}),
        ({"instruction": "Hi", "input": "", "output": "x", "chosen": "Hello", "rejected": "Go"}, {"output": "chosen"}),
        ({"question": "Hi", "chosen": "Hello", "rejected": "Go"}, {"prompt": "question", "completion": "chosen"}),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, {"messages": "chosen"}),
    ],
)
def test_preference_pairs_are_told_apart_and_the_advice_works(fields: dict[str, Any], columns: dict[str, str]) -> None:
    name, [pair] = convert(fields) if "question" not in fields else convert(fields, columns={"prompt": "question"})
    assert name == "preference" and pair.rejected
    advised = "{" + ", ".join(f"{part}: {column}" for part, column in columns.items()) + "}"
    assert advised in preference_advice(fields)
    _, [row] = convert(fields, columns=columns)
    assert turns(row) == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "3"), (0, "0"), (2.5, "2.5"), ("yes", "yes"), (None, ""), ([], ""), (["", "b"], "b"), ([1, 2], "1")],
)
def test_what_an_answer_may_be(value: Any, said: str) -> None:
    """Class numbers are what the model learns to say; nothing is an empty answer, which `data.empty` decides about."""
    _, [row] = convert({"text": "Great", "label": value})
    assert row.messages[-1]["content"] == said


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (True, "must be text, found True"),
        (float("nan"), "must be text, found nan"),
        ({"text": ["a"]}, "must be text, found dict"),
        (["a", {"b": 1}], "must be text or a list of texts"),
        (b"a", "must be text, found bytes"),
    ],
)
def test_what_an_answer_may_not_be(value: Any, what: str) -> None:
    assert what in refusal({"text": "Great", "label": value}).what


def test_rows_of_other_formats_are_counted_and_named() -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}
    error = refusal(good, *[bad] * 23)
    shown = error.what.splitlines()
    assert shown[0] == (
        "rows.jsonl:2: mixed formats: this row (instruction, output) is in the format 'alpaca', the first one is in "
        "'prompt-completion'"
    )
    assert len(shown) == SHOWN_ERRORS + 2 and shown[-1] == "23 rows are wrong"
    assert "'prompt-completion', which the first row has" in (error.fix or "")


CONVERSATIONS: list[tuple[Any, str]] = [
    ("text", "must be a list of turns, found str"),
    ([], "found an empty list"),
    (None, "found nothing"),
    ([USER], "there is no assistant turn to train on"),
    ([USER, ANSWER, USER], "the last turn is 'user'"),
    ([USER, USER, ANSWER], "two user turns in a row (turns 1 and 2)"),
    ([ANSWER], "the assistant speaks first"),
    ([{"role": "system", "content": "x"}, ANSWER], "the assistant speaks after 'system'"),
    ([USER, ANSWER, ANSWER], "the assistant speaks after 'assistant' (turn 3)"),
    ([USER, {"role": "system", "content": "x"}, ANSWER], "'system' at turn 2 comes after"),
    ([USER, {"role": "tool", "content": "3"}, ANSWER], "a tool answers at turn 2 without being called"),
    ([USER, {"role": "asistant", "content": "x"}], "unknown role 'asistant'; did you mean 'assistant'?"),
    ([USER, {"role": 5, "content": "x"}], "unknown role 5"),
    ([USER, {"role": None, "content": "x"}], "unknown role None"),
    ([USER, {"content": "x"}], "turn 2 is not an object with a role"),
    ([USER, "Hello"], "turn 2 is not an object with a role"),
    ([USER, {"role": "assistant"}], "the content of turn 2 must be text, found nothing"),
    ([USER, {"role": "assistant", "content": 5}], "the content of turn 2 must be text, found int"),
    ([USER, {"role": "assistant", "content": [{"type": "image_url"}]}], "a part of the type 'image_url'"),
    ([USER, {"role": "assistant", "content": ["x"]}], "a part of the type 'str'"),
    ([USER, {**ANSWER, "weight": 1.5}], "the weight of turn 2 must be a number from 0 to 1, found 1.5"),
    ([USER, {**ANSWER, "weight": -0.1}], "the weight of turn 2 must be a number from 0 to 1"),
    ([USER, {**ANSWER, "weight": float("nan")}], "the weight of turn 2 must be a number from 0 to 1"),
    ([USER, {**ANSWER, "weight": "1"}], "the weight of turn 2 must be a number from 0 to 1"),
    ([USER, {**CALL, "tool_calls": [{"id": 1}]}], "a tool call without the name"),
    ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments of a tool call in turn 2 are not"),
]


@pytest.mark.parametrize(("conversation", "what"), CONVERSATIONS)
def test_a_conversation_that_is_none_is_refused(conversation: Any, what: str) -> None:
    error = refusal({"messages": [USER, ANSWER]}, {"messages": conversation})
    assert error.what.startswith("rows.jsonl:2: ") and what in error.what


def test_a_longer_conversation_is_kept_whole() -> None:
    system = {"role": "developer", "content": "Be"}
    conversation = [system, USER, {**ANSWER, "name": "Ada", "weight": 0.25, "audio": None}, USER, ANSWER]
    _, [row] = convert({"messages": conversation})
    expected = [("developer", "Be"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Hi"), ("assistant", "Hello")]
    assert turns(row) == expected
    assert row.messages[2] == {"role": "assistant", "content": "Hello", "name": "Ada", "weight": 0.25}


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    _, [row] = convert({"messages": [USER, {"role": "assistant", "content": parts}]})
    assert row.references == ("Hello",)


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_and_tools_are_kept(as_text: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    conversation = [USER, CALL, {"role": "tool", "content": "3", "tool_call_id": "c1"}, ANSWER]
    _, [row] = convert({"messages": conversation, "tools": json.dumps(tools) if as_text else tools})
    assert row.messages[1]["content"] == ""
    assert row.messages[1]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 1}}}]
    assert row.messages[2]["tool_call_id"] == "c1"
    assert row.tools == tuple(tools)
    other = json.loads(json.dumps(conversation).replace("add", "sub"))
    _, [changed] = convert({"messages": other, "tools": tools})
    assert row.key != changed.key and row.prompt_key != changed.prompt_key
    assert "'tools' must be a list" in refusal({"messages": conversation, "tools": {"add": 1}}).what
    assert "not JSON" in refusal({"messages": conversation, "tools": "[{"}).what


def test_the_answer_begins_after_the_marker() -> None:
    text = "table: t\nQ: Who? \nA: SELECT who FROM t"
    name, [row] = convert({"text": text}, answer_after="\nA: ")
    assert name == "text"
    assert turns(row) == [("user", "table: t\nQ: Who? \nA: "), ("assistant", "SELECT who FROM t")]
    assert row.references == ("SELECT who FROM t",)
    error = refusal({"text": text}, {"text": "Q: Who?"}, {"text": text + text}, answer_after="\nA: ")
    first, second, _ = error.what.splitlines()
    assert first.startswith("rows.jsonl:2: the marker '\\nA: '") and "does not occur" in first
    assert second.startswith("rows.jsonl:3: ") and "occurs 2 times" in second
    error = refusal({"prompt": "a", "completion": "b"}, answer_after="x")
    assert error.where == "data.answer_after" and "these rows are prompt-completion" in error.what


def test_a_system_turn_is_put_where_there_is_none() -> None:
    own = {"messages": [{"role": "system", "content": "Mine"}, USER, ANSWER]}
    _, rows = convert({"messages": [USER, ANSWER]}, own, system="Be brief")
    assert [turns(row)[0] for row in rows] == [("system", "Be brief"), ("system", "Mine")]
    _, [raw] = convert({"text": "Once"}, system="Be brief")
    assert raw.messages == () and raw.text == "Once"
    _, [column] = convert({"prompt": "a", "completion": "b", "system": "Column"}, system="Be brief")
    assert turns(column)[0] == ("system", "Column")


def test_keys_fold_the_prompt_and_keep_the_row_exact() -> None:
    def row(prompt: str, answer: str) -> Row:
        return convert({"prompt": prompt, "completion": answer})[1][0]

    assert row("Say  HI\n", "a").prompt_key == row("say hi", "b").prompt_key
    assert row("say hi", "a").key != row("say HI", "a").key
    assert row("say hi", "a").key == row("say hi", "a").key
    assert row("a", "b").prompt_key != row("a b", "b").prompt_key
