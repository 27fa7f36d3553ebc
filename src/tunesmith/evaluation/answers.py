"""What a model answers to held-out rows, and how probable it finds their reference answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import Progress, silent
from tunesmith.batch import Example, pack
from tunesmith.data.render import Rendered
from tunesmith.engine.generate import Sampling, generate
from tunesmith.models.forward import use_attention
from tunesmith.objectives import Supervised, TrainingObjective

TOKENS_AT_ONCE = 4096
WRITING: TrainingObjective = Supervised()


@dataclass(frozen=True)
class Judged:
    """One held-out row as one model dealt with it.

    Attributes:
        source: file and line.
        prompt: the conversation before the answer, as text; empty for raw text.
        references: acceptable answers; for raw text empty.
        answer: what the model said; None for raw text.
        finish_reason: `stop` or `length`; None for raw text.
        nll: negative log-likelihood of the first reference, in nats; None when it is not finite.
        targets: tokens that `nll` is summed over.
        reward: what the answer is worth by the recipe's rewards; None without any.
    """

    source: str
    prompt: str
    references: list[str]
    answer: str | None
    finish_reason: str | None
    nll: float | None
    targets: int
    reward: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judging:
    """How rows are answered: the same for base and tuned.

    Attributes:
        likelihoods: whether reference answers are looked at too.
    """

    max_new_tokens: int
    batch_size: int
    stop_ids: frozenset[int]
    packed: bool
    generates: bool = True
    likelihoods: bool = True


def judge(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rendered], how: Judging, progress: Progress
) -> list[Judged]:
    """Answers every row greedily and measures the likelihood of its reference."""
    asked = [at for at, row in enumerate(rows) if row.prompt_ids and how.generates]
    generations = generate(
        model,
        [rows[at].prompt_ids for at in asked],
        Sampling(how.max_new_tokens),
        stop_ids=set(how.stop_ids),
        batch_size=how.batch_size,
        progress=progress,
    )
    answers = dict(zip(asked, generations, strict=True))
    likelihoods = [math.nan] * len(rows)
    if how.likelihoods:
        likelihoods = row_nlls(model, [row.example for row in rows], packed=how.packed, progress=progress)
    judged = []
    for at, row in enumerate(rows):
        said = answers.get(at)
        nll = likelihoods[at]
        judged.append(
            Judged(
                source=str(row.row.source),
                prompt=prompt_text(row),
                references=list(row.row.references) if row.row.messages else [],
                answer=cast(str, tokenizer.decode(said.token_ids, skip_special_tokens=True)) if said else None,
                finish_reason=said.finish_reason if said else None,
                nll=nll if math.isfinite(nll) else None,
                targets=row.example.targets if how.likelihoods else 0,
            )
        )
    return judged


def prompt_text(row: Rendered) -> str:
    """The conversation before the last answer, as people read it."""
    if row.row.words:
        return " ".join(row.row.words)
    return turns_text(row.row.messages[:-1])


def turns_text(turns: Sequence[dict[str, Any]]) -> str:
    """Turns as one text; a single one by itself, without who says it."""
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def row_nlls(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    packed: bool,
    progress: Progress,
    objective: TrainingObjective = WRITING,
) -> list[float]:
    """Negative log-likelihood of each row's targets, in nats, in the order given."""
    device = next(model.parameters()).device
    was_training, attention = model.training, cast(Any, model).config._attn_implementation
    model.eval()
    sums = [0.0] * len(examples)
    done, lengths = 0, [len(example) for example in examples]
    try:
        with torch.no_grad():
            for chosen in groups_of_rows(lengths, getattr(model, "tokens_at_once", TOKENS_AT_ONCE)):
                progress("scoring", done, len(examples))
                done += len(chosen)
                batch = pack([examples[at] for at in chosen], "packed" if packed else "padded")
                logps, targets = objective.target_logps(model, batch.to(device))
                weighted = (logps * batch.tensors["target_weights"].to(device)[targets]).double().cpu()
                row_of_target = torch.searchsorted(batch.segments[:, 0].contiguous(), targets.cpu(), right=True) - 1
                totals = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row_of_target, weighted)
                for at, total in zip(chosen, totals.tolist(), strict=True):
                    sums[at] = -total
    finally:
        use_attention(model, attention)  # attention over segments knows no call without them
        model.train(was_training)
    progress("scoring", len(examples), len(examples))
    return sums


def groups_of_rows(lengths: Sequence[int], most: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Numbers of rows, the shortest first, in groups of at most so many tokens (a longer row is a group by itself)."""
    groups: list[list[int]] = []
    tokens = 0
    for at in sorted(range(len(lengths)), key=lambda at: int(lengths[at])):
        if not groups or tokens + lengths[at] > most:
            groups.append([])
            tokens = 0
        groups[-1].append(at)
        tokens += int(lengths[at])
    return groups


def mean_nll(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    packed: bool,
    progress: Progress = silent,
    objective: TrainingObjective = WRITING,
) -> float:
    """Average negative log-likelihood per target: the validation loss."""
    total = sum(row_nlls(model, examples, packed=packed, progress=progress, objective=objective))
    return total / max(1, sum(example.targets for example in examples))


Evaluation = dict[str, Any]
"""What is stored of one model's evaluation: `rows` (of `Judged`) and `general` (losses on general text)."""
