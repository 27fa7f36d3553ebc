"""`tunesmith data show`: the trainer's own ids and weights, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.data.render import Rendered
from tunesmith.files import write_text
from tunesmith.recipe_file import read_recipe

STYLES = {"trained": "bold green", "masked": "dim", "cut": "red strike"}
MARKS = {"trained": ("⟦", "⟧"), "masked": ("", ""), "cut": ("⟪", "⟫")}
"""Brackets say what colours say, for pipes and for those who do not see colours."""

SPECIAL_MARKS = ("‹", "›")
"""Put around control tokens where a row also holds one as literal text, which looks the same."""

CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
"""Characters that a terminal would obey, or that rich would drop, and the signs that stand for them."""


def show_rows(path: Path, overrides: Sequence[str], *, rows: int, html: Path | None, as_json: bool) -> None:
    """Prints or writes the first training rows as trained, masked and cut tokens."""
    recipe = read_recipe(path, overrides)
    from tunesmith.data.prepare import source_specs
    from tunesmith.pipeline.planning import plan_job

    quiet_libraries()
    with Display(as_json) as display:
        planned = plan_job(recipe, display.progress)
    if planned.prepared is None or planned.tokenizer is None:
        raise InputError("there are no rows to show", where=path, fix="name data in data.train")
    shown = [described(item, planned.tokenizer) for item in planned.prepared.train[:rows]]
    if html is not None:
        from tunesmith.pages.tokens import tokens_page

        title = f"Tokens of {', '.join(source.path for source in source_specs(recipe.data))}"
        try:
            write_text(html, tokens_page(title, shown))
        except OSError as error:
            raise InputError(
                f"the page cannot be written: {error.strerror}",
                where=html,
                fix="name a file in a directory that exists",
            ) from error
        out(f"wrote {html}")
    elif as_json:
        out(json.dumps(shown))
    else:
        _print(shown)


def described(item: Rendered, tokenizer: Any) -> dict[str, Any]:
    """A row as `pages.tokens` and the terminal show it."""
    from tunesmith.models.templates import special_tokens  # not above: transformers is not needed to refuse a recipe

    special = set(special_tokens(tokenizer).values())
    ids = [*item.example.token_ids.tolist(), *item.cut_ids]
    weights = item.example.tensors["target_weights"].tolist()
    states = ["trained" if weight > 0 else "masked" for weight in weights] + ["cut"] * len(item.cut_ids)
    texts = _token_texts(ids, tokenizer)
    counts = {state: states.count(state) for state in MARKS}
    return {
        "source": str(item.row.source),
        "summary": f"{counts['trained']} trained, {counts['masked']} masked, {counts['cut']} cut",
        "tokens": [
            {"text": text, "id": token, "state": state, "special": token in special}
            for text, token, state in zip(texts, ids, states, strict=True)
        ],
    }


def _token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text: a character of several tokens is shown with the last of them.

    Each piece is decoded behind the piece before it, because some tokenizers strip the blank that opens a text.
    """
    texts, before, start = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        done = tokenizer.decode(ids[before:start], clean_up_tokenization_spaces=False)
        texts.append(text[len(done) :])
        before, start = start, end
    return texts


def _print(rows: list[dict[str, Any]]) -> None:
    console = Console()
    legend = [Text(f"{opening}{state}{closing}", STYLES[state]) for state, (opening, closing) in MARKS.items()]
    console.print(*legend)
    for row in rows:
        console.print(Text(f"\n{row['source']}: {row['summary']}", "bold"), soft_wrap=True)
        console.print(_line(row["tokens"]), soft_wrap=True)


def _line(tokens: list[dict[str, Any]]) -> Text:
    specials = {token["text"] for token in tokens if token["special"]}
    ordinary = "".join("\0" if token["special"] else token["text"] for token in tokens)
    marks = SPECIAL_MARKS if any(text and text in ordinary for text in specials) else ("", "")
    line = Text()
    state = "masked"
    for token in [*tokens, {"text": "", "state": "masked", "special": False}]:
        if token["state"] != state:
            line.append(MARKS[state][1], STYLES[state])
            line.append(MARKS[token["state"]][0], STYLES[token["state"]])
            state = token["state"]
        seen = token["text"].translate(CONTROL_PICTURES).replace("\t", "⇥\t").replace("\n", "↵\n")
        if token["special"]:
            line.append(f"{marks[0]}{seen}{marks[1]}", STYLES[state] + " reverse")
        else:
            line.append(seen, STYLES[state])
    return line
