"""What single families ask for: thinking in the prompt, ends that only the next turn brings, no template at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chat_templates import DEEPSEEK, FAMILIES, GLM_4, IM, published, tokenizer
from rendering import TURNS, conversation, decoded, renderer, row, trained
from tunesmith.base import InputError, Source
from tunesmith.data.formats import BadRow
from tunesmith.data.render import TrainOn
from tunesmith.data.rows import Row
from tunesmith.models.templates import NAMED_TEMPLATES, resolve_template

# --- thinking that the generation prompt opens ---

THOUGHT = "<think>\nFrance, so Paris.\n</think>\n\nParis."


def thinking(template: str = "deepseek_r1_distill") -> PreTrainedTokenizerFast:
    return tokenizer(DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], published(template))


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3"])
@pytest.mark.parametrize("train_on", ["answers", "last-answer"])
@pytest.mark.parametrize("answer", [THOUGHT, "\n" + THOUGHT, THOUGHT.removeprefix("<think>\n")])
def test_an_answer_with_its_thinking_goes_on_where_the_prompt_ends(
    template: str, train_on: TrainOn, answer: str
) -> None:
    """DeepSeek-R1 takes the thinking out of every answer it is shown, and asks with a text that opens one."""
    of = thinking(template)
    here = renderer(of, train_on)
    item = here.render(row(conversation(TURNS[0], answer, system="Be brief")))
    asked = here.prompt_ids(conversation(TURNS[0], system="Be brief"))
    assert decoded(of, asked).endswith("<｜Assistant｜><think>\n")
    assert item.prompt_ids == tuple(asked) == tuple(item.example.token_ids.tolist()[: len(asked)])
    assert trained(of, item) == ["France, so Paris.\n</think>\n\nParis.<｜end▁of▁sentence｜>"]


def test_thinking_of_a_longer_conversation() -> None:
    of = thinking()
    messages = conversation(TURNS[0], THOUGHT, TURNS[2], THOUGHT)
    item = renderer(of, "last-answer").render(row(messages))
    asked = renderer(of).prompt_ids(messages[:-1])
    assert item.prompt_ids == tuple(asked)
    assert decoded(of, asked).count("France") == 0 and "Paris.<｜end▁of▁sentence｜>" in decoded(of, asked)
    assert len(trained(of, item)) == 1
    with pytest.raises(BadRow, match=r"rewrites earlier turns \(turn 2\).*last-answer"):
        renderer(of).render(row(messages))


@pytest.mark.parametrize("answer", [THOUGHT, THOUGHT.removeprefix("<think>\n")])
def test_thinking_that_the_template_keeps(answer: str) -> None:
    """Qwen3.5 asks with an opened thought too, and writes its last answer with it."""
    of = tokenizer(IM, None, "<|im_end|>", published("qwen3_5_think"))
    item = renderer(of).render(row(conversation(TURNS[0], answer)))
    assert trained(of, item) == ["France, so Paris.\n</think>\n\nParis.<|im_end|>"]
    [target] = trained(of, renderer(of).render(row(conversation(*TURNS[:2]))))
    assert target == f"\n</think>\n\n{TURNS[1]}<|im_end|>"


def test_an_answer_without_thinking_is_refused_with_what_to_change() -> None:
    for said in ("Paris.", "<think>\nhm\n</think>\n"):
        with pytest.raises(BadRow, match=r"ends in .*<think>\\n.*write <think>…</think> before.*copy of the template"):
            renderer(thinking()).render(row(conversation(TURNS[0], said)))


def test_literal_control_tokens_in_thinking_are_text() -> None:
    of = thinking()
    item = renderer(of).render(row(conversation("Hi", f"<think>\n{DEEPSEEK[1]}\n</think>\n\n{DEEPSEEK[2]} is text")))
    assert item.example.token_ids.tolist().count(of.eos_token_id) == 1
    assert trained(of, item) == [f"{DEEPSEEK[1]}\n</think>\n\n{DEEPSEEK[2]} is text{DEEPSEEK[1]}"]


# --- an end that only the next turn brings ---


def test_an_answer_that_the_next_turn_ends() -> None:
    family = FAMILIES["glm-4"]
    of = family.tokenizer()
    here = renderer(of, stops=family.stop_ids())
    item = here.render(row(conversation(*TURNS)))
    assert trained(of, item) == [f"\n<think></think>\n{TURNS[at]}<|user|>" for at in (1, 3)]
    thoughtful = here.render(row(conversation(TURNS[0], "<think>Well</think>\nParis.")))
    assert trained(of, thoughtful) == ["\n<think>Well</think>\nParis.<|user|>"]
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    called = here.render(row([{"role": "user", "content": "1 and 1?"}, call], tools=tools))
    assert trained(of, called)[0].endswith("</tool_call><|observation|>")


def test_a_next_turn_ends_an_answer_only_where_the_model_stops_at_it() -> None:
    of = tokenizer(GLM_4, None, "<|endoftext|>", published("glm4moe"))
    with pytest.raises(InputError, match="never closes an answer with a control token"):
        renderer(of).render(row(conversation(*TURNS[:2])))


# --- earlier answers that are written in another way ---


def test_harmony_trains_on_the_last_answer() -> None:
    of = FAMILIES["gpt-oss"].tokenizer()
    with pytest.raises(BadRow, match=r"rewrites earlier turns.*set data.train_on: last-answer"):
        renderer(of).render(row(conversation(*TURNS)))
    [target] = trained(of, renderer(of, "last-answer").render(row(conversation(*TURNS))))
    assert target == f"<|channel|>final<|message|>{TURNS[3]}<|return|>"
    reasoned = conversation(*TURNS[:2])
    reasoned[1]["thinking"] = "Hm."
    [target] = trained(of, renderer(of).render(row(reasoned)))
    assert target.startswith("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final")
    assert target.endswith("<|return|>")


# --- weights ---


@pytest.mark.parametrize("train_on", ["answers", "everything"])
def test_the_weight_of_a_turn_is_that_of_its_targets(train_on: TrainOn) -> None:
    of = FAMILIES["chatml"].tokenizer()
    messages = conversation(*TURNS)
    messages[1]["weight"], messages[3]["weight"] = 0.25, 0
    whole = renderer(of).render(row(conversation(*TURNS))).example.tensors["target_weights"] > 0
    weights = renderer(of, train_on).render(row(messages)).example.tensors["target_weights"]
    assert set(weights[whole].tolist()) == {0.25, 0.0}
    assert set(weights[~whole].tolist()) == ({0.0} if train_on == "answers" else {0.0, 1.0})


# --- no template, and tokens that the vocabulary lacks ---


def test_a_model_without_a_template_takes_single_exchanges_and_raw_text_only() -> None:
    of = tokenizer(IM, None, "<|endoftext|>", None)
    assert resolve_template("auto", of).fallback and not resolve_template("plain", of).fallback
    here = renderer(of)
    assert trained(of, here.render(row(conversation("Q: Hi\n", "Hello")))) == ["Hello<|endoftext|>"]
    assert here.render(Row(Source("rows.jsonl", 1), text="Hello")).example.targets > 0
    tools = ({"type": "function", "function": {"name": "add"}},)
    conversations = [
        row(conversation(*TURNS)),
        row(conversation("Hi", "Hello", system="Be brief")),
        row(conversation("Hi", "Hello"), tools=tools),
    ]
    for item in conversations:
        with pytest.raises(InputError, match="the model has no chat template, and these rows are conv") as caught:
            here.render_many([item])
        assert caught.value.where == "data.template"
        assert all(name in (caught.value.fix or "") for name in (*NAMED_TEMPLATES, "plain", "Jinja"))
    chosen = renderer(of, template="plain")
    assert all(trained(of, chosen.render(item)) for item in conversations[:2])


def test_what_only_looks_like_a_control_token_is_told(tmp_path: Path) -> None:
    of = tokenizer(("<|im_end|>",), None, "<|im_end|>", NAMED_TEMPLATES["chatml"])
    named = renderer(of, template="chatml")
    for _ in range(2):
        named.render(row(conversation(*TURNS)))
    count = len(of("<|im_start|>")["input_ids"])
    assert named.notes == [
        f"the template writes <|im_start|>, which is no token of this vocabulary: it is read as {count} ordinary "
        "pieces; choose another data.template or add the token"
    ]
    own = renderer(of)  # that is how the model was made
    own.learn_stop_ids()
    text = renderer(FAMILIES["zephyr"].tokenizer(), template="zephyr")  # <|user|> is ordinary text by intention
    text.learn_stop_ids()
    assert own.notes == text.notes == []


def test_the_control_tokens_that_were_written() -> None:
    of = FAMILIES["chatml"].tokenizer()
    here = renderer(of)
    assert here.used_controls == set()
    here.render(row(conversation("<|endoftext|>", "Hello")))
    assert here.used_controls == set(of.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    plain = renderer(of, template="plain")
    plain.render(row(conversation("<|endoftext|>", "Hello")))
    assert plain.used_controls == set(of.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


# --- named templates ---


@pytest.mark.parametrize(("name", "family"), [("llama-3", "llama3"), ("gemma", "gemma")])
def test_named_templates_write_what_the_published_ones_write(name: str, family: str) -> None:
    of = FAMILIES[name].tokenizer()
    for count in (1, 2, 3, 4):
        messages = conversation(*TURNS[:count])
        for asking in (False, True):
            ours, theirs = (
                of.apply_chat_template(messages, chat_template=text, tokenize=False, add_generation_prompt=asking)
                for text in (NAMED_TEMPLATES[name], published(family))
            )
            assert ours == theirs
