"""Retrieval: passages, BM25, sentence encoders, and both together."""

from tunesmith.retrieve.bm25 import Bm25
from tunesmith.retrieve.dense import Dense
from tunesmith.retrieve.fusion import Hybrid
from tunesmith.retrieve.passages import Passage, parted
from tunesmith.retrieve.ranking import Ranker

__all__ = ["Bm25", "Dense", "Hybrid", "Passage", "Ranker", "parted"]
