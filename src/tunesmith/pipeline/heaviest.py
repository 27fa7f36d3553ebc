"""The largest micro-batch of a job, read off the rows in the order in which they will come."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tunesmith.data.prepare import Prepared
from tunesmith.models.projection import rounded_up
from tunesmith.plan.given import Heaviest, Largest

MOST_ROWS = 20_000
"""Places of the stream that are looked at; the longest rows of all are looked at besides."""


def heaviest_of(prepared: Prepared, batch_size: int, steps: int, *, padded: bool = False) -> Heaviest:
    """From rows of a micro-batch to the largest one.

    Rows of like length share a micro-batch, as `StepBatches` has it.

    Args:
        padded: whether rows are made as long as the longest of their micro-batch.
    """
    train = prepared.train
    asked = steps * batch_size
    shown = max(1, min(steps, MOST_ROWS // batch_size)) * batch_size
    places = np.asarray(prepared.order.rows(0, shown), dtype=np.int64)
    windows = [places[at : at + batch_size] for at in range(0, shown, batch_size)]
    if shown < asked and asked >= prepared.order.epoch_rows:  # every row comes, and some were not looked at
        windows.append(np.argsort(train.lengths, kind="stable")[-batch_size:])

    @lru_cache(maxsize=64)
    def heaviest(rows: int) -> Largest:
        sizes, targets = list[int](), list[int]()
        for window in windows:
            window = window[np.argsort(train.lengths[window], kind="stable")]
            lengths, starts = train.lengths[window], np.arange(0, len(window), rows)
            if padded:
                counts = np.diff(np.append(starts, len(window)))
                sizes += (np.maximum.reduceat(lengths, starts) * counts).tolist()
            else:
                sizes += np.add.reduceat(lengths, starts).tolist()
            targets += np.add.reduceat(train.targets[window], starts).tolist()
        tokens, of_these = max(zip(sizes, targets, strict=True))
        return Largest(tokens, of_these, len({rounded_up(size) for size in sizes}), len(sizes))

    return heaviest
