"""How long a job takes on a machine: by the time of its own blocks, or by the rate of a matrix product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tunesmith.models.measure import Shape
from tunesmith.plan.hardware import DTYPES, Hardware, multiply_rate
from tunesmith.recipe import Recipe
from tunesmith.resolved import Duration, Parameters, Workload

EFFICIENCY = {"cpu": 0.11, "mps": 0.25, "cuda": 0.35}
"""Share of the rate of a large matrix product that a training step reaches; replaced by `measured` in every report."""
DECODE_OVERHEAD_SECONDS = {"cpu": 1.3e-3, "mps": 1e-3, "cuda": 4e-4}
"""Of one decoder block for one new token, besides reading its weights."""
CALIBRATED = "blocks of this model, timed on rows of this job"


@dataclass(frozen=True)
class Timed:
    """What a job does, as far as its time depends on it.

    Attributes:
        judged_rows: held-out rows of ``judged_row`` tokens, which base and tuned model read, and answer if ``writes``.
        answer: tokens of a reference answer on average, as far as the limit.
        general_tokens: of the general text that both read.
        micro_batches: of a step, over all processes.
        sizes: how many numbers of tokens micro-batches have.
        saved_bytes: of all checkpoints, and of the result.
    """

    workload: Workload
    hardware: Hardware
    dtype: str
    steps: int
    max_new_tokens: int
    judged_rows: int
    judged_row: float
    writes: bool = True
    answer: float = 0.0
    general_tokens: int = 0
    micro_batches: int = 1
    sizes: int = 1
    saved_bytes: float = 0.0

    @property
    def row(self) -> float:
        """Tokens of a row."""
        return self.workload.tokens / max(1, self.workload.rows)


class Span(NamedTuple):
    """Seconds of one block, and of everything besides the blocks."""

    block: float
    rest: float

    def of(self, layers: int) -> float:
        return layers * self.block + self.rest


@dataclass(frozen=True)
class Pace:
    """What was measured on this machine with blocks of the job's own shape.

    Attributes:
        tokens: of the micro-batches that were timed.
        learning: seconds of their forward and backward passes.
        read_tokens: of the rows that were read.
        reading: seconds of their forward pass without gradients.
        updating: seconds of clipping and one update of the weights.
        starting: seconds more of the first update, which makes the optimizer's states.
        writing: seconds of a pass that adds one token to each of ``evaluate.batch_size`` answers.
        unpacking: seconds more that quantized weights take in every micro-batch.
        fresh: seconds more of the first micro-batch with a number of tokens, for which kernels are made.
        saving: seconds in which a byte of a checkpoint is written.
        seconds: that the measurement took.
    """

    tokens: int
    learning: Span
    read_tokens: int
    reading: Span
    updating: Span
    starting: Span
    writing: Span | None
    unpacking: float
    fresh: float
    saving: float
    seconds: float


def predict_duration(
    recipe: Recipe, shape: Shape, parameters: Parameters, given: Timed, pace: Pace | None = None
) -> Duration:
    """Seconds of training and of judging.

    Without a pace: useful operations over the rate of this machine, 4 per frozen weight and token, 6 per trained one.
    """
    rows = given.steps * recipe.train.batch_size
    flops = training_flops(shape, parameters, given.workload) * rows
    if pace is not None:
        return _by_pace(recipe, shape, given, pace, flops)
    kind = given.hardware.device.type
    rate = multiply_rate(given.hardware.device, DTYPES[given.dtype]) * EFFICIENCY.get(kind, 0.1)
    training = flops / rate / given.hardware.processes
    evaluating = 0.0
    if recipe.evaluate != "off" and given.judged_rows:
        reading = 2 * (given.judged_rows * given.judged_row + given.general_tokens) * shape.linear_weights / rate
        evaluating = 2 * reading
        if given.writes:
            batches = math.ceil(_answered(recipe, given) / recipe.evaluate.batch_size)
            token_seconds = shape.layers * DECODE_OVERHEAD_SECONDS.get(kind, 1e-3)
            evaluating += 2 * (batches * given.max_new_tokens * token_seconds + reading)
    return Duration(
        train_seconds=training,
        evaluate_seconds=evaluating,
        seconds=training + evaluating,
        flops=float(flops),
        flops_per_second=rate,
    )


def _answered(recipe: Recipe, given: Timed) -> int:
    """Rows that are answered: held-out ones, and those that are asked for what the model knows by heart."""
    return given.judged_rows + (0 if recipe.evaluate == "off" else recipe.evaluate.probed_rows)


def training_flops(shape: Shape, parameters: Parameters, workload: Workload) -> float:
    """Useful operations of training on one row: of a frozen weight and token 2 forward and 2 for the gradient of its
    input, of a trained one 2 more; the head counts at targets alone."""
    trained = min(1.0, parameters.trainable / max(1, shape.linear_weights + shape.head_weights))
    tokens = workload.tokens / max(1, workload.rows)
    targets = workload.targets / max(1, workload.rows)
    return (4 + 2 * trained) * (tokens * shape.linear_weights + targets * shape.head_weights)


def _by_pace(recipe: Recipe, shape: Shape, given: Timed, pace: Pace, flops: float) -> Duration:
    tokens = given.steps * recipe.train.batch_size * given.row
    learning = pace.learning.of(shape.layers) / pace.tokens * tokens
    learning += given.steps * given.micro_batches * pace.unpacking
    training = learning / given.hardware.processes + given.steps * pace.updating.of(shape.layers)
    training += given.sizes * pace.fresh + pace.starting.of(shape.layers) + given.saved_bytes * pace.saving
    evaluating = 0.0
    if recipe.evaluate != "off" and given.judged_rows:
        reading = pace.reading.of(shape.layers) / pace.read_tokens
        evaluating = 2 * (given.judged_rows * given.judged_row + given.general_tokens) * reading
        if given.writes and pace.writing is not None:
            # The tuned model has learned when to end. The base goes on to the limit on some data and answers as briefly
            # as the references on others: it is put in between.
            passes = (given.max_new_tokens + given.answer) / 2 + given.answer
            evaluating += _answered(recipe, given) / recipe.evaluate.batch_size * passes * pace.writing.of(shape.layers)
            evaluating += 2 * _answered(recipe, given) * given.judged_row * reading
    return Duration(
        train_seconds=training,
        evaluate_seconds=evaluating,
        seconds=training + evaluating,
        flops=float(flops),
        flops_per_second=flops / max(1e-9, training),
        source=CALIBRATED,
        measured_in_seconds=pace.seconds,
    )
