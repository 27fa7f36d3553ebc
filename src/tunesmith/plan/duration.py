"""How long a job takes on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunesmith.models.measure import Shape
from tunesmith.plan.hardware import DTYPES, Hardware, multiply_rate
from tunesmith.recipe import Duration, Parameters, Recipe, Workload

EFFICIENCY = {"cpu": 0.11, "mps": 0.25, "cuda": 0.35}
"""Share of the rate of a large matrix product that a training step reaches; replaced by `measured` in every report."""
DECODE_OVERHEAD_SECONDS = {"cpu": 1.3e-3, "mps": 1e-3, "cuda": 4e-4}
"""Of one decoder block for one new token, besides reading its weights."""


@dataclass(frozen=True)
class Timed:
    """What a job does, as far as its time depends on it."""

    workload: Workload
    hardware: Hardware
    dtype: str
    steps: int
    max_new_tokens: int
    judged_rows: int


def predict_duration(recipe: Recipe, shape: Shape, parameters: Parameters, given: Timed) -> Duration:
    """Useful operations over the rate of this machine: 4 per frozen weight and token, 6 per trained one."""
    trained = min(1.0, parameters.trainable / max(1, shape.linear_weights + shape.head_weights))
    rows = given.steps * recipe.train.batch_size
    tokens = rows * given.workload.tokens / max(1, given.workload.rows)
    targets = rows * given.workload.targets / max(1, given.workload.rows)
    per_weight = 4 + 2 * trained
    flops = per_weight * (tokens * shape.linear_weights + targets * shape.head_weights)
    kind = given.hardware.device.type
    rate = multiply_rate(given.hardware.device, DTYPES[given.dtype]) * EFFICIENCY.get(kind, 0.1)
    training = flops / rate / given.hardware.processes
    evaluating = 0.0
    if recipe.evaluate != "off" and given.judged_rows:
        judged = given.judged_rows + (recipe.evaluate.probed_rows if given.max_new_tokens else 0)
        batches = math.ceil(judged / recipe.evaluate.batch_size)
        token_seconds = shape.layers * DECODE_OVERHEAD_SECONDS.get(kind, 1e-3)
        prompts = judged * given.workload.tokens / max(1, given.workload.rows)
        reading = 2 * prompts * shape.linear_weights / rate
        evaluating = 2 * (batches * given.max_new_tokens * token_seconds + 2 * reading)
    return Duration(
        train_seconds=training,
        evaluate_seconds=evaluating,
        seconds=training + evaluating,
        flops=float(flops),
        flops_per_second=rate,
    )
