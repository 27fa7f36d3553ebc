"""Exactly the answer and its end-of-turn are trained on, and the model is asked as it was trained: for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chat_templates import FAMILIES, IM, KEEPING, MISTRAL, published
from rendering import TURNS, conversation, decoded, renderer, row, spelled, trained
from tunesmith.base import InputError, Source
from tunesmith.data.formats import BadRow
from tunesmith.data.render import TrainOn
from tunesmith.data.rows import Row
from tunesmith.models.templates import NAMED_TEMPLATES, resolve_template

# --- what is trained on ---


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("train_on", ["answers", "last-answer", "everything"])
def test_exactly_the_answer_and_its_end_are_targets(name: str, train_on: TrainOn) -> None:
    family = FAMILIES[name]
    of = family.tokenizer()
    item = renderer(of, train_on).render(row(conversation(*TURNS[:2])))
    if train_on == "everything":
        assert item.example.tensors["target_weights"].tolist() == [0.0] + [1.0] * (len(item.example) - 1)
    else:
        assert trained(of, item) == [spelled(family, TURNS[1])]
    whole = of.apply_chat_template(conversation(*TURNS[:2]), tokenize=False) + ("" if family.closes else family.ending)
    assert item.example.token_ids.tolist() == of(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", KEEPING)
def test_every_answer_or_the_last_one_of_a_longer_conversation(name: str) -> None:
    family = FAMILIES[name]
    of = family.tokenizer()
    messages = conversation(*TURNS)
    both = renderer(of).render(row(messages))
    assert trained(of, both) == [spelled(family, TURNS[1]), spelled(family, TURNS[3])]
    last = renderer(of, "last-answer").render(row(messages))
    assert trained(of, last) == [spelled(family, TURNS[3])]
    everything = renderer(of, "everything").render(row(messages))
    assert everything.example.targets == len(everything.example) - 1
    assert both.example.token_ids.tolist() == last.example.token_ids.tolist() == everything.example.token_ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_asked_as_it_was_trained(name: str) -> None:
    of = FAMILIES[name].tokenizer()
    messages = conversation(*TURNS)
    item = renderer(of, "last-answer").render(row(messages))
    ids = item.example.token_ids.tolist()
    asked = renderer(of).prompt_ids(messages[:-1])
    assert tuple(asked) == item.prompt_ids == tuple(ids[: len(asked)])
    assert item.example.tensors["target_weights"][len(asked) - 1 : len(asked) + 1].tolist() == [0.0, 1.0]


def test_thinking_that_is_taken_out_of_earlier_turns() -> None:
    """Qwen3 writes an empty thought before the last answer only: an earlier answer is not what the model would say."""
    of = FAMILIES["qwen3"].tokenizer()
    for train_on in ("answers", "everything"):
        with pytest.raises(BadRow, match=r"rewrites earlier turns \(turn 2\).*set data.train_on: last-answer"):
            renderer(of, train_on).render(row(conversation(*TURNS)))
    thought = "<think>\nFine is right.\n</think>\n\nI am fine"
    item = renderer(of, "last-answer").render(row(conversation(TURNS[0], thought, TURNS[2], thought)))
    assert trained(of, item) == [thought + "<|im_end|>"]
    assert decoded(of, item.example.token_ids.tolist()).count("Fine is right") == 1


def test_the_stop_token_that_the_model_does_not_name_is_found_once_and_told() -> None:
    of = FAMILIES["chatml-base"].tokenizer()
    end = of.convert_tokens_to_ids("<|im_end|>")
    here = renderer(of)
    for _ in range(3):
        here.render(row(conversation(*TURNS)))
    assert here.stop_ids == {of.eos_token_id, end}
    assert len(here.notes) == 1 and "<|im_end|>" in here.notes[0]
    asked = renderer(of)
    asked.prompt_ids(conversation(TURNS[0]))
    assert asked.stop_ids == {of.eos_token_id, end}


def test_masks_do_not_depend_on_the_order_of_rows() -> None:
    """Phi-3 writes another token after the last answer; what closed the first row must not change the next one."""
    of = FAMILIES["phi-3"].tokenizer()
    rows = [row(conversation(*TURNS[:2])), row(conversation(*TURNS)), row(conversation(*TURNS[2:]))]
    here = renderer(of)
    forwards = [trained(of, here.render(item)) for item in rows]
    there = renderer(of)
    backwards = [trained(of, there.render(item)) for item in reversed(rows)]
    assert forwards == backwards[::-1]


def test_weights_of_single_turns() -> None:
    of = FAMILIES["chatml"].tokenizer()
    messages = conversation(*TURNS)
    messages[1]["weight"] = 0
    assert trained(of, renderer(of).render(row(messages))) == [TURNS[3] + "<|im_end|>"]
    everything = trained(of, renderer(of, "everything").render(row(messages)))
    assert len(everything) == 2 and TURNS[1] not in "".join(everything)


def test_the_closing_token_need_not_be_marked_as_special() -> None:
    of = FAMILIES["chatml"].tokenizer()
    bare = PreTrainedTokenizerFast(
        tokenizer_object=type(of.backend_tokenizer).from_str(_unmarked(of.backend_tokenizer.to_str(), "<|im_end|>")),
        eos_token="<|endoftext|>",
    )
    bare.chat_template = of.chat_template
    assert "<|im_end|>" not in bare.all_special_tokens
    here = renderer(bare)
    assert trained(bare, here.render(row(conversation(*TURNS)))) == [f"{TURNS[1]}<|im_end|>", f"{TURNS[3]}<|im_end|>"]
    hostile = here.render(row(conversation("Say <|im_end|>", "a <|im_end|> b")))
    assert hostile.example.token_ids.tolist().count(bare.convert_tokens_to_ids("<|im_end|>")) == 2


def _unmarked(state: str, token: str) -> str:
    values = json.loads(state)
    for item in values["added_tokens"]:
        item["special"] = item["special"] and item["content"] != token
    return json.dumps(values)


# --- what is refused ---


def of_template(text: str, tmp_path: Path, name: str = "chatml") -> tuple[PreTrainedTokenizerFast, str]:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return FAMILIES[name].tokenizer(), str(path)


CHATML = NAMED_TEMPLATES["chatml"]
REFUSED = {
    "no generation prompt": (
        CHATML.split("{% if add_generation_prompt")[0],
        "writes no generation prompt.*'<|im_start|>assistant",
    ),
    "never closes": (CHATML.replace("<|im_end|>", ""), "never closes an answer"),
    "closes with text": (CHATML.replace("<|im_end|>", "</s>"), "never closes an answer"),
    "doubled opening": ("{{ bos_token }}{{ bos_token }}" + CHATML, "begin-of-text token .* stands twice"),
    "no Jinja": (CHATML + "{% if %}", "not a Jinja template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_is_unfit_for_every_row_is_one_error(case: str, tmp_path: Path) -> None:
    text, what = REFUSED[case]
    family = "llama-3" if case == "doubled opening" else "chatml"
    if family == "llama-3":
        text = text.replace(CHATML, NAMED_TEMPLATES["llama-3"].removeprefix("{{ bos_token }}"))
    of, path = of_template(text, tmp_path, family)
    with pytest.raises(InputError, match=what) as caught:
        renderer(of, template=path).render(row(conversation(*TURNS[:2])))
    assert caught.value.where and caught.value.fix
    assert caught.value.where.startswith(("data.template", path))
    raw = Row(Source("rows.jsonl", 1), text="Raw text needs no template.")
    assert renderer(of, template=path).render(raw).example.targets > 3


def test_a_named_template_whose_tokens_the_vocabulary_lacks_is_refused() -> None:
    of = FAMILIES["mistral"].tokenizer()
    with pytest.raises(InputError, match="never closes an answer with a control token of this tokenizer") as caught:
        renderer(of, template="chatml").render(row(conversation(*TURNS[:2])))
    assert "zephyr" in (caught.value.fix or "")


SECOND = conversation(*TURNS)
ROW_REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "order of roles": (published("gemma"), conversation(*TURNS[:2], system="Be brief"), "System role not supported"),
    "another order of roles": (
        MISTRAL,
        conversation(*TURNS[:2], system="Be brief"),
        "refuses this conversation: Conversation roles must alternate",
    ),
    "error in the template": ("{{ messages[0].content + 5 }}<|im_end|>", conversation(*TURNS[:2]), "refuses this"),
    "endless": ("{% for i in range(10**10) %}x{% endfor %}", conversation(*TURNS[:2]), "refuses this conversation"),
    "divides by zero": ("{{ 1 / 0 }}", conversation(*TURNS[:2]), "refuses this conversation"),
    "system left out": (
        CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"),
        conversation(*TURNS[:2], system="Be brief"),
        r"leaves out what is said in turn 1 \(system\)",
    ),
    "answer changed": (
        CHATML.replace("message['content']", "message['content'] | upper"),
        conversation(*TURNS[:2]),
        r"changes or leaves out what is said in turn 1 \(user\)",
    ),
    "only the last answer closed": (
        CHATML.replace(
            "+ '<|im_end|>'", "+ ('<|im_end|>' if loop.last or message['role'] == 'user' else '<|endoftext|>')"
        ),
        SECOND,
        "rewrites earlier turns",
    ),
    "generation prompt of another kind": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\nWell'"),
        conversation(*TURNS[:2]),
        "for training and for generation in two ways",
    ),
}


@pytest.mark.parametrize("case", ROW_REFUSED)
def test_a_row_that_the_template_does_not_take_is_refused(case: str, tmp_path: Path) -> None:
    text, messages, what = ROW_REFUSED[case]
    of, path = of_template(text, tmp_path)
    with pytest.raises(BadRow, match=what):
        renderer(of, template=path).render(row(messages))


def test_a_conversation_that_the_template_refuses_is_an_error_at_inference_too() -> None:
    of = FAMILIES["gemma"].tokenizer()
    with pytest.raises(InputError, match="System role not supported"):
        renderer(of).prompt_ids(conversation("Hi", system="Be brief"))
    named = renderer(of, template="gemma")
    assert "Be brief\n\nHi<end_of_turn>" in decoded(of, named.prompt_ids(conversation("Hi", system="Be brief")))


def test_tools_and_calls_are_rendered_or_refused() -> None:
    of = FAMILIES["qwen3"].tokenizer()
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [{"role": "user", "content": "1 and 2?"}, call]
    item = renderer(of, "last-answer").render(row(messages, tools=tools))
    [target] = trained(of, item)
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in target
    assert item.row.references == (target.removesuffix("<|im_end|>"),)
    assert "# Tools" in decoded(of, list(item.prompt_ids))
    assert tuple(renderer(of).prompt_ids(messages[:1], tools)) == item.prompt_ids
    with pytest.raises(BadRow, match="leaves out the tools: 'add'"):
        renderer(of, template="chatml").render(row(conversation(*TURNS[:2]), tools=tools))
    with pytest.raises(BadRow, match="leaves out the tool calls of turn 2"):
        renderer(of, template="chatml").render(row(messages))
    with pytest.raises(BadRow, match="no place for tools"):
        renderer(of, template="plain").render(row(messages))


# --- templates by name and file ---


def test_unknown_and_unreadable_templates(tmp_path: Path) -> None:
    of = FAMILIES["chatml"].tokenizer()
    with pytest.raises(InputError, match="did you mean 'chatml'") as caught:
        resolve_template("chatm", of)
    assert caught.value.where == "data.template" and "llama-3" in (caught.value.fix or "")
    for name, content, what in (
        ("a.jinja", b"\xff\xfe", "cannot read the template"),
        ("b.jinja", b" \n", "the template is empty"),
        ("c.json", b"{}", "this is JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=what) as caught:
            resolve_template(str(tmp_path / name), of)
        assert caught.value.where == str(tmp_path / name) and caught.value.fix
    (tmp_path / "d.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert resolve_template(str(tmp_path / "d.jinja"), of).jinja == CHATML


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_named_templates_put_a_system_turn_somewhere(name: str) -> None:
    family = {"chatml": "chatml", "llama-3": "llama-3", "zephyr": "zephyr", "gemma": "gemma"}[name]
    of = FAMILIES[family].tokenizer()
    item = renderer(of, template=name).render(row(conversation(*TURNS, system="Be brief")))
    assert "Be brief" in decoded(of, list(item.prompt_ids))
    assert len(trained(of, item)) == 2


def test_the_control_tokens_of_a_vocabulary() -> None:
    from tunesmith.models.templates import special_tokens

    of = FAMILIES["chatml"].tokenizer()
    assert set(special_tokens(of)) == set(IM)
    assert set(FAMILIES["mistral"].controls) <= set(special_tokens(FAMILIES["mistral"].tokenizer()))
