"""Answers of any causal model of transformers: padded batches through its own forward pass and cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from tunesmith.engine.cache import common
from tunesmith.engine.sampling import Asked, Chooser, Generation, Place
from tunesmith.models.forward import prefix_of

WORTH_SHARING = 512
"""Tokens that a common beginning must spare before it is run by itself."""


class PaddedAnswers:
    """Answers prompts of similar length together, padded on the left; rows that are finished leave the batch.

    Each architecture keeps its own kind of past (keys and values, windows of them, recurrent states), and its own
    `prepare_inputs_for_generation` says how a pass goes on from it.
    """

    def __init__(self, model: nn.Module, asked: Asked) -> None:
        self._model, self._prompts = cast(Any, model), asked.prompts
        self._sampling, self._stop_ids = asked.sampling, asked.stop_ids
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._filler = min(asked.stop_ids)
        prefix = prefix_of(model)
        self._ancestors: Sequence[tuple[Tensor, Tensor]] | None = None if prefix is None else prefix.ancestors()
        self._more = 0 if self._ancestors is None else len(self._ancestors[0][0])
        self._chooser = Chooser(asked)
        # Architectures older than transformers' cache (RWKV) mix the rows of a batch up once they decode.
        rows = asked.batch_size if "cache_params" in self._accepted or self._empty() is not None else 1
        equal_lengths = rows > 1 and self._minds_padding(asked.order[-1])
        alike = groupby(asked.order, key=lambda at: len(asked.prompts[at]) if equal_lengths else 0)
        self._batches = [
            members[start : start + rows]
            for members in (list(group) for _, group in alike)
            for start in range(0, len(members), rows)
        ]

    def run(self, device: torch.device) -> Iterator[tuple[int, Generation]]:
        """Yields the number of a prompt and its answer, as answers end."""
        for batch in self._batches:
            yield from self._answer(batch, device)

    def _minds_padding(self, number: int) -> bool:
        """Whether a recurrent architecture reads padding although a mask marks it, seen on the prompt ``number``; or
        a window over columns would lose a prefix behind it."""
        if self._more and not _plain(self._empty(), sliding=False):
            return True
        if _plain(self._empty(), sliding=True):
            return False
        alone, padded = (
            self._pass(*self._padded([self._prompts[number]], padding, self._model.device), first=True)[0].float()
            for padding in ([0], [3])
        )
        return float((alone - padded).norm()) > 2e-2 * float(alone.norm())

    def _answer(self, batch: Sequence[int], device: torch.device) -> Iterator[tuple[int, Generation]]:
        answers: dict[int, list[int]] = {number: [] for number in batch}
        rows: list[int | None] = list(batch)  # None: finished, but the past knows no way to let it go
        token_ids, state = self._begin(batch, device)
        first = True
        while answers:
            logits, state = self._pass(token_ids, state, first)
            live = [row for row, number in enumerate(rows) if number is not None]
            numbers = [cast(int, rows[row]) for row in live]
            places = [Place(number, len(answers[number])) for number in numbers]
            chosen = self._chooser.choose(logits if len(live) == len(rows) else logits[live], places)
            following = torch.full((len(rows), 1), self._filler)
            for row, number, token in zip(live, numbers, chosen, strict=True):
                following[row] = token
                generation = self._taken(answers[number], token)
                if generation is not None:
                    yield number, generation
                    del answers[number]
                    self._chooser.forget(number)
                    rows[row] = None
            token_ids = torch.cat([token_ids, following.to(device)], dim=1)
            kept = [row for row, number in enumerate(rows) if number is not None]
            if 0 < len(kept) < len(rows) and self._leave(state, kept):
                token_ids, rows = token_ids[kept], [rows[row] for row in kept]
            first = False

    def _taken(self, answer: list[int], token: int) -> Generation | None:
        """Takes a token over, and gives the answer when it ends with it."""
        if token in self._stop_ids:
            return Generation(answer, "stop", token)
        answer.append(token)
        return Generation(answer, "length") if len(answer) == self._sampling.max_new_tokens else None

    def _begin(self, batch: Sequence[int], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """Token ids ``[rows, longest]`` and what goes into the first pass besides."""
        prompts = [self._prompts[number] for number in batch]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        token_ids, state = self._padded(prompts, padding, device)
        if "past_key_values" in state and not self._more:
            state["past_key_values"] = self._past(prompts, padding, device)
        return token_ids, state

    def _padded(
        self, prompts: Sequence[Sequence[int]], padding: Sequence[int], device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        """Prompts behind their padding, and what goes into the first pass besides, with an empty cache."""
        token_ids = torch.tensor(
            [[self._filler] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
        )
        mask = torch.arange(token_ids.shape[1])[None] >= torch.tensor(padding)[:, None]
        mask = F.pad(mask, (self._more, 0), value=True)
        state: dict[str, Any] = {"use_cache": True}
        if "attention_mask" in self._accepted:
            state["attention_mask"] = mask.to(device, torch.long)
        if "position_ids" in self._accepted:
            state["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)[:, self._more :].to(device)
        if "logits_to_keep" in self._accepted:
            state["logits_to_keep"] = 1
        empty = self._empty()
        if empty is not None:
            state["past_key_values"] = empty
            self._begin_with_prefix(empty, len(prompts))
        return token_ids.to(device), state

    def _empty(self) -> Cache | None:
        """An empty cache of transformers; None for models that make a past of their own kind."""
        supported = getattr(self._model, "_supports_default_dynamic_cache", lambda: True)()
        if "past_key_values" not in self._accepted or not supported:
            return None
        return DynamicCache(config=self._model.config.get_text_config(decoder=True))

    def _begin_with_prefix(self, empty: Cache, rows: int) -> None:
        """Puts the keys and values that stand before every row into an empty cache."""
        for number, layer in enumerate(self._ancestors or ()):
            key, value = (part.to(self._model.dtype).transpose(0, 1).expand(rows, -1, -1, -1) for part in layer)
            empty.update(key, value, number)

    def _past(self, prompts: Sequence[Sequence[int]], padding: Sequence[int], device: torch.device) -> Cache:
        """An empty cache, or one that holds what the prompts have in common, run once.

        The columns that all rows leave out of their first pass hold, in a row with *n* padding tokens, *n* columns of
        padding and then the common beginning: exactly what a padded pass over everything would have left there.
        """
        empty = cast(Cache, self._empty())
        shared = min(min(common(prompts[0], prompt), len(prompt) - 1) for prompt in prompts)
        known = {"attention_mask", "position_ids"} <= self._accepted
        if not (known and _plain(empty, sliding=False)) or shared * (len(prompts) - 1) < WORTH_SHARING:
            return empty
        beginning = torch.tensor([list(prompts[0][:shared])], device=device)
        past = self._model(input_ids=beginning, past_key_values=empty, use_cache=True).past_key_values
        for layer in past.layers:
            layer.keys = _shifted(layer.keys, padding)
            layer.values = _shifted(layer.values, padding)
        return cast(Cache, past)

    def _pass(self, token_ids: Tensor, state: dict[str, Any], first: bool) -> tuple[Tensor, dict[str, Any]]:
        """Logits of the token after each row, ``[rows, vocabulary]``, and the state with which the next pass begins."""
        past = state.get("past_key_values")
        known = past.get_seq_length() if isinstance(past, Cache) else 0
        new = token_ids.shape[1] + self._more - known if first else 1
        inputs = self._model.prepare_inputs_for_generation(
            token_ids, next_sequence_length=new, is_first_iteration=first, **state
        )
        outputs = self._model(**inputs, return_dict=True)
        return outputs.logits[:, -1], self._model._update_model_kwargs_for_generation(outputs, state)

    def _leave(self, state: dict[str, Any], kept: Sequence[int]) -> bool:
        """Drops all rows but ``kept`` from the state, if its past can be cut."""
        pasts = [value for value in state.values() if isinstance(value, Cache)]
        others = set(state) - {"use_cache", "attention_mask", "position_ids", "logits_to_keep"}
        if len(pasts) != 1 or len(others) != 1 or not all(map(_filled, pasts[0].layers)):
            return False
        index = torch.tensor(kept, device=self._model.device)
        pasts[0].reorder_cache(cast(torch.LongTensor, index))
        for name in {"attention_mask", "position_ids"} & set(state):
            state[name] = state[name][index]
        return True


def _plain(past: Cache | None, *, sliding: bool) -> bool:
    """Whether a cache holds keys and values of all tokens, or of a window of them with ``sliding``, and no more."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer) if sliding else (DynamicLayer,)
    return past is not None and bool(past.layers) and all(type(layer) in kinds for layer in past.layers)


def _filled(layer: Any) -> bool:
    """Whether a pass left its state in a layer of the cache: some architectures keep it in their modules instead."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any(layer.is_conv_states_initialized.values()) or any(layer.is_recurrent_states_initialized.values())
    return isinstance(layer, DummyLayer) or bool(layer.is_initialized)


def _shifted(stored: Tensor, padding: Sequence[int]) -> Tensor:
    """``[1, heads, tokens, dim]`` repeated with each row moved right by its padding: ``[rows, heads, tokens, dim]``."""
    rows = stored.new_zeros(len(padding), *stored.shape[1:])
    for row, count in enumerate(padding):
        if count < stored.shape[2]:
            rows[row, :, count:] = stored[0, :, : stored.shape[2] - count]
    return rows
