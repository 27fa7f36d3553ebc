"""`tunesmith data show`: the trainer's own ids and weights, token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from tunesmith.base import InputError
from tunesmith.cli.display import Display, out, quiet_libraries
from tunesmith.cli.tables import aligned
from tunesmith.data.check.finding import counted
from tunesmith.data.render import Rendered
from tunesmith.data.stored import RenderedRows
from tunesmith.files import write_text
from tunesmith.pages.tokens import layout_of, lost_in_all, padding_of, tokens_page
from tunesmith.recipe import Recipe

if TYPE_CHECKING:
    from tunesmith.pipeline.planning import Planned

Worst = Literal["longest", "most-cut", "fewest-targets"]

STYLES = {"trained": "bold green", "masked": "dim", "cut": "red strike"}
MARKS = {"trained": ("⟦", "⟧"), "masked": ("", ""), "cut": ("⟪", "⟫")}
"""Brackets say what colours say, for pipes and for those who do not see colours."""

SPECIAL_MARKS = ("‹", "›")
"""Put around control tokens where a row also holds one as literal text, which looks the same."""

CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
"""Characters that a terminal would obey, or that rich would drop, and the signs that stand for them."""


ORDERS: dict[Worst | None, str] = {
    None: "in the order of the files",
    "longest": "the longest first",
    "most-cut": "the most cut first",
    "fewest-targets": "those with the fewest trained tokens first",
}

PACKED_STEPS = 3
"""Optimizer steps whose blocks are shown."""


def show_rows(
    recipe: Recipe,
    *,
    rows: int,
    worst: Worst | None,
    packing: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Prints or writes training rows as trained, masked and cut tokens, and what became of the others.

    Args:
        rows: how many are shown.
        worst: which come first; None for those that stand first in the files.
        packing: whether the blocks of the first optimizer steps are shown too.
    """
    from tunesmith.data.sources import source_specs
    from tunesmith.pipeline.planning import plan_job

    quiet_libraries()
    with Display(as_json) as display:
        planned = plan_job(recipe, display.progress)
    if planned.prepared is None or planned.tokenizer is None:
        raise InputError("there are no rows to show", where="data.train", fix="name data there")
    train = planned.prepared.train
    chosen = first_or_worst(train, rows, worst)
    shown = [described(train[at], planned.tokenizer) for at in chosen]
    order = ORDERS[worst] if worst != "most-cut" or shown[0]["cut"] else "none of them cut"
    blocks = first_blocks(planned) if packing else []
    lost = [vars(entry) for entry in planned.prepared.lost]
    if html is not None:
        title = f"Tokens of {', '.join(source.path for source in source_specs(recipe.data))}"
        try:
            write_text(html, tokens_page(title, shown, order=order, blocks=blocks, lost=lost))
        except OSError as error:
            raise InputError(
                f"the page cannot be written: {error.strerror}",
                where=html,
                fix="name a file in a directory that exists",
            ) from error
        out(f"wrote {html}")
    elif as_json:
        out(json.dumps({"rows": shown, "packing": blocks, "lost": lost}))
    else:
        console = Console()
        _print_rows(console, shown, f"{len(shown)} of {counted(len(train), 'training row')}, {order}")
        _print_blocks(console, blocks)
        _print_lost(console, lost)


def first_or_worst(train: RenderedRows, count: int, worst: Worst | None) -> list[int]:
    """Indices of the rows to show; rows that are equally bad stay in the order of the files."""
    if worst is None:
        return list(range(min(count, len(train))))
    uncut = train.uncut
    badness = {"longest": uncut, "most-cut": uncut - train.lengths, "fewest-targets": -train.targets}[worst]
    return np.argsort(-badness, kind="stable")[:count].tolist()


def first_blocks(planned: Planned) -> list[dict[str, Any]]:
    """The micro-batches of the first optimizer steps, as the trainer makes them.

    Returns:
        for each block its step and place, both counted from 1; layout; the sources of its rows; its tokens; and its
        tokens of padding, as it is and as it would be in the padded layout.
    """
    from tunesmith.train.batches import StepBatches

    assert planned.prepared is not None
    plan, train = planned.plan, planned.prepared.train
    layout = "packed" if plan.packing and planned.recipe.method.can_pack else "padded"
    batches = StepBatches.of_job(planned.recipe, plan, train, planned.prepared.order)
    blocks = []
    for step in range(1, min(PACKED_STEPS, plan.steps) + 1):
        for place, group in enumerate(batches.groups(step), 1):
            lengths = train.lengths[group]
            padding = int(lengths.max()) * len(group) - int(lengths.sum())
            blocks.append(
                {
                    "step": step,
                    "block": place,
                    "layout": layout,
                    "rows": [str(train.stored.rows.source(train.numbers[at])) for at in group],
                    "tokens": int(lengths.sum()),
                    "padding": padding if layout == "padded" else 0,
                    "padding_if_padded": padding,
                }
            )
    return blocks


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
        **counts,
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


def _print_rows(console: Console, rows: list[dict[str, Any]], told: str) -> None:
    legend = [Text(f"{opening}{state}{closing}", STYLES[state]) for state, (opening, closing) in MARKS.items()]
    console.print(*legend)
    _say(console, told)
    for row in rows:
        console.print(Text(f"\n{row['source']}: {row['summary']}", "bold"), soft_wrap=True)
        console.print(_line(row["tokens"]), soft_wrap=True)


def _print_blocks(console: Console, blocks: list[dict[str, Any]]) -> None:
    if not blocks:
        return
    steps = counted(blocks[-1]["step"], "optimizer step")
    console.print(Text(f"\nblocks of the first {steps}: {layout_of(blocks)}", "bold"), soft_wrap=True)
    names = ["step", "block", "rows", "tokens", "padding"]
    cells = [[str(item["step"]), str(item["block"]), f"{len(item['rows']):,}"] for item in blocks]
    figures = [[f"{item['tokens']:,}", f"{item['padding']:,}"] for item in blocks]
    lines = aligned([names, *[one + two for one, two in zip(cells, figures, strict=True)]], right=range(5))
    _say(console, f"{lines[0]}  which")
    width = console.width if console.is_terminal else None
    short = _short_sources(blocks)
    for line, item in zip(lines[1:], blocks, strict=True):
        _say(console, f"{line}  {_listed([short[row] for row in item['rows']], width and width - len(line) - 2)}")
    _say(console, padding_of(blocks))


def _listed(names: Sequence[str], width: int | None) -> str:
    """Names with commas; where there is a width, as many as fit it, at least one."""
    whole = ", ".join(names)
    if width is None or len(whole) <= width:
        return whole
    kept = names[0]
    for name in names[1:]:
        if len(kept) + len(name) + len(", , …") > width:
            break
        kept += f", {name}"
    return f"{kept}, …" if kept != whole else kept


def _short_sources(blocks: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each source its file's name and line, or all of it where two files have the same name."""
    sources = {row for item in blocks for row in item["rows"]}
    files = {row.rpartition(":")[0] for row in sources}
    if len({Path(file).name for file in files}) < len(files):
        return {row: row for row in sources}
    return {row: Path(row).name for row in sources}


def _print_lost(console: Console, lost: list[dict[str, Any]]) -> None:
    console.print(Text(f"\n{lost_in_all(lost)}", "bold"), soft_wrap=True)
    for entry in lost:
        rows = f"{counted(entry['rows'], 'row')}, " if entry["rows"] else ""
        targets = counted(entry["target_tokens"], "target token")
        _say(console, f"  {entry['reason']}: {rows}{targets}, the first at {entry['example']}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


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
