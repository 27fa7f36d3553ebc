"""A broken or hostile template is stopped, and named, before it takes the machine's time or memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chat_templates import FAMILIES
from rendering import TURNS, conversation, renderer, row
from tunesmith.base import InputError
from tunesmith.models.sandbox import BUDGET

DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(100) %}BODY{% endfor %}"
WITHOUT_END = {
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(100000) %}{{ messages[0].content * 10000 }}{% endfor %}",
    "fixed text": "{% for i in range(100000) %}{% for i in range(100) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    "sum": DOUBLED.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
    "joined": DOUBLED.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
    "block": DOUBLED.replace("BODY", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "list": DOUBLED.replace("BODY", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "method": DOUBLED.replace("BODY", "{% set ns.x = ns.x.join(['a', 'b', 'c']) %}"),
    "replaced": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "product": "{{ 'x' * 10**10 }}",
}
TOO_WIDE = {
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:999999999}'.format(1) }}",
}
TOO_LARGE = {
    "power": "{{ 10**10**8**8 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(100) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
}
TOO_DEEP = {"recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}
STOPPED = [
    (text, what)
    for some, what in (
        (WITHOUT_END, f"writes or runs without end: more than {BUDGET:,} characters"),
        (TOO_WIDE, "a text wider than 100,000 characters"),
        (TOO_LARGE, "a number of more than a thousand bits"),
        (TOO_DEEP, "more memory or depth than there is"),
    )
    for text in some.values()
]


@pytest.mark.parametrize(("text", "what"), STOPPED, ids=[*WITHOUT_END, *TOO_WIDE, *TOO_LARGE, *TOO_DEEP])
def test_a_template_out_of_bounds_is_stopped_and_named(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(text, encoding="utf-8")
    here = renderer(FAMILIES["chatml"].tokenizer(), template=str(path))
    began = time.perf_counter()
    with pytest.raises(InputError, match=what) as caught:
        here.prompt_ids(conversation(TURNS[0]))
    assert time.perf_counter() - began < 60
    assert caught.value.where == str(path) and "choose another data.template" in (caught.value.fix or "")


def test_long_conversations_are_within_bounds() -> None:
    """A budget is of one rendering: neither many rows nor long ones use it up."""
    for name in ("chatml", "glm-4"):
        family = FAMILIES[name]
        here = renderer(family.tokenizer(), "last-answer", stops=family.stop_ids())
        said = ["Paris is the answer. " * 2000, "Hello there."] * 20
        for _ in range(3):
            assert len(here.render(row(conversation(*said))).example) > 100_000
