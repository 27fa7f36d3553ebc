"""Metrics over strings and numbers, and bootstrap intervals for them."""

from tunesmith.base import InputError, nearest
from tunesmith.metrics.intervals import Estimate, Interval, bootstrap, bootstrap_over_seeds, paired_bootstrap
from tunesmith.metrics.labels import BETWEEN, LABEL_METRICS, confusion
from tunesmith.metrics.records import RECORD_METRICS
from tunesmith.metrics.significance import holm, paired_test
from tunesmith.metrics.statistics import RowStatistics, calibration_rows, confidence_rows, mean_rows
from tunesmith.metrics.text import TEXT_METRICS, Metric, bits_per_byte_rows, perplexity_rows

__all__ = [
    "BETWEEN",
    "METRICS",
    "OF_DOCUMENTS",
    "Estimate",
    "Interval",
    "Metric",
    "RowStatistics",
    "bits_per_byte_rows",
    "bootstrap",
    "bootstrap_over_seeds",
    "calibration_rows",
    "confidence_rows",
    "confusion",
    "holm",
    "mean_rows",
    "metric",
    "paired_bootstrap",
    "paired_test",
    "perplexity_rows",
]

METRICS: dict[str, Metric] = {**TEXT_METRICS, **LABEL_METRICS, **RECORD_METRICS}
"""Every metric that compares predictions with references, by name."""

OF_DOCUMENTS: tuple[str, str] = ("perplexity", "bits_per_byte")
"""Names of the metrics of held-out text."""

PREFERENCE_ACCURACY, MARGIN, CALIBRATION_ERROR = "preference_accuracy", "margin", "calibration_error"
REWARD_ACCURACY = "reward_accuracy"
"""In how many pairs the better answer gained more likelihood than the worse against the base, which stands at 0.5."""
COMPARED = {REWARD_ACCURACY: "higher", PREFERENCE_ACCURACY: "higher", MARGIN: "higher", CALIBRATION_ERROR: "lower"}
"""Metrics of how two answers compare, and which way they improve."""
REWARD = "reward"
"""Mean of what answers are worth by the recipe's own rewards."""


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none; the message names the closest one and lists all.
    """
    if name not in METRICS:
        known = list(METRICS)
        raise InputError(f"unknown metric {name!r}{nearest(name, known)}", fix=f"choose one of {', '.join(known)}")
    return METRICS[name]
