"""Merging an adapter into its base, and the proof that the merged model is the trained one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.base import TrainingError
from tunesmith.batch import Example, pack
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.models.forward import next_token_logits, use_default_attention

GREEDY_TOKENS = 32
KL_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest mean KL divergence, in nats, that rounding to a dtype explains."""


@dataclass(frozen=True)
class MergeCheck:
    """Merged against adapter, on prompts.

    Attributes:
        layers: how many were merged.
        prompts: how many were compared.
        mean_kl: of the next-token distributions, adapter to merged, in nats.
        largest_logit_difference: over all positions and tokens.
        same_tokens: share of greedily generated tokens that agree, up to the first difference of each answer.
        differs_from_base: mean KL from the base to the merged model, in nats.
        passed: finite, within rounding of the adapter, and not the base.
    """

    layers: int
    prompts: int
    mean_kl: float
    largest_logit_difference: float
    same_tokens: float
    differs_from_base: float
    passed: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def merge(model: nn.Module) -> nn.Module:
    """Folds every layer of an adapter into its base, in place, and returns the plain model with its own attention.

    Raises:
        InputError: when base weights are quantized.
    """
    merge_layers(model)
    use_default_attention(model)
    return model


def merge_and_check(model: nn.Module, prompts: Sequence[Sequence[int]], stop_ids: set[int]) -> MergeCheck:
    """Merges in place, comparing greedy tokens and logits before and after, and with the base.

    Args:
        model: with an adapter, not merged yet.
        prompts: token ids of held-out prompts.
        stop_ids: tokens that end an answer.
    """
    with without_adapter(model):
        base = _logits(model, prompts)
    adapter, adapter_tokens = _logits(model, prompts), _greedy(model, prompts, stop_ids)
    count = merge_layers(model)
    merged, merged_tokens = _logits(model, prompts), _greedy(model, prompts, stop_ids)
    kl, from_base = _mean_kl(adapter, merged), _mean_kl(base, merged)
    # Logits alone do not tell: torch's attention on the CPU turns queries that are not numbers into zeros.
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    limit = max(KL_LIMIT.get(dtype, 0.0) for dtype in {parameter.dtype for parameter in model.parameters()})
    return MergeCheck(
        layers=count,
        prompts=len(prompts),
        mean_kl=kl,
        largest_logit_difference=max(float((a - m).abs().max()) for a, m in zip(adapter, merged, strict=True)),
        same_tokens=_agreement(adapter_tokens, merged_tokens),
        differs_from_base=from_base,
        passed=count > 0 and finite and math.isfinite(kl) and kl <= limit and from_base > kl,
    )


def _logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Next-token logits at every position of every prompt, fp32 ``[length, vocabulary]``."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for prompt in prompts:
            batch = pack([Example(torch.tensor(prompt))], "padded").to(device)
            found.append(next_token_logits(model, batch, torch.arange(len(prompt), device=device)).float().cpu())
    return found


def _greedy(model: nn.Module, prompts: Sequence[Sequence[int]], stop_ids: set[int]) -> list[list[int]]:
    try:
        answers = generate(
            model, prompts, Sampling(GREEDY_TOKENS), stop_ids=stop_ids, batch_size=1, progress=lambda *_: None
        )
    except TrainingError:  # a model that gives no numbers answers nothing; what is wrong with it shows in its weights
        return [[] for _ in prompts]
    return [answer.token_ids for answer in answers]


def _mean_kl(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    divergences = [
        F.kl_div(F.log_softmax(after, -1), F.log_softmax(before, -1), log_target=True, reduction="none").sum(-1)
        for before, after in zip(expected, found, strict=True)
    ]
    return float(torch.cat(divergences).mean())


def _agreement(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    same = total = 0
    for before, after in zip(expected, found, strict=True):
        length = max(len(before), len(after))
        first = next((at for at in range(length) if before[at : at + 1] != after[at : at + 1]), length)
        same, total = same + first, total + length
    return same / total if total else 1.0
