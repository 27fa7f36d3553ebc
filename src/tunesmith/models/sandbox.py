"""Chat templates come from anywhere: they run in transformers' own sandbox, and within bounds of time and memory.

Jinja's sandbox keeps a template away from the interpreter, and no more: a loop in a loop runs for years, and a text
that is put behind itself thirty times fills any memory. Here every character that a template writes or builds, every
round of a loop and every call of a macro is charged to one budget a rendering.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

BUDGET = 2**27
"""Characters that one rendering may write and build; a conversation of a million tokens is some 2**22."""

STEP = 200
"""What a round of a loop costs, in characters: 0.7 million of them, a second, are too many. A macro costs ten times."""

MAX_BITS = 1024
_WIDE = re.compile(r"\d{6}")
_BARE = {"role", "content"}
_SIZED = (str, list, tuple, dict, set, range)


class TemplateExhausted(Exception):
    """The template used up its budget, or asked for something that no budget allows."""


class _Spent(threading.local):
    units = 0


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, in which everything that grows is charged."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        like = chat_template_utils._compile_jinja_template("").environment
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(extension) for extension in like.extensions.values()],
            finalize=self.written,
        )
        self._spent = _Spent()
        self.globals.update(like.globals)
        self.filters.update({name: self._charged(name, function) for name, function in like.filters.items()})

    def renew(self) -> None:
        self._spent.units = 0

    def spend(self, units: int) -> None:
        """Raises TemplateExhausted when nothing is left."""
        spent = self._spent
        spent.units += units
        if spent.units > BUDGET:
            raise TemplateExhausted(f"it writes or runs without end: more than {BUDGET:,} characters and steps")

    def written(self, value: Any) -> str:
        """Called with all that stands in double braces."""
        text = value if isinstance(value, str) else str(value)
        self.spend(len(text))
        return text

    def joined(self, *parts: Any) -> str:
        """The operator `~`, which Jinja does not let a sandbox see."""
        texts = [part if isinstance(part, str) else str(part) for part in parts]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:
            self.spend(len(left) + len(right))
            return left + right
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    self.spend(len(text) * max(0, times))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
                raise TemplateExhausted("it computes a number of more than a thousand bits")
        elif operator == "%" and isinstance(left, str):
            _refuse_width(left, right if isinstance(right, tuple) else (right,))
        result = super().call_binop(context, operator, left, right)
        self.spend(_size(result))
        return result

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__func__", None) is BoundedEnvironment.spend:  # a step: nothing else may be as frequent
            return self.spend(args[0])
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(owner, str):
            name = cast(str, getattr(obj, "__name__", ""))
            _refuse_width(owner if name.startswith("format") else "", (*args, *kwargs.values()))
            self._refuse_growth(name, owner, args)
        result = super().call(context, obj, *args, **kwargs)
        self.spend(_size(result))
        return result

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            value = next((arg for arg in args if isinstance(arg, str)), "")
            if name in ("center", "indent", "format", "batch", "slice"):
                _refuse_width(value if name == "format" else "", (*args, *kwargs.values()))
            self._refuse_growth(name, value, [arg for arg in args if isinstance(arg, str)][1:])
            result = function(*args, **kwargs)
            self.spend(_size(result))
            return result

        return charged

    def _refuse_growth(self, name: str, text: str, args: Any) -> None:
        """Texts that grow by more than they are long have to be known before they are made."""
        if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            self.spend(text.count(args[0]) * len(args[1]))
        if name == "join" and args and isinstance(args[0], (list, tuple)):
            self.spend(sum(len(text) + _size(part) for part in args[0]))

    def compiled(self, source: str) -> Template:
        """Raises jinja2.TemplateSyntaxError, and TemplateExhausted for constants that are too large."""
        self.renew()
        tree = _Bounded().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), dict(self.make_globals(None)), None)


class _Bounded(NodeTransformer):
    """Charges what the environment cannot see by itself."""

    def _stepping(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        fixed = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        cost = nodes.Const((STEP if isinstance(node, nodes.For) else 10 * STEP) + fixed)
        step = nodes.Call(nodes.EnvironmentAttribute("spend"), [cost], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _stepping

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)
        return call.set_lineno(node.lineno)


def _size(value: Any) -> int:
    """Characters or items; an integer that grew beyond all use is refused."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TemplateExhausted("it computes a number of more than a thousand bits")
    return len(value) if isinstance(value, _SIZED) else 1


def _refuse_width(layout: str, values: Any) -> None:
    if _WIDE.search(layout) or any(isinstance(value, int) and value > MAX_RANGE for value in values):
        raise TemplateExhausted(f"it lays out a text wider than {MAX_RANGE:,} characters")


@lru_cache(maxsize=1)
def _environment() -> BoundedEnvironment:
    return BoundedEnvironment()


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    return _environment().compiled(source)


def rendered(
    source: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool,
    special_tokens: dict[str, str],
) -> str:
    """What `apply_chat_template` of transformers writes for one conversation, within bounds.

    Raises:
        TemplateExhausted: the template is out of bounds.
        jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError: its own errors.
    """
    template = _compiled(source)
    if not messages:
        raise ValueError("there is no turn before the answer")
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if tools or not all(message.keys() == _BARE and type(message["content"]) is str for message in chat):
        # Releases of transformers before these two functions hand a conversation to the template as it is.
        plain = getattr(chat_template_utils, "_plain_template_data", _same)
        chat, tools = getattr(chat_template_utils, "_alias_reasoning_fields", _same)(plain(chat)), plain(tools)
    _environment().renew()
    try:
        return template.render(
            **special_tokens,
            messages=chat,
            tools=tools,
            documents=None,
            add_generation_prompt=generation_prompt,
        )
    except (MemoryError, RecursionError) as error:
        raise TemplateExhausted("it asks for more memory or depth than there is") from error


def _same(value: Any) -> Any:
    return value
