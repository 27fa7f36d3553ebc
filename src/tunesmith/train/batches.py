"""Which rows an optimizer step sees: a pure function of the step's number."""

from __future__ import annotations

from dataclasses import replace

import torch

from tunesmith.batch import Batch, pack
from tunesmith.data.mix import RowOrder
from tunesmith.data.stored import RenderedRows
from tunesmith.recipe import Recipe
from tunesmith.resolved import Plan
from tunesmith.train.parallel import rank, world_size


class StepBatches:
    """The micro-batches of each optimizer step for this process.

    Args:
        rows: the training rows.
        order: the stream in which they are visited.
        batch_size: rows per optimizer step over all processes.
        total_rows: where the stream ends, so that the last step may be smaller.
        plan: micro-batch and layout.
        even: whether every process gets as many micro-batches as the others, with some that train nothing: where
            weights are spread over processes, a pass of one needs all of them.
    """

    def __init__(
        self,
        rows: RenderedRows,
        order: RowOrder,
        *,
        batch_size: int,
        total_rows: int,
        plan: Plan,
        even: bool = False,
    ) -> None:
        self.rows, self.order = rows, order
        self.batch_size, self.total_rows, self.plan, self.even = batch_size, total_rows, plan, even

    @classmethod
    def of_job(cls, recipe: Recipe, plan: Plan, rows: RenderedRows, order: RowOrder) -> StepBatches:
        """The batches of a whole job, whose last epoch ends with its last row."""
        spec = recipe.train
        total = plan.steps * spec.batch_size
        if spec.epochs is not None or spec.steps is None:
            total = min(total, max(1, round(plan.epochs * order.epoch_rows)))
        return cls(rows, order, batch_size=spec.batch_size, total_rows=total, plan=plan, even=spec.shard)

    def __call__(self, step: int, micro_batch: int | None = None) -> list[Batch]:
        layout = "packed" if self.plan.packing else "padded"
        groups = self.groups(step, micro_batch)
        mine = [pack([self.rows[at].example for at in group], layout) for group in groups[rank() :: world_size()]]
        if self.even and groups:
            missing = -(-len(groups) // world_size()) - len(mine)
            shortest = self.rows[groups[0][0]].example
            mine += [_filler(pack([shortest], layout))] * missing
        return mine

    def groups(self, step: int, micro_batch: int | None = None) -> list[list[int]]:
        """Indices of the rows in each micro-batch of a step, over all processes, which take them in turn.

        Args:
            step: counted from 1; behind the last step there are none.
            micro_batch: rows of each, when it is not what the plan says.
        """
        start = (step - 1) * self.batch_size
        chosen = self.order.rows(start, min(start + self.batch_size, self.total_rows))
        # Rows of like length share a micro-batch, which saves padding and cannot change the gradient.
        chosen.sort(key=lambda at: (int(self.rows.lengths[at]), at))
        size = micro_batch or self.plan.micro_batch
        if self.plan.streamed_tokens is not None:
            return self._filled(chosen, size, self.plan.streamed_tokens)
        return [chosen[at : at + size] for at in range(0, len(chosen), size)]

    def _filled(self, chosen: list[int], most_rows: int, most_tokens: int) -> list[list[int]]:
        """Groups with as many tokens as may be, because each of them reads the whole model."""
        groups, tokens = list[list[int]](), 0
        for at in chosen:
            length = int(self.rows.lengths[at])
            if not groups or len(groups[-1]) == most_rows or tokens + length > most_tokens:
                groups.append([])
                tokens = 0
            groups[-1].append(at)
            tokens += length
        return groups


def _filler(batch: Batch) -> Batch:
    kept = {name: tensor if batch.scopes[name] == "token" else tensor[:0] for name, tensor in batch.tensors.items()}
    weights = torch.zeros_like(batch.tensors["target_weights"])
    return replace(batch, tensors={**kept, "target_weights": weights}, filler=True)
