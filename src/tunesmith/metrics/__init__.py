"""Metrics over strings and numbers, and bootstrap intervals for them."""

from tunesmith.metrics.intervals import Estimate, Interval, bootstrap, paired_bootstrap
from tunesmith.metrics.statistics import RowStatistics, mean_rows
from tunesmith.metrics.text import METRICS, Metric, metric, perplexity_rows

__all__ = [
    "METRICS",
    "Estimate",
    "Interval",
    "Metric",
    "RowStatistics",
    "bootstrap",
    "mean_rows",
    "metric",
    "paired_bootstrap",
    "perplexity_rows",
]
