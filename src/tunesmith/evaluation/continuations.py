"""How likely a model finds continuations of contexts, with what contexts share computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import Example, pack
from tunesmith.evaluation.prefix_tree import Sequences, Tree, laid_out
from tunesmith.models.forward import next_token_ranks, packing_obstacle, use_attention
from tunesmith.models.freed_memory import keeping_freed_memory

TOKENS_AT_ONCE = 4096


class Continuation(NamedTuple):
    """What is asked about.

    Attributes:
        ids: of context and continuation, at least two.
        targets: how many of the last ones are the continuation; fewer than all.
    """

    ids: Sequence[int]
    targets: int


class Likelihood(NamedTuple):
    """What is found.

    Attributes:
        logp: of the continuation, in nats.
        greedy: whether each of its tokens is the likeliest.
    """

    logp: float
    greedy: bool


def likelihoods(model: nn.Module, asked: Sequence[Continuation], progress: Progress) -> list[Likelihood]:
    """Log-likelihoods of continuations, in the order given.

    The last token of a continuation is never an input, so that answers of one token cost one pass over their question
    together. Models that cannot pack get every sequence by itself, padded.

    Args:
        model: a causal language model of transformers, adapted or not; its mode and attention are left as they were.
    """
    if not asked:
        return []
    device = next(model.parameters()).device
    numbers: dict[tuple[int, ...], int] = {}
    of_input = [numbers.setdefault(tuple(item.ids[:-1]), len(numbers)) for item in asked]
    inputs = list(numbers)
    askers: list[list[int]] = [[] for _ in inputs]
    for at, number in enumerate(of_input):
        askers[number].append(at)
    packed = packing_obstacle(model) is None
    most = getattr(model, "tokens_at_once", TOKENS_AT_ONCE)
    found: list[Likelihood | None] = [None] * len(asked)
    was_training, attention = model.training, cast(Any, model).config._attn_implementation
    model.eval()
    done = 0
    try:
        with torch.no_grad(), keeping_freed_memory():
            for group in Sequences(inputs).groups(most):
                progress("scoring answers", done, len(asked))
                chosen = [inputs[number] for number in group]
                tree = laid_out(chosen) if packed else _apart(chosen)
                members = [
                    (at, places) for number, places in zip(group, tree.places, strict=True) for at in askers[number]
                ]
                positions = [places[len(places) - asked[at].targets :] for at, places in members]
                targets = [torch.tensor(asked[at].ids[-asked[at].targets :]) for at, _ in members]
                logps, greedy = next_token_ranks(
                    model, tree.batch.to(device), torch.cat(positions).to(device), torch.cat(targets).to(device)
                )
                lengths = [len(part) for part in positions]
                parts = zip(logps.double().cpu().split(lengths), greedy.cpu().split(lengths), strict=True)
                for (at, _), (own, likeliest) in zip(members, parts, strict=True):
                    found[at] = Likelihood(float(own.sum()), bool(likeliest.all()))
                done += len(members)
    finally:
        use_attention(model, attention)
        model.train(was_training)
    progress("scoring answers", len(asked), len(asked))
    return cast(list[Likelihood], found)


def _apart(sequences: Sequence[Sequence[int]]) -> Tree:
    """Every sequence as a row of its own."""
    rows = [Example(torch.tensor(ids)) for ids in sequences]
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    places: list[Tensor] = [torch.arange(start, start + len(row)) for start, row in zip(starts, rows, strict=False)]
    return Tree(pack(rows, "padded"), places)
