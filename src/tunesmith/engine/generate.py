"""Answers to prompts: greedy or sampled, many rows at a time, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tunesmith.base import Progress
from tunesmith.engine.decode import PackedAnswers
from tunesmith.engine.padded import PaddedAnswers
from tunesmith.engine.sampling import Asked, Generation, Sampling
from tunesmith.models.attention import as_transformers_runs_it
from tunesmith.models.decoder import decoder_of
from tunesmith.models.forward import prefix_of, prompt_ids

__all__ = ["Generation", "Sampling", "generate"]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: set[int],
    batch_size: int,
    progress: Progress,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Answers every prompt, in the order given.

    An answer does not depend on the other prompts beyond rounding. Sampling without seeds draws one number from torch's
    global generator, and every answer follows from it and the number of its prompt.

    Args:
        model: a causal language model of transformers, adapted or not; its mode and attention are left as they were.
        prompts: token ids, at least one each.
        stop_ids: tokens that end an answer, at least one.
        batch_size: rows at a time.
        seeds: of each answer, from which alone its random numbers follow.

    Raises:
        TrainingError: when the model's logits are not finite.
    """
    progress("answering", 0, len(prompts))
    if not prompts:
        return []
    device = next(model.parameters()).device
    decoder = decoder_of(model)
    by_cache = isinstance(decoder, str) and prefix_of(model) is not None
    before = [] if by_cache else prompt_ids(model)
    prompts = [[*before, *prompt] for prompt in prompts] if before else prompts
    answers: dict[int, Generation] = {}
    # Prompts of similar length are answered together, the longest first: memory is then known from the beginning.
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    asked = Asked(prompts, order, sampling, stop_ids, batch_size, seeds)
    # Not inference mode: what modules keep from pass to pass must serve training too.
    with as_transformers_runs_it(model), torch.no_grad():
        path = PaddedAnswers(model, asked) if isinstance(decoder, str) else PackedAnswers(decoder, asked)
        for number, answer in path.run(device):
            answers[number] = answer
            progress("answering", len(answers), len(prompts))
    return [answers[at] for at in range(len(prompts))]
