"""How a conversation becomes text, for training and for inference alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, nearest

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
    "gemma": (
        "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant'"
        " else message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}


class TemplateRefused(Exception):
    """The template raised an error for this conversation, for example about the order of roles."""


@dataclass(frozen=True)
class Template:
    """A chat template, or the plain layout `prompt + completion + end-of-text` when ``jinja`` is None.

    Attributes:
        name: what the plan prints.
        jinja: the template's source, run in transformers' sandbox.
        bos: text put before a plain conversation, when the tokenizer opens texts with a token of its own.
    """

    name: str
    jinja: str | None
    tokenizer: PreTrainedTokenizerBase
    bos: str = ""

    def text(self, messages: Sequence[dict[str, Any]], *, generation_prompt: bool) -> str:
        """Raises TemplateRefused when the template does not accept the conversation."""
        if self.jinja is None:
            return self._plain(messages)
        try:
            return cast(
                str,
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.jinja,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                ),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateRefused(str(error) or type(error).__name__) from error

    def _plain(self, messages: Sequence[dict[str, Any]]) -> str:
        end = cast(str, self.tokenizer.eos_token)
        closed = [m["content"] + end if m["role"] == "assistant" else m["content"] for m in messages]
        return self.bos + "".join(closed)


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
            Template("the model's own chat template", own, tokenizer)
            if own
            else Template(f"{PLAIN} (the model has no chat template)", None, tokenizer, bos)
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
        return Template(str(path), path.read_text(encoding="utf-8"), tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the template: {error}", where=path) from error


def opening_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token if the tokenizer puts one before every text."""
    ids = cast(list[int], tokenizer("x")["input_ids"])
    return (
        cast(str, tokenizer.bos_token)
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        else ""
    )
