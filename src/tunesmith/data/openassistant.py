"""Trees of messages, in which several people answered the same thing: of each the path of the best-ranked replies.

Köpf et al. 2023 (OpenAssistant Conversations) rank the replies to one message; rank 0 is the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.record import BadRow, Record
from tunesmith.data.row import Row
from tunesmith.data.turns import ROLES, check_order

UNRANKED = float("inf")


@dataclass
class _Message:
    """One message and the replies to it, in their order."""

    text: str
    role: str
    rank: float
    deleted: bool
    replies: list[_Message] = field(default_factory=list)


def _message(fields: dict[str, Any]) -> _Message:
    text, role, rank = fields.get("text"), fields.get("role"), fields.get("rank")
    if not isinstance(text, str):
        raise BadRow(f"the text of a message must be text, found {'nothing' if text is None else type(text).__name__}")
    if not isinstance(role, str) or ROLES.get(role) not in ("user", "assistant"):
        raise BadRow(f"a message has the unknown role {role!r}; known are prompter and assistant")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
        raise BadRow(f"the rank of a message must be a number, found {rank!r:.40}")
    return _Message(text, ROLES[role], UNRANKED if rank is None else rank, fields.get("deleted") is True)


def _best_path(root: _Message) -> list[dict[str, Any]]:
    """The conversation of the best-ranked replies up to the last answer; empty when there is none."""
    path, at = [], None if root.deleted else root
    while at is not None:
        path.append({"role": at.role, "content": at.text})
        at = min((reply for reply in at.replies if not reply.deleted), key=lambda reply: reply.rank, default=None)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return path


def tree_row(record: Record) -> Row | None:
    """The row of a record that is a whole tree, or None when nothing in it was answered.

    Raises:
        BadRow: when it is none.
    """
    prompt = record.fields.get("prompt")
    if not isinstance(prompt, dict):
        raise BadRow(f"'prompt' must be a message with its replies, found {type(prompt).__name__}")
    root = _message(prompt)
    open_ = [(prompt, root)]
    while open_:
        fields, message = open_.pop()
        replies = fields.get("replies") or []
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise BadRow("'replies' must be a list of messages")
        message.replies = [_message(reply) for reply in replies]
        open_ += zip(replies, message.replies, strict=True)
    return _row(record, root)


def _row(record: Record, root: _Message) -> Row | None:
    path = _best_path(root)
    if not path:
        return None
    check_order(path)
    return Row(record.source, tuple(path), references=(path[-1]["content"],))


class Gathered:
    """Messages of the flat table, one a record; a tree may be scattered, so all of them are held.

    Attributes:
        orphans: messages whose tree has no beginning.
    """

    def __init__(self) -> None:
        self.orphans = 0
        self._messages: dict[str, _Message] = {}
        self._parents: dict[str, str] = {}
        self._roots: dict[str, Record] = {}

    def add(self, record: Record, raw: Record) -> None:
        """Takes a message in.

        Args:
            record: its parts by name.
            raw: what the file has, kept for the first message of a tree.

        Raises:
            BadRow: when it is none.
        """
        name, parent = record.fields.get("message_id"), record.fields.get("parent_id")
        if not isinstance(name, str) or not name:
            raise BadRow("a message needs a 'message_id'")
        if name in self._messages:
            raise BadRow(f"the message_id {name!r} stands twice")
        if parent is not None and not isinstance(parent, str):
            raise BadRow(f"'parent_id' must be text or nothing, found {type(parent).__name__}")
        self._messages[name] = _message(record.fields)
        if parent:
            self._parents[name] = parent
        else:
            self._roots[name] = raw

    def rows(self) -> Iterator[tuple[Record, Row | BadRow | None]]:
        """For each tree the record of its first message, and its row, None without an answer, or what is wrong."""
        for name, parent in self._parents.items():
            if parent in self._messages:
                self._messages[parent].replies.append(self._messages[name])
        self.orphans = len(self._messages) - sum(_size(self._messages[name]) for name in self._roots)
        for name, raw in self._roots.items():
            try:
                yield raw, _row(raw, self._messages[name])
            except BadRow as error:
                yield raw, error


def _size(root: _Message) -> int:
    count, open_ = 0, [root]
    while open_:
        count += 1
        open_ += open_.pop().replies
    return count


def tree_notes(shown: str, unanswered: int, orphans: int) -> Iterable[str]:
    """What of the trees is not used, in words."""
    if unanswered:
        noun = "1 tree without an answer was" if unanswered == 1 else f"{unanswered} trees without an answer were"
        yield f"{shown}: {noun} left out"
    if orphans:
        noun = (
            "1 message whose tree has no beginning was"
            if orphans == 1
            else (f"{orphans} messages whose trees have no beginning were")
        )
        yield f"{shown}: {noun} left out"
