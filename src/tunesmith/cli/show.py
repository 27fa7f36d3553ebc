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


def show_rows(path: Path, overrides: Sequence[str], *, rows: int, html: Path | None, as_json: bool) -> None:
    """Prints or writes the first training rows as trained, masked and cut tokens."""
    recipe = read_recipe(path, overrides)
    from tunesmith.pipeline.planning import plan_job

    quiet_libraries()
    with Display(as_json) as display:
        planned = plan_job(recipe, display.progress)
    if planned.prepared is None or planned.tokenizer is None:
        raise InputError("there are no rows to show", where=path)
    shown = [described(item, planned.tokenizer) for item in planned.prepared.train[:rows]]
    if html is not None:
        from tunesmith.pages.tokens import tokens_page

        write_text(html, tokens_page(f"Tokens of {recipe.data.train}", shown))
        out(f"wrote {html}")
    elif as_json:
        out(json.dumps(shown))
    else:
        _print(shown)


def described(item: Rendered, tokenizer: Any) -> dict[str, Any]:
    """A row as `pages.tokens` and the terminal show it."""
    special = set(tokenizer.all_special_ids)
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
    """What each token adds to the text: a character of several tokens is shown with the last of them."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts


def _print(rows: list[dict[str, Any]]) -> None:
    console = Console()
    console.print(Text("⟦trained⟧", STYLES["trained"]), Text("masked", STYLES["masked"]), Text("⟪cut⟫", STYLES["cut"]))
    for row in rows:
        console.print(Text(f"\n{row['source']}: {row['summary']}", "bold"))
        line = Text()
        state = "masked"
        for token in [*row["tokens"], {"text": "", "state": "masked", "special": False}]:
            if token["state"] != state:
                line.append(MARKS[state][1], STYLES[state])
                line.append(MARKS[token["state"]][0], STYLES[token["state"]])
                state = token["state"]
            style = STYLES[state] + (" reverse" if token["special"] else "")
            line.append(token["text"].replace("\n", "↵\n"), style)
        console.print(line, soft_wrap=True)
