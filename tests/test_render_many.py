"""Many rows at once are rendered as one by one, and a conversation is written as transformers writes it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import FAMILIES, Kind, tokenizer
from rendering import TURNS, conversation, renderer, row
from tunesmith.base import InputError, Source
from tunesmith.data.formats import BadRow
from tunesmith.data.render import ROWS_AT_ONCE, Rendered, Renderer, TrainOn
from tunesmith.data.rows import Row
from tunesmith.models.templates import Template

TOOLS = ({"type": "function", "function": {"name": "add", "description": "Say <|im_end|>", "parameters": {}}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "text": "<|eot_id|>"}}}
PARTS = ["Paris", "the answer ", "  ", "\n", "é", "a\u0301", "日本", "🙂", "<|im_end|>", "</s>", "<s>", "<|eot_id|>"]
PARTS += ["<|<|im_end|>im_end|>", "<think>\nhm\n</think>\n\n", "<｜User｜>", "<|user|>", "<end_of_turn>", "\ufdd0"]

texts = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)


@st.composite
def rows_of_any_kind(draw: st.DrawFn) -> Row:
    if draw(st.integers(0, 9)) == 0:
        return Row(Source("rows.jsonl", 1), text=draw(texts))
    said = draw(st.lists(texts, min_size=1, max_size=3).flatmap(lambda some: st.just([*some, *some])))
    messages = conversation(*said, system=draw(st.none() | texts))
    messages[-1] |= draw(st.sampled_from([{}, {"weight": 0}, {"weight": 0.25}, {"reasoning_content": "Well"}]))
    if draw(st.integers(0, 5)):
        return row(messages)
    return row([*messages[:-1], messages[-1] | {"tool_calls": [CALL], "content": draw(texts)}], tools=TOOLS)


def result(item: Rendered | Exception) -> Any:
    if isinstance(item, Exception):
        return type(item), str(item)
    weights = item.example.tensors["target_weights"].tolist()
    return item.row, item.example.token_ids.tolist(), weights, item.prompt_ids, item.example.source


def one_by_one(here: Renderer, rows: list[Row]) -> list[Rendered | Exception]:
    found: list[Rendered | Exception] = []
    for item in rows:
        try:
            found.append(here.render(item))
        except BadRow as error:
            found.append(error)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train_on", ["answers", "last-answer", "everything"])
@settings(max_examples=12, deadline=None)
@given(rows=st.lists(rows_of_any_kind(), max_size=6))
def test_many_rows_are_rendered_as_one_by_one(name: str, train_on: TrainOn, rows: list[Row]) -> None:
    family = FAMILIES[name]
    alone, together = (renderer(family.tokenizer(), train_on, stops=family.stop_ids()) for _ in range(2))
    assert list(map(result, together.render_many(rows))) == list(map(result, one_by_one(alone, rows)))
    assert (together.stop_ids, together.notes) == (alone.stop_ids, alone.notes)
    assert together.used_controls == alone.used_controls


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "llama-2"])
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(rows_of_any_kind(), max_size=6))
def test_many_rows_of_the_plain_layout(kind: Kind, rows: list[Row]) -> None:
    of = tokenizer(("<s>", "</s>"), "<s>", "</s>", None, kind)
    alone, together = (renderer(of, template="plain") for _ in range(2))
    assert list(map(result, together.render_many(rows))) == list(map(result, one_by_one(alone, rows)))


def test_stretches_between_control_tokens_are_tokenized_as_in_the_whole() -> None:
    """The quick way takes a text apart at its control tokens; the ids are those of the whole text all the same."""
    for name, family in FAMILIES.items():
        of = family.tokenizer()
        here = renderer(of, "last-answer")
        rows = [row(conversation(*TURNS)), row(conversation(" Hi\n", "\n\n 3  é日本🙂 \n"))]
        for item in here.render_many(rows):
            assert isinstance(item, Rendered)
            whole = of.apply_chat_template(list(item.row.messages), tokenize=False)
            whole += "" if family.closes else family.ending
            assert item.example.token_ids.tolist() == of(whole, add_special_tokens=False)["input_ids"], name


def test_more_rows_than_are_tokenized_at_once_keep_their_order() -> None:
    of = FAMILIES["chatml"].tokenizer()
    rows = [row(conversation(f"Hi {at}", "\ufdd0" if at % 50 == 7 else f"Answer {at}")) for at in range(2400)]
    assert len(rows) > 2 * ROWS_AT_ONCE
    found = renderer(of).render_many(rows)
    assert [at for at, item in enumerate(found) if isinstance(item, BadRow)] == list(range(7, 2400, 50))
    assert all(item.row is given for item, given in zip(found, rows, strict=True) if isinstance(item, Rendered))
    assert renderer(of).render_many([]) == []


def test_a_template_that_is_unfit_is_one_error_for_many_rows() -> None:
    of = FAMILIES["mistral"].tokenizer()
    with pytest.raises(InputError, match="never closes an answer"):
        renderer(of, template="chatml").render_many([row(conversation(*TURNS[:2]))] * 3)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(item=rows_of_any_kind(), generation_prompt=st.booleans())
def test_conversations_are_written_as_transformers_writes_them(name: str, item: Row, generation_prompt: bool) -> None:
    of = FAMILIES[name].tokenizer()
    messages, tools = list(item.messages), list(item.tools) or None
    try:
        expected: Any = of.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception:
        expected = None
    template = Template(name, of.chat_template, of)
    try:
        found = template.text(messages, generation_prompt=generation_prompt, tools=tools or ())
    except Exception:
        found = None
    assert found == expected
