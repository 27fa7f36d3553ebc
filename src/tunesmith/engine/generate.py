"""Answers to prompts: greedy or sampled, batched by length, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tunesmith.models.forward import use_default_attention

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        token_ids: without the prompt, and without the token that ended it.
        finish_reason: ``stop`` when the model ended its answer, ``length`` when the limit did.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: set[int],
    batch_size: int,
    progress: Progress,
) -> list[Generation]:
    """Answers every prompt, in the order given.

    Prompts of similar length share a batch, padded on the left; the answer does not depend on the neighbours beyond
    rounding. A dead run of the model (non-finite logits) raises what transformers raises.
    """
    language_model = cast(Any, model)
    was_training, own_settings = model.training, language_model.generation_config
    model.eval()
    use_default_attention(model)
    # transformers fills every setting that is not given from the model's own, such as a repetition penalty.
    language_model.generation_config = GenerationConfig()
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    answers: dict[int, Generation] = {}
    try:
        for start in range(0, len(order), batch_size):
            progress("answering", start, len(order))
            chosen = order[start : start + batch_size]
            found = _generate_batch(model, [prompts[at] for at in chosen], sampling, stop_ids)
            answers.update(zip(chosen, found, strict=True))
    finally:
        language_model.generation_config = own_settings
        model.train(was_training)
    progress("answering", len(order), len(order))
    return [answers[at] for at in range(len(prompts))]


def _generate_batch(
    model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: set[int]
) -> list[Generation]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    filler = min(stop_ids)
    token_ids = torch.full((len(prompts), longest), filler, dtype=torch.long)
    mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    sampled = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampled,
        temperature=sampling.temperature if sampled else None,
        top_p=sampling.top_p if sampled else None,
        top_k=0 if sampled else None,
        eos_token_id=sorted(stop_ids),
        pad_token_id=filler,
        use_cache=True,
    )
    with torch.inference_mode():
        output = cast(Any, model).generate(
            input_ids=token_ids.to(device), attention_mask=mask.to(device), generation_config=config
        )
    return [_cut(row, stop_ids) for row in cast(Tensor, output)[:, longest:].cpu()]


def _cut(row: Tensor, stop_ids: set[int]) -> Generation:
    ids = row.tolist()
    for position, token in enumerate(ids):
        if token in stop_ids:
            return Generation(ids[:position], "stop")
    return Generation(ids, "length")
