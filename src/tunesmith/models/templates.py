"""How a conversation becomes text, for training and for inference alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, nearest
from tunesmith.models.sandbox import TemplateExhausted, rendered

PLAIN = "plain"

NAMED_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
        " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
        " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    # Gemma has no system turn; like its own newer templates, this one opens the first user turn with that text.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] in ('system', 'developer') %}{% set lead = messages[0]['content'] |"
        " trim + '\n\n' %}{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}"
        "{% endif %}{% for message in turns %}{% if message['role'] in ('system', 'developer') %}"
        "{{ raise_exception('only one system turn fits') }}{% endif %}{{ '<start_of_turn>' + ('model' if"
        " message['role'] == 'assistant' else message['role']) + '\n' + (lead if loop.first else '') +"
        " message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}

SPELLED_OUT = frozenset((NAMED_TEMPLATES["zephyr"],))
"""Templates whose roles are spelled like control tokens and are ordinary text by intention."""


class TemplateRefused(Exception):
    """The template raised an error for this conversation, for example about the order of roles."""


@dataclass(frozen=True)
class Template:
    """A chat template, or the plain layout `prompt + completion + end-of-text` when ``jinja`` is None.

    Attributes:
        name: what the plan prints.
        jinja: the template's source, run in transformers' sandbox.
        bos: text put before a plain conversation, when the tokenizer opens texts with a token of its own.
        fallback: whether nobody chose the plain layout, and the model has no chat template.
        own: whether the model brings it along, and was made for it.
    """

    name: str
    jinja: str | None
    tokenizer: PreTrainedTokenizerBase
    bos: str = ""
    fallback: bool = False
    own: bool = False

    def text(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """The conversation as the model reads it.

        Raises:
            TemplateRefused: the template does not accept the conversation.
            InputError: the template is no Jinja, or writes or runs without end.
        """
        if self.jinja is None:
            return self._plain(messages, tools)
        try:
            return rendered(
                self.jinja,
                list(messages),
                list(tools) or None,
                generation_prompt=generation_prompt,
                special_tokens=self._special_tokens,
            )
        except TemplateExhausted as error:
            raise InputError(
                f"the template was stopped: {error}", where=self.name, fix=f"correct its loops, or {choose_template()}"
            ) from error
        except TemplateSyntaxError as error:
            raise InputError(
                f"not a Jinja template: {error.message}", where=f"{self.name}:{error.lineno}", fix="correct that line"
            ) from error
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return dict(self.tokenizer.special_tokens_map)

    def _plain(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        if tools or any(message.get("tool_calls") for message in messages):
            raise TemplateRefused("the plain layout has no place for tools and their calls")
        after = {"assistant": cast(str, self.tokenizer.eos_token), "system": "\n\n", "developer": "\n\n"}
        return self.bos + "".join(m["content"] + after.get(m["role"], "") for m in messages)


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Finds the template that a recipe asks for: `auto`, `plain`, a named one, or a Jinja file.

    Raises:
        InputError: for an unknown name or an unreadable file.
    """
    bos = opening_text(tokenizer)
    if name == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return (
            Template("the model's own chat template", own, tokenizer, own=True)
            if own
            else Template(f"{PLAIN} (the model has no chat template)", None, tokenizer, bos, fallback=True)
        )
    if name == PLAIN:
        return Template(PLAIN, None, tokenizer, bos)
    if name in NAMED_TEMPLATES:
        return Template(name, NAMED_TEMPLATES[name], tokenizer)
    path = Path(name).expanduser()
    if not path.is_file():
        known = ["auto", PLAIN, *NAMED_TEMPLATES]
        raise InputError(
            f"{name!r} is neither a named template nor a file{nearest(name, known)}",
            where="data.template",
            fix=f"named templates: {', '.join(known)}",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the template: {error}", where=path, fix="save it as UTF-8 text") from error
    if path.suffix == ".json":
        raise InputError(
            "this is JSON, and a template is Jinja", where=path, fix="put its `chat_template` into a file of its own"
        )
    if not text.strip():
        raise InputError("the template is empty", where=path, fix="name a file with a Jinja chat template")
    return Template(str(path), text, tokenizer)


def choose_template() -> str:
    """The advice of errors that another template mends."""
    return f"choose another data.template: {', '.join(NAMED_TEMPLATES)}, {PLAIN}, or a Jinja file"


def opening_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token if the tokenizer puts one before every text."""
    ids = cast(list[int], tokenizer("x")["input_ids"])
    return (
        cast(str, tokenizer.bos_token)
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        else ""
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text and id of the control tokens: those that a vocabulary marks so, and those that the tokenizer names."""
    added = cast(dict[int, Any], getattr(tokenizer, "added_tokens_decoder", {}))
    marked = {str(token): int(token_id) for token_id, token in added.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return marked | {text: int(token_id) for text, token_id in named}
