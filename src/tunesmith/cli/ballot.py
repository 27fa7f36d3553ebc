"""The screen on which a person votes: two answers side by side, one key a choice."""

from __future__ import annotations

from dataclasses import dataclass

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tunesmith.evaluation.votes import Choice, Pair
from tunesmith.pipeline.voting import Poll

SIDE_BY_SIDE = 90
"""Columns of a terminal from which two answers have room beside each other."""
KEYS = {
    "left": ("1", "l", "\x1b[D", "\x1bOD", "àK"),
    "right": ("2", "r", "\x1b[C", "\x1bOC", "àM"),
    "tie": ("t", "3", "="),
    "both bad": ("b", "4"),
    "skip": ("s",),
    "undo": ("u",),
    "expected answer": ("e",),
    "quit": ("q", "\x03", "\x04", "\x1b"),
}
LEGEND = "[1 or ←] left   [2 or →] right   [t] tie   [b] both bad   [s] skip   [u] undo   [e] expected   [q] quit"
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "␡"}


@dataclass
class _Screen:
    console: Console
    poll: Poll
    rater: str
    expected: bool = False

    def show(self, pair: Pair, done: int, total: int) -> None:
        self.console.clear()
        self.console.print(self._drawn(pair, done, total))

    def finished(self) -> str | None:
        """Asks once more before the result, which says who is who."""
        self.console.clear()
        self.console.print(Text("That was the last row.   [u] undo   [any other key] show the result"))
        return _key()

    def _drawn(self, pair: Pair, done: int, total: int) -> Group:
        left, right = (pair.a, pair.b) if self.poll.left(self.rater, pair.row) == "a" else (pair.b, pair.a)
        head = Text(f"row {done + 1} of {total} · {self.rater}", style="dim")
        parts: list[RenderableType] = [head, _panel("Prompt", pair.prompt, "dim")]
        if self.expected:
            parts.append(_panel("Expected", pair.references[0] if pair.references else "the rows have none", "green"))
        answers = [_panel("1  left", left, "cyan"), _panel("2  right", right, "magenta")]
        if self.console.width >= SIDE_BY_SIDE:
            table = Table.grid(expand=True)
            table.add_column(ratio=1)
            table.add_column(ratio=1)
            table.add_row(*answers)
            parts.append(table)
        else:
            parts += answers
        return Group(*parts, Columns([Text(key) for key in LEGEND.split("   ")], padding=(0, 2)))


def _panel(title: str, text: str, style: str) -> Panel:
    """What a model wrote is never read as markup, and what steers a terminal is made visible."""
    said = Text(text.translate(_CONTROLS)) if text.strip() else Text("(empty)", style="italic dim")
    return Panel(said, title=Text(title), title_align="left", border_style=style)


def ask_rater(poll: Poll, rater: str) -> None:
    """Shows the rows that a rater has not voted on, one after the other, until all are done or the rater stops.

    Every vote is on the disk before the next row is shown.
    """
    screen, cast = _Screen(Console(), poll, rater), list[int]()
    pairs = {pair.row: pair for pair in poll.pairs if not pair.same}
    todo = [pair.row for pair in poll.open_rows(rater)]
    at = 0
    while at < len(todo) or (cast and screen.finished() == "undo"):
        said = "undo"
        if at < len(todo):
            pair = pairs[todo[at]]
            screen.show(pair, len(pairs) - len(todo) + at, len(pairs))
            said = _key()
        if said == "quit":
            break
        if said == "expected answer":
            screen.expected = not screen.expected
        elif said == "undo":
            if cast:
                poll.take_back(rater, cast.pop())
                at -= 1
        elif said is not None:
            poll.cast(rater, todo[at], _choice(said, poll.left(rater, todo[at])))
            cast.append(todo[at])
            at, screen.expected = at + 1, False
    screen.console.clear()


def _choice(said: str, left: str) -> Choice:
    if said in ("left", "right"):
        return "a" if (said == "left") == (left == "a") else "b"
    return {"tie": "tie", "both bad": "both_bad"}.get(said, "skip")  # type: ignore[return-value]


def _key() -> str | None:
    """What the pressed key means; None for one that means nothing."""
    try:
        pressed = typer.getchar()
    except (KeyboardInterrupt, EOFError):
        return "quit"
    return next((name for name, keys in KEYS.items() if pressed in keys or pressed.lower() in keys), None)
