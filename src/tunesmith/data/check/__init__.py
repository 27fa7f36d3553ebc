"""What is wrong with rows that no single row shows: near copies, contradictions, leaks, odd texts, lopsided labels."""

from tunesmith.data.check.checks import Checks
from tunesmith.data.check.finding import Finding, Instance

__all__ = ["Checks", "Finding", "Instance"]
