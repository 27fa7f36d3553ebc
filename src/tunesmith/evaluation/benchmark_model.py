"""A model as lm-eval asks it, through Tunesmith's own forward pass. Needs the package lm-eval.

Text becomes tokens as in lm-eval's `hf` model (`HFLM`): the same special tokens, the same place where a context ends
and its continuation begins, the same side on which what is too long is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.engine.generate import Sampling, generate
from tunesmith.evaluation.continuations import Continuation, Likelihood, likelihoods
from tunesmith.models.measure import position_limit

GENERATED = 256
"""Tokens of an answer where a task says nothing, as in lm-eval."""


class SharedPrefixLM(TemplateLM):
    """Log-likelihoods over a tree of tokens, and answers by Tunesmith's generator.

    Args:
        model: a causal language model of transformers, adapted or not.
        progress: told how many continuations are done.
    """

    backend = "causal"

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
        super().__init__()
        self.model = model
        self.tokenizer: Any = tokenizer
        self.progress = progress
        self.max_length = position_limit(cast(Any, model).config)
        self._bos = cast(str, tokenizer.decode(self.prefix_token_id))
        self._encode = lru_cache(maxsize=64)(self._encoded)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._encode(string, add_special_tokens)

    def _encoded(self, string: str, add_special_tokens: bool | None) -> list[int]:
        if add_special_tokens is None and string.startswith(self._bos):
            add_special_tokens = False  # it is written there already
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [(one.logp, one.greedy) for one in self._scored([(before, after) for _, before, after in requests])]

    def _scored(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        asked = []
        for before, after in pairs:
            if len(after) > self.max_length:
                raise InputError(
                    f"an answer of a benchmark has {len(after)} tokens, and the model takes {self.max_length}",
                    fix="leave this benchmark out",
                )
            asked.append(Continuation([*before, *after][-(self.max_length + 1) :], len(after)))
        return likelihoods(self.model, asked, self.progress)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        pairs: list[tuple[list[int], list[int]]] = []
        ends = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs += [make_disjoint_window(window) for window in windows]
            ends.append(len(pairs))
        found = self._scored(pairs)
        return [sum(one.logp for one in found[first:last]) for first, last in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        settings = [_Settings(dict(request.args[1])) for request in requests]
        for how in dict.fromkeys(one.sampling for one in settings):
            chosen = [at for at, one in enumerate(settings) if one.sampling == how]
            most = self.max_length - how.max_new_tokens
            prompts = [self.tok_encode(requests[at].args[0])[-most:] for at in chosen]
            said = generate(
                self.model,
                prompts,
                how,
                stop_ids={self.eot_token_id},
                batch_size=16,
                progress=self.progress,
            )
            for at, generation in zip(chosen, said, strict=True):
                text = cast(str, self.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
                answers[at] = settings[at].cut(text)
        return answers


class _Settings:
    """How a task wants its answers."""

    def __init__(self, given: dict[str, Any]) -> None:
        until = given.get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        samples = bool(given.get("do_sample", float(given.get("temperature") or 0) > 0))
        self.sampling = Sampling(
            int(given.get("max_gen_toks") or given.get("max_new_tokens") or GENERATED),
            float(given.get("temperature", 1.0)) if samples else 0.0,
            float(given.get("top_p", 1.0)) if samples else 1.0,
        )

    def cut(self, text: str) -> str:
        for stop in self.until:
            if stop:
                text = text.partition(stop)[0]
        return text
