"""Which rows an optimizer step sees: a pure function of the step's number."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.batch import Batch, pack
from tunesmith.data.mix import RowOrder
from tunesmith.data.render import Rendered
from tunesmith.recipe import Plan
from tunesmith.train.parallel import rank, world_size


class StepBatches:
    """The micro-batches of each optimizer step for this process.

    Args:
        rows: the training rows.
        order: the stream in which they are visited.
        batch_size: rows per optimizer step over all processes.
        total_rows: where the stream ends, so that the last step may be smaller.
        plan: micro-batch and layout.
    """

    def __init__(
        self, rows: Sequence[Rendered], order: RowOrder, *, batch_size: int, total_rows: int, plan: Plan
    ) -> None:
        self.rows, self.order = rows, order
        self.batch_size, self.total_rows, self.plan = batch_size, total_rows, plan

    def __call__(self, step: int) -> list[Batch]:
        start = (step - 1) * self.batch_size
        chosen = self.order.rows(start, min(start + self.batch_size, self.total_rows))
        # Rows of like length share a micro-batch, which saves padding and cannot change the gradient.
        chosen.sort(key=lambda at: (len(self.rows[at].example), at))
        size = self.plan.micro_batch
        groups = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        layout = "packed" if self.plan.packing else "padded"
        return [pack([self.rows[at].example for at in group], layout) for group in groups[rank() :: world_size()]]
