"""Text becomes token ids such that what the model is asked with is a prefix of what it is trained on, to the token."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.data.formats import BadRow

BREAK = "\ufdd0"
"""Parts literal control tokens in two; Unicode keeps this code point free for such internal use."""

ANCHORS = ("", "\n", ".")
"""What a continuation is tokenized behind, so that a tokenizer's own opening blank falls on something else."""

Tokenized = tuple[list[int], list[int]]
"""Token ids of a whole text, and how many of them stand before each of the places that were asked for."""


class Pieces:
    """Tokenizes texts together with their prefixes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A subclass with an encoding of its own is asked through its front door.
        own = getattr(type(tokenizer), "_encode_plus", None)
        self._direct = own is not None and own is getattr(PreTrainedTokenizerFast, "_encode_plus", None)
        self._added = self._independent() if self._direct else None

    def tokenized_many(self, texts: Sequence[tuple[str, Sequence[int]]]) -> list[Tokenized | BadRow]:
        """``tokenized`` of every text; all are given to the tokenizer at once, which has threads of its own."""
        ends = [[*starts, len(text)] for text, starts in texts]
        ready = [BREAK not in text for text, _ in texts]
        asked = [text[:end] for (text, _), stops, fast in zip(texts, ends, ready, strict=True) if fast for end in stops]
        encoded = iter(self._encoded_many(asked))
        found: list[Tokenized | BadRow] = []
        for (text, starts), stops, fast in zip(texts, ends, ready, strict=True):
            ids: list[int] = []
            counts: list[int] = []
            nested = fast
            for whole in [next(encoded) for _ in stops] if fast else ():
                nested = nested and whole[: len(ids)] == ids
                ids = whole
                counts.append(len(ids))
            if nested:
                found.append((ids, counts[:-1]))
                continue
            try:
                found.append(self.tokenized(text, starts))
            except BadRow as error:
                found.append(error)
        return found

    def tokenized(self, text: str, starts: Sequence[int]) -> Tokenized:
        """Token ids of the whole, and how many stand before each of ``starts``.

        The ids before an answer must be those that the model is given at inference. Where a token of the whole text
        would straddle that boundary, what follows is tokenized by itself, and verified to spell the same text.

        Raises:
            BadRow: when no way is found to tokenize what follows by itself.
        """
        ids: list[int] = []
        counts: list[int] = []
        done = 0
        for end in [*starts, len(text)]:
            whole = self._extended([], "", text[:end])
            ids = whole if whole[: len(ids)] == ids else self._extended(ids, text[:done], text[done:end])
            counts.append(len(ids))
            done = end
        return ids, counts[:-1]

    def _extended(self, ids: list[int], done: str, piece: str) -> list[int]:
        """``ids``, which spell ``done``, and those of ``piece``, in which no token crosses a break."""
        done = done.replace(BREAK, "")
        for part in piece.split(BREAK):
            if part:
                ids = [*ids, *self._continuation(ids, done, part)] if ids else self.encoded(part)
            done += part
        return ids

    def _continuation(self, ids: list[int], done: str, piece: str) -> list[int]:
        """Token ids that spell ``piece`` after ``ids``."""
        before, whole = self.decoded(ids), self.decoded(self.encoded(done + piece))
        for anchor in ANCHORS:
            head = self.encoded(anchor) if anchor else []
            both = self.encoded(anchor + piece)
            found = both[len(head) :]
            spelled = self.decoded([*ids, *found])
            same = spelled == whole or (spelled.startswith(before) and _spells(spelled[len(before) :], piece))
            if both[: len(head)] == head and same:
                return found
        raise BadRow("the answer cannot be tokenized apart from its prompt")

    def encoded(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decoded(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _encoded_many(self, texts: list[str]) -> list[list[int]]:
        """``encoded`` of every text."""
        if not texts:
            return []
        if not self._direct:
            return cast(list[list[int]], self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        if self._added is None:
            return self._batched(texts)
        # A text and its prefix have almost all stretches in common, and so have the rows of a system text.
        parts = [list(filter(None, self._added.split(text))) for text in texts]
        unique = list({part: None for stretches in parts for part in stretches})
        known = dict(zip(unique, self._batched(unique), strict=True))
        return [[token for part in stretches for token in known[part]] for stretches in parts]

    def _batched(self, texts: list[str]) -> list[list[int]]:
        self.encoded("")  # sets how the backend cuts, fills and reads special tokens, for the call that follows
        backend = cast(PreTrainedTokenizerFast, self.tokenizer).backend_tokenizer
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _independent(self) -> re.Pattern[str] | None:
        """Matches the tokens between which every stretch of text is tokenized without regard to what stands outside.

        None where that is not certain: with a normalizer or a pre-tokenizer that treats the first stretch in a way of
        its own, or with added tokens that take blanks or parts of words around them along.
        """
        backend = cast(PreTrainedTokenizerFast, self.tokenizer).backend_tokenizer
        added = list(backend.get_added_tokens_decoder().values())
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in added)
        if backend.normalizer is not None or backend.pre_tokenizer is None or not plain:
            return None
        if len({token.normalized for token in added}) > 1:  # these are looked for one kind after the other
            return None
        if not _types(json.loads(backend.pre_tokenizer.__getstate__())) <= _LOCAL:
            return None
        spelled = sorted((re.escape(token.content) for token in added), key=len, reverse=True)
        return re.compile(f"({'|'.join(spelled)})" if spelled else "((?!))")


_LOCAL = {"Sequence", "ByteLevel", "Digits", "Split", "Punctuation", "Whitespace", "WhitespaceSplit"}


def _types(layout: dict[str, Any]) -> set[str]:
    inner = layout.get("pretokenizers", [])
    return {layout["type"]}.union(*(_types(item) for item in inner))


def folded(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def holds(text: str, piece: str) -> bool:
    """Whether a text says something, whatever the white space."""
    return piece in text or folded(piece) in folded(text)


def _spells(decoded: str, piece: str) -> bool:
    """Whether both are the same text; some tokenizers put a blank of their own behind every control token."""

    def lead(text: str) -> str:
        return text[: len(text) - len(text.lstrip())]

    return folded(decoded) == folded(piece) and lead(decoded) == lead(piece)
