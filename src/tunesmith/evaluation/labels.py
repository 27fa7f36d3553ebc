"""What a model that judges says of held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.batch import pack
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.evaluation.answers import Judged, groups_of_rows, prompt_text
from tunesmith.models.attention import use_attention
from tunesmith.objectives import TaskObjective


def answers_of(row: Row) -> tuple[str, ...]:
    """The labels of a row, or of its words."""
    return row.labels if row.words else row.references


def judge_labels(
    model: nn.Module, objective: TaskObjective, rows: Sequence[Rendered], *, packed: bool, progress: Progress
) -> list[Judged]:
    """Asks the model for every row's labels; rows must carry theirs as the tensor `labels`."""
    found: dict[int, Tensor] = dict(outputs_of_rows(model, objective, rows, packed=packed, progress=progress))
    return [_judged(objective, row, found[at]) for at, row in enumerate(rows)]


def judge_constant(objective: TaskObjective, rows: Sequence[Rendered], outputs: Tensor) -> list[Judged]:
    """What saying the same of every row comes to.

    Args:
        outputs: ``[labels]``.
    """
    return [_judged(objective, row, outputs.expand(row.example.targets, -1)) for row in rows]


def outputs_of_rows(
    model: nn.Module, objective: TaskObjective, rows: Sequence[Rendered], *, packed: bool, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Number of each row, and the head's outputs for it: fp32 ``[targets, labels]`` on the CPU."""
    device = next(model.parameters()).device
    was_training, attention = model.training, cast(Any, model).config._attn_implementation
    model.eval()
    examples = [row.example for row in rows]
    done = 0
    try:
        with torch.no_grad():
            for chosen in groups_of_rows([len(example) for example in examples]):
                progress("judging rows", done, len(rows))
                done += len(chosen)
                batch = pack([examples[at] for at in chosen], "packed" if packed else "padded")
                outputs = objective.outputs(model, batch.to(device)).cpu()
                yield from zip(chosen, outputs.split([examples[at].targets for at in chosen]), strict=True)
    finally:
        use_attention(model, attention)
        model.train(was_training)
    progress("judging rows", len(rows), len(rows))


def _judged(objective: TaskObjective, row: Rendered, outputs: Tensor) -> Judged:
    targets = row.example.targets
    nll = float(objective.losses(outputs, row.example.tensors["labels"]).sum())
    return Judged(
        source=str(row.row.source),
        prompt=prompt_text(row),
        references=[objective.said(answers_of(row.row)[:targets] if row.row.words else answers_of(row.row))],
        answer=objective.answer(outputs),
        finish_reason=None,
        nll=nll if nll - nll == 0.0 else None,
        targets=targets,
        margin=objective.margin_of(outputs),
        confidence=objective.confidence_of(outputs),
    )
