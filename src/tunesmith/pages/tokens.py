"""The page of ``data show --html``: what the model reads, and which tokens it is trained to write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from tunesmith.data.check.finding import counted, share
from tunesmith.pages.page import count, render

STATES = ("trained", "masked", "cut")
_NEWLINE = Markup('<span class="sign">↵</span>\n')


def tokens_page(
    title: str,
    rows: list[dict[str, Any]],
    *,
    order: str = "in the order of the files",
    blocks: Sequence[dict[str, Any]] = (),
    lost: Sequence[dict[str, Any]] | None = None,
) -> str:
    """Renders examples token by token: trained, masked or cut, told apart by colour and by form.

    Args:
        title: what is shown, for example the path of the data.
        rows: one dictionary an example, ``{"source": "file:line", "summary": str, "tokens": [{"text": str, "id": int,
            "state": "trained"|"masked"|"cut", "special": bool}]}``.
        order: which rows come first, in words.
        blocks: micro-batches of the first optimizer steps, ``{"step": int, "block": int, "layout": str, "rows":
            ["file:line"], "tokens": int, "padding": int, "padding_if_padded": int}``; empty when not asked for.
        lost: training rows that are not used, ``{"reason": str, "rows": int, "target_tokens": int, "example": str}``;
            None when nothing is known about them.
    """
    total = Counter(token["state"] for row in rows for token in row["tokens"])
    shown = [
        {
            "source": row["source"],
            "summary": row["summary"],
            "counts": _counts(row["tokens"]),
            "trained": any(token["state"] == "trained" for token in row["tokens"]),
            "runs": _runs(row["tokens"]),
        }
        for row in rows
    ]
    return render(
        "tokens.html.j2",
        heading=title,
        rows=shown,
        total=", ".join(f"{count(total[state])} {state}" for state in STATES),
        order=order,
        blocks=blocks,
        layout=layout_of(blocks),
        padding=padding_of(blocks),
        lost=lost,
        lost_in_all=lost_in_all(lost or ()),
    )


def layout_of(blocks: Sequence[dict[str, Any]]) -> str:
    """How rows share a block, in words."""
    if not blocks:
        return ""
    return "packed, tested when the model is loaded" if blocks[0]["layout"] == "packed" else "padded"


def padding_of(blocks: Sequence[dict[str, Any]]) -> str:
    """How much of all blocks together is padding, or would be."""
    tokens = sum(block["tokens"] for block in blocks)
    padding = sum(block["padding_if_padded"] for block in blocks)
    told = f"{counted(padding, 'token')} of padding, {share(padding, tokens + padding)} of what is computed"
    if not blocks or blocks[0]["layout"] == "padded":
        return told
    return f"nothing is padded; laid out as a rectangle each, the blocks would have {told}"


def lost_in_all(lost: Sequence[dict[str, Any]]) -> str:
    """How many training rows are not used, in words."""
    rows, targets = sum(entry["rows"] for entry in lost), sum(entry["target_tokens"] for entry in lost)
    left = f"{counted(rows, 'row')} left out of training" if rows else "no row is left out of training"
    return f"{left}; {counted(targets, 'target token')} lost" if targets else left


def _counts(tokens: list[dict[str, Any]]) -> str:
    found = Counter(token["state"] for token in tokens)
    special = sum(bool(token["special"]) for token in tokens)
    parts = [f"{count(found[state])} {state}" for state in STATES if found[state]]
    return f"{count(len(tokens))} tokens: {', '.join([*parts, f'{count(special)} special'])}" if tokens else "no tokens"


def _runs(tokens: list[dict[str, Any]]) -> list[tuple[str, str, Markup]]:
    """Neighbours of one state together, so that a screen reader hears each change once and not every token."""
    runs: list[tuple[str, str, Markup]] = []
    for state, run in groupby(tokens, key=lambda token: token["state"]):
        group = list(run)
        if state not in STATES:
            raise ValueError(f"token state {state!r} is none of {', '.join(STATES)}")
        number = f"{count(len(group))} {state}"
        runs.append((state, number, Markup("").join(_token(token) for token in group)))
    return runs


def _token(token: dict[str, Any]) -> Markup:
    kind = "token special" if token["special"] else "token"
    seen = _visible(token["text"])
    # The last break stands outside, or the right edge of the token would open the next line.
    broken = "\n" if seen.endswith("\n") else ""
    seen = seen.removesuffix("\n")
    return Markup('<span class="{}" title="id {}">{}</span>{}').format(kind, token["id"], seen, broken)


def _visible(text: str) -> Markup:
    """The text of a token with its white space to be seen; a token without text is a sign of its own."""
    if not text:
        return Markup('<span class="sign">∅</span>')
    seen = escape(text.replace("\r", "␍"))
    return seen.replace("\t", Markup('<span class="sign">⇥</span>\t')).replace("\n", _NEWLINE)
