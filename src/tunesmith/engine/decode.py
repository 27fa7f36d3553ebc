"""Answers of models of the Llama shape: rows of any length packed into each pass, and rows come and go."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.engine.cache import Cache, common
from tunesmith.engine.cached_attention import Piece, StepAttention, in_order
from tunesmith.engine.lookup import Lookup
from tunesmith.engine.sampling import Asked, Chooser, Generation, Place
from tunesmith.models.decoder import Decoder
from tunesmith.models.projection import few_sizes

TOKENS_AT_ONCE = 4096
"""Prompt tokens of one pass; longer prompts are read in parts, so that memory is bounded."""
CHEAP_TOKENS = 16
"""Tokens up to which a pass takes little longer than with one, because reading the weights is what takes time."""
WORTH_SHARING = 16
"""Tokens that two prompts must begin with alike before one takes them over from the other."""
WORTH_WAITING = 512
"""Tokens that are spared in all before prompts wait a pass for those that they begin like."""


@dataclass
class _Row:
    """A prompt that is being answered.

    Attributes:
        tokens: prompt and answer so far.
        cached: how many of them have keys in the cache.
        guesses: what may come next.
    """

    number: int
    slot: int
    tokens: list[int]
    prompt: int
    cached: int
    guesses: list[int] = field(default_factory=list)

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt


class PackedAnswers:
    """Answers prompts with `batch_size` rows at a time, a finished row's slot going to the next prompt.

    Each pass carries one token of every row that is answering, guesses of its next ones while they cost nothing, and
    the prompts of rows that begin. The beginning that a prompt shares with one that was read before is taken over
    from its slot. Guesses that come true save a pass; they change no answer.
    """

    def __init__(self, decoder: Decoder, asked: Asked) -> None:
        self._decoder, self._prompts = decoder, asked.prompts
        self._sampling, self._stop_ids = asked.sampling, asked.stop_ids
        self._waiting = deque(asked.order)
        longest = max(map(len, asked.prompts)) + asked.sampling.max_new_tokens
        self._cache = Cache(decoder.layers, min(asked.batch_size, len(asked.prompts)), longest)
        self._rows: dict[int, _Row] = {}
        self._chooser, self._lookup = Chooser(asked), Lookup()
        self._narrow: bool | None = None

    def run(self, device: torch.device) -> Iterator[tuple[int, Generation]]:
        """Yields the number of a prompt and its answer, as answers end."""
        with self._decoder.keeping_weights():
            while self._waiting or self._rows:
                self._admit()
                yield from self._step(device)

    def _admit(self) -> None:
        """Gives free slots to waiting prompts, but first to those from which the others can take tokens over."""
        free = [slot for slot in range(len(self._cache.held)) if slot not in self._rows]
        candidates = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        first, followers, gained = _leaders([self._prompts[number] for number in candidates], self._cache)
        if gained >= WORTH_WAITING:
            self._waiting.extendleft(candidates[at] for at in reversed(followers))
            candidates = [candidates[at] for at in first]
        for number in candidates:
            tokens = list(self._prompts[number])
            source, shared = self._cache.shared(tokens)
            slot = source if source in free else free[0]
            free.remove(slot)
            # The last token of a prompt is always run: its hidden state chooses the first token of the answer.
            shared = min(shared, len(tokens) - 1)
            self._cache.copy(source, slot, shared)
            self._cache.held[slot] = tokens[:shared]
            self._rows[slot] = _Row(number, slot, tokens, len(tokens), shared)
            self._lookup.learn(tokens, 0)
        if not self._waiting:
            self._close_gaps()

    def _close_gaps(self) -> None:
        """Moves rows down, so that the slots in use lie beside each other."""
        for slot in range(len(self._rows)):
            if slot not in self._rows:
                row = self._rows.pop(max(self._rows))
                self._cache.copy(row.slot, slot, row.cached)
                row.slot = slot
                self._rows[slot] = row

    def _step(self, device: torch.device) -> Iterator[tuple[int, Generation]]:
        planned = self._plan()
        pieces = [piece for _, piece in planned]
        attention = StepAttention(self._cache, pieces, self._decoder.scaling, self._decoder.windows).to(device)
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        places: list[Place] = []
        for row, piece in planned:
            text = (row.tokens + row.guesses)[piece.start : piece.start + piece.count]
            token_ids += text
            positions += range(piece.start, piece.start + piece.count)
            if piece.start + piece.count >= len(row.tokens):
                said = 1 + len(row.guesses)
                wanted += range(len(token_ids) - said, len(token_ids))
                places += [Place(row.number, row.answered + at) for at in range(said)]
        filler = [0] * self._filler(len(token_ids), device)
        hidden = self._decoder.hidden(
            torch.tensor(token_ids + filler, device=device), torch.tensor(positions + filler, device=device), attention
        )
        chosen: list[int] = []
        if wanted:
            chosen = self._chooser.choose(self._decoder.logits(hidden[torch.tensor(wanted, device=device)]), places)
        for row, piece in planned:
            row.cached = min(piece.start + piece.count, len(row.tokens))
            if piece.start < row.prompt:
                self._cache.held[row.slot] = row.tokens[: row.cached]
            if piece.start + piece.count >= len(row.tokens):
                said = 1 + len(row.guesses)
                mine, chosen = chosen[:said], chosen[said:]
                yield from self._accept(row, mine)

    def _filler(self, tokens: int, device: torch.device) -> int:
        """Tokens of no row that follow those of a pass, where each new number of them costs kernels that are kept."""
        if self._narrow is None:
            self._narrow = device.type == "cpu" and self._decoder.dtype_of_products(device) != torch.float32
        return few_sizes(tokens) - tokens if self._narrow else 0

    def _plan(self) -> list[tuple[_Row, Piece]]:
        """The rows of the next pass with what each of them runs."""
        answering = [row for row in self._rows.values() if row.cached == len(row.tokens) - 1]
        # In a full pass the first guess of a row, which mostly comes true, is worth its token; no further one is.
        each = max(CHEAP_TOKENS // len(self._rows) - 1, 1)
        for row in answering:
            most = min(each, self._sampling.max_new_tokens - row.answered - 1)
            row.guesses = self._lookup.guess(row.tokens, most) if most > 0 and row.answered else []
        planned, budget = [], TOKENS_AT_ONCE
        for row in self._rows.values():
            count = min(len(row.tokens) + len(row.guesses) - row.cached, max(budget, 0))
            if row.cached == len(row.tokens) - 1:
                count = 1 + len(row.guesses)
            elif count:
                budget -= count
            if count:
                planned.append((row, Piece(row.slot, row.cached, count)))
        return [planned[at] for at in in_order([piece for _, piece in planned])]

    def _accept(self, row: _Row, chosen: Sequence[int]) -> Iterator[tuple[int, Generation]]:
        """Takes the chosen tokens over, as far as the guesses before them came true, and ends the row where it ends."""
        learned = len(row.tokens)
        guesses, row.guesses = row.guesses, []
        for at, token in enumerate(chosen):
            if token in self._stop_ids:
                yield self._end(row, token)
                return
            row.tokens.append(token)
            if row.answered == self._sampling.max_new_tokens:
                yield self._end(row, None)
                return
            if at == len(guesses) or guesses[at] != token:
                break
            row.cached += 1
        self._lookup.learn(row.tokens, learned)

    def _end(self, row: _Row, stop_id: int | None) -> tuple[int, Generation]:
        self._cache.held[row.slot] = row.tokens[: row.cached]
        del self._rows[row.slot]
        self._chooser.forget(row.number)
        return row.number, Generation(row.tokens[row.prompt :], "length" if stop_id is None else "stop", stop_id)


def _leaders(prompts: Sequence[Sequence[int]], cache: Cache) -> tuple[list[int], list[int], int]:
    """Splits prompts into those to read first and those that begin like one of them.

    Returns:
        Indices of both, and how many tokens the latter need not read when they wait, beyond what the cache has.
    """
    leaders: list[int] = []
    followers: list[int] = []
    gained = 0
    for at, prompt in enumerate(prompts):
        shared = max((common(prompts[leader], prompt) for leader in leaders), default=0)
        gain = shared - cache.shared(prompt)[1]
        if gain >= WORTH_SHARING:
            followers.append(at)
            gained += gain
        else:
            leaders.append(at)
    return leaders, followers, gained
