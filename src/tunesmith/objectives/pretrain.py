"""Continued pretraining on raw documents (Gururangan et al. 2020; Ibrahim et al. 2024)."""

from __future__ import annotations

from typing import Literal

from tunesmith.objectives.supervised import NextToken


class Pretrain(NextToken):
    """Cross-entropy of every token of every document, averaged over all targets of an optimizer step.

    Rows are blocks of `data.max_length` tokens, see `data/blocks.py`; here they are batches like any other.
    """

    kind: Literal["pretrain"] = "pretrain"
    """Go on with pretraining: predict every token of raw documents, which are cut and laid together into blocks of
    `data.max_length` tokens without losing any. A run re-warms the learning rate from zero (`train.warmup`) and decays
    it again (`train.schedule`), which Ibrahim et al. 2024 find as good as pretraining from scratch on all data when
    some general text is replayed (`data.replay`); how long it warms up matters little, how high it goes decides between
    learning and forgetting."""
