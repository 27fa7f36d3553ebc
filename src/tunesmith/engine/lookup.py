"""Guesses of the next tokens from text that was seen before."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 3
"""Tokens that must match at most."""
ENTRIES = 300_000
"""Places that are remembered; all are forgotten when there are more."""


class Lookup:
    """Prompt lookup (Saxena 2023): after the same last tokens, the same tokens may follow again.

    Prompts and answers of all rows serve. A guess costs nothing where a pass over the weights is paid by the bytes of
    the weights and not by the number of tokens, and since guesses are verified, no answer depends on them.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}

    def learn(self, tokens: Sequence[int], start: int) -> None:
        """Remembers which tokens each one from ``start`` on followed; ``tokens`` may go on growing."""
        if len(self._seen) > ENTRIES:
            self._seen.clear()
        for at in range(max(start, 1), len(tokens)):
            for length in range(1, min(LONGEST, at) + 1):
                self._seen[tuple(tokens[at - length : at])] = (tokens, at)

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens that may follow; none when the last token was never seen before."""
        for length in range(min(LONGEST, len(tokens)), 0, -1):
            found = self._seen.get(tuple(tokens[-length:]))
            if found is not None:
                text, at = found
                return list(text[at : at + count])
        return []
