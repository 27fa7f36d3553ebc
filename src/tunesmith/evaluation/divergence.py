"""How far a model has moved from its base on prompts that have nothing to do with the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Example, pack
from tunesmith.data.general_prompts import general_prompts
from tunesmith.data.render import Renderer
from tunesmith.engine.generate import Sampling, generate
from tunesmith.metrics import bootstrap, mean_rows
from tunesmith.models.embeddings import vocabulary_rows
from tunesmith.models.forward import likeliest_next, next_token_outcomes, use_attention

LIKELIEST = 16
"""Tokens of which the base's log-probabilities are kept at each place; all others count as one outcome more."""

ANSWER = 32
"""Tokens of an answer at which two models are compared."""

AT_ONCE = 16


def base_answers(
    model: nn.Module, renderer: Renderer, count: int, stop_ids: set[int], packed: bool, progress: Progress
) -> list[dict[str, Any]]:
    """The base's own greedy answers to general prompts, and what it found likely at each of their tokens.

    Returns:
        For each prompt that it answered ``ids``, the place ``start`` where the answer begins, and for each token of the
        answer the likeliest ``tokens`` with their ``logps`` in nats, all others together in the last one.
    """
    every = general_prompts()
    asked = every[:: max(1, len(every) // count)][:count]
    prompts = [renderer.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    answers = generate(model, prompts, Sampling(ANSWER), stop_ids=stop_ids, batch_size=AT_ONCE, progress=progress)
    rows = [
        {"ids": [*prompt, *said.token_ids], "start": len(prompt)}
        for prompt, said in zip(prompts, answers, strict=True)
        if said.token_ids
    ]
    own = vocabulary_rows(model)
    for chosen, batch, positions in _batches(model, rows, packed):
        tokens, logps = likeliest_next(model, batch, positions, LIKELIEST, 1.0, own)
        lengths = [len(row["ids"]) - row["start"] for row in chosen]
        for row, ids, found in zip(chosen, tokens.cpu().split(lengths), logps.cpu().split(lengths), strict=True):
            row["tokens"] = ids.tolist()
            row["logps"] = [[round(value, 5) for value in each] for each in found.clamp(min=-100).tolist()]
    return rows


def divergences_from(model: nn.Module, rows: Sequence[dict[str, Any]], packed: bool) -> list[float]:
    """For each prompt the mean of KL(base || model) over the tokens of the base's answer, in nats a token.

    Over the base's likeliest tokens and the rest as one outcome, which is at most the divergence over the whole
    vocabulary (the data-processing inequality; Cover & Thomas 2006, section 2.8).

    Args:
        rows: from `base_answers`.
    """
    found: list[float] = []
    for chosen, batch, positions in _batches(model, rows, packed):
        device = batch.token_ids.device
        tokens = torch.tensor([each for row in chosen for each in row["tokens"]], device=device)
        base = torch.tensor([each for row in chosen for each in row["logps"]], device=device)
        logps = next_token_outcomes(model, batch, positions, tokens[:, 0], tokens, 1.0).logps
        apart = (base.exp() * (base - logps)).sum(1).double().cpu()
        found += [float(part.mean()) for part in apart.split([len(row["tokens"]) for row in chosen])]
    return found


def _batches(model: nn.Module, rows: Sequence[dict[str, Any]], packed: bool) -> Any:
    """Some rows, their batch, and the places before each token of their answers; the model is put back at the end."""
    device, config = next(model.parameters()).device, model.config
    was_training, attention = model.training, config._attn_implementation  # pyright: ignore[reportAttributeAccessIssue]
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(rows), AT_ONCE):
                chosen = rows[first : first + AT_ONCE]
                batch = pack([Example(torch.tensor(row["ids"])) for row in chosen], "packed" if packed else "padded")
                positions: list[Tensor] = []
                start = 0
                for row in chosen:
                    positions.append(torch.arange(start + row["start"] - 1, start + len(row["ids"]) - 1))
                    start += len(row["ids"])
                yield chosen, batch.to(device), torch.cat(positions).to(device)
    finally:
        use_attention(model, str(attention))
        model.train(was_training)


def compare_divergence(found: Sequence[float], *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """``value``, ``low``, ``high`` in nats a token and ``n`` prompts, for the report."""
    if not found or any(value - value != 0.0 for value in found):
        return {"status": "could_not_run", "reason": "the base gave no answers, or a likelihood is not finite"}
    estimate = bootstrap(mean_rows(found), resamples=resamples, confidence=confidence, seed=seed)
    return {"status": "measured", **estimate.__dict__}
