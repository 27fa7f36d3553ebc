"""How fast this machine runs a job's own blocks: copies of the model with one and with three of them, timed.

The difference is what blocks take, the remainder what embeddings, head and loss take. Rows, method, dtype and
checkpointing are the job's own, so that nothing of the arithmetic has to be modelled; weights are made up, because they
do not change the time. A prediction alone depends on it, never a decision.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.base import InputError, Progress, TunesmithError, silent
from tunesmith.batch import Example, pack
from tunesmith.files import file_sha256, sync_file
from tunesmith.models.attention import use_default_attention
from tunesmith.models.measure import Shape, shape_of
from tunesmith.models.projection import rounded_up
from tunesmith.models.quantized import FOUR_BIT, PackedWeight, settled_quantization
from tunesmith.pipeline.planning import Planned
from tunesmith.pipeline.shortened import Shortened, copy_of
from tunesmith.plan.duration import Pace, Span, predict_duration
from tunesmith.plan.hardware import DTYPES, wait_for
from tunesmith.plan.resolve import timed_job
from tunesmith.resolved import Plan
from tunesmith.train.batches import StepBatches

BLOCKS = (1, 3)
SECONDS = 4.0
"""What the whole measurement should take."""
LEARNING = 0.45 * SECONDS
"""What of it passes forwards and backwards should take."""
WORTH_TIMING = 60.0
"""Seconds that a job must seem to take before its own blocks are timed without being asked."""
MOST_MEMORY = 0.25
"""Share of the machine's memory that copies may take."""
AT_ONCE = 1024
"""Tokens of a timed pass, about: small micro-batches are learned from one after another, so that their sizes differ
as in the job, and rows are judged many at a time, however few they are learned from."""
LOOKED_AT = 8
"""Steps among whose micro-batches a usual one is looked for."""
WRITTEN = 12
"""Tokens of the answers that are timed."""
SAVED, MOST_SAVED = 2**26, 2**29
"""Bytes that are written to time a checkpoint: at least, and at most."""
Clock = Callable[[], float]


def calibrated(planned: Planned, progress: Progress = silent, clock: Clock = time.perf_counter) -> Planned:
    """The job with a plan whose time was predicted by its own blocks; as it is, with a note, where that cannot be.

    Args:
        clock: seconds.
    """
    plan, given = planned.plan, planned.given
    if plan.streamed_tokens is not None or given is None:
        return planned
    progress("timing blocks of this model", 0, None)
    try:
        if planned.prepared is None:
            raise InputError("that needs rows and a tokenizer")
        shape = shape_of(copy_of(planned, None))
        pace = _pace(planned, shape, clock)
    except (
        TunesmithError,
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        note = f"blocks of this model could not be timed by themselves ({reason}): the predicted time is a rough one"
        return planned.with_plan(plan.model_copy(update={"notes": [*plan.notes, note]}))
    sizes = 1 if given.heaviest is None else given.heaviest(plan.micro_batch).sizes
    timed = timed_job(planned.recipe, planned.hardware, given.judged, plan.workload, plan)
    timed = replace(timed, sizes=sizes, saved_bytes=_checkpoint_bytes(plan) * _checkpoints(plan) + _trained_bytes(plan))
    found = predict_duration(planned.recipe, shape, plan.parameters, timed, pace)
    return planned.with_plan(plan.model_copy(update={"time": found}))


def timed_if_long(planned: Planned, progress: Progress = silent) -> Planned:
    """The job with its own blocks timed, where that takes a small part of the time that it seems to need."""
    return calibrated(planned, progress) if planned.plan.time.seconds > WORTH_TIMING else planned


def _pace(planned: Planned, shape: Shape, clock: Clock) -> Pace:
    started, plan = clock(), planned.plan
    width = 4 if plan.frozen_dtype == "fp32" else 2
    needed = (width + 12 * planned.recipe.method.trains_all) * (
        len(BLOCKS) * shape.head_weights * (1 if shape.head_tied else 2)
        + sum(BLOCKS) * shape.linear_weights / max(1, shape.layers)
    )
    job = plan.memory.peak_bytes - plan.memory.runtime
    if needed > min(job, MOST_MEMORY * planned.hardware.memory_bytes):
        raise InputError(f"copies with {sum(BLOCKS)} of them would take {needed / 2**30:.1f} GiB")
    layout, device = "packed" if plan.packing else "padded", planned.hardware.device
    usual, other = usual_groups(planned, plan)
    learned = [pack(rows, layout).to(device) for rows in usual]
    rows = [row for group in usual for row in group]
    read = pack(rows * -(-AT_ONCE // sum(map(len, rows))), layout).to(device)
    timed = Stopwatch(clock, planned)
    copies = [Shortened(planned, blocks, learned) for blocks in BLOCKS]
    share = SECONDS / 2

    def spanned(runs: Sequence[Callable[[], Any]], most: float) -> Span:
        return span(*timed.in_turn(runs, most))

    for one in copies:
        one.model.train()
    learning = spanned([one.learn for one in copies], LEARNING)
    further = pack(other, layout).to(device) if other else None
    fresh = 0.0 if further is None else timed.first(partial(copies[0].learn, [further]))
    starting = span(*([timed.once(one.update)] for one in copies))
    updating = spanned([one.update for one in copies], 0.1 * share)
    for one in copies:
        one.optimizer.zero_grad(set_to_none=True)
        one.model.eval()
    reading = spanned([partial(one.read, read) for one in copies], 0.3 * share)
    return Pace(
        tokens=sum(batch.tokens for batch in learned),
        learning=learning,
        read_tokens=read.tokens,
        reading=reading,
        updating=updating,
        starting=Span(*(max(0.0, first - other) for first, other in zip(starting, updating, strict=True))),
        writing=_writing(copies, timed, 0.6 * share),
        unpacking=_unpacking(planned, shape, timed),
        fresh=fresh,
        saving=_saving(Path(planned.recipe.output), _timed_bytes(plan), timed),
        seconds=clock() - started,
    )


def _writing(copies: Sequence[Shortened], clock: Stopwatch, most: float) -> Span | None:
    """Seconds of one pass that adds a token to each answer of a batch; None where nothing is answered."""
    if not copies[0].rows_answered:
        return None
    runs = []
    for one in copies:
        use_default_attention(one.model)
        runs += [partial(one.write, 1), partial(one.write, 1 + WRITTEN)]
    short, longer, more_short, more_longer = clock.in_turn(runs, most)
    few, more = (
        [(long - start) / WRITTEN for start, long in zip(*pair, strict=True)]
        for pair in ((short, longer), (more_short, more_longer))
    )
    return span(few, more)


@dataclass(frozen=True)
class Stopwatch:
    """Seconds of what a job's device does, when it is done with it."""

    clock: Clock
    planned: Planned

    def __call__(self) -> float:
        wait_for(self.planned.hardware.device)
        return self.clock()

    def in_turn(self, runs: Sequence[Callable[[], Any]], most: float) -> list[list[float]]:
        """Seconds of each run in some turns, which take about so many seconds together, or twice that for a third.

        A machine that others use too is faster at one moment than at the next: runs that are compared take turns. The
        first turns of a process are slow: memory is new to it, and the first one is not counted.
        """
        for run in runs:
            run()
        turns, started = list[list[float]](), self()
        while len(turns) < 2 or (len(turns) < 15 and self() - started < most * (2 if len(turns) < 3 else 1)):
            turns.append([self.once(run) for run in runs])
        return [list(taken) for taken in zip(*turns, strict=True)]

    def once(self, run: Callable[[], Any]) -> float:
        started = self()
        run()
        return self() - started

    def first(self, run: Callable[[], Any]) -> float:
        """Seconds that a first run takes longer than a second one."""
        return max(0.0, self.once(run) - self.once(run))


def span(few: Sequence[float], more: Sequence[float]) -> Span:
    """What a block takes and what the rest, from seconds of copies with few and with more blocks that took turns."""
    gaps = [longer - shorter for shorter, longer in zip(few, more, strict=True)]
    block = max(0.0, median(gaps) / (BLOCKS[1] - BLOCKS[0]))
    return Span(block, max(0.0, median(few) - BLOCKS[0] * block))


def usual_groups(planned: Planned, plan: Plan) -> tuple[list[list[Example]], list[Example]]:
    """Rows of micro-batches of the job, from small to large and with about `AT_ONCE` tokens, or a usual one; and of
    one whose number of tokens is another, or none."""
    prepared = planned.prepared
    assert prepared is not None
    batches = StepBatches.of_job(planned.recipe, plan, prepared.train, prepared.order)
    groups = [group for step in range(1, min(plan.steps, LOOKED_AT) + 1) for group in batches.groups(step)]

    def tokens(group: Sequence[int]) -> int:
        return int(prepared.train.lengths[list(group)].sum())

    groups.sort(key=tokens)
    count = min(len(groups), max(1, AT_ONCE // tokens(groups[len(groups) // 2])))
    chosen = [groups[int((at + 0.5) / count * len(groups))] for at in range(count)]
    known = {rounded_up(tokens(group)) for group in chosen}
    others = [group for group in groups if rounded_up(tokens(group)) not in known]
    found = [[prepared.train[at].example for at in group] for group in (*chosen, *others[:1])]
    return found[:count], next(iter(found[count:]), [])


def _checkpoints(plan: Plan) -> int:
    """How many a run writes: at its intervals, at validations, which are mostly the best so far, and at its end."""
    every = [interval for interval in (plan.checkpoint_every, plan.evaluate_every) if interval is not None]
    return -(-plan.steps // min(every, default=plan.steps))


def _trained_bytes(plan: Plan) -> float:
    return 4.0 * plan.parameters.trainable


def _checkpoint_bytes(plan: Plan) -> float:
    return _trained_bytes(plan) + plan.memory.optimizer


def _timed_bytes(plan: Plan) -> int:
    """How much to write: a small file does not show what a large one costs, which passes by the processor's cache and
    fills memory that waits to be written."""
    return int(min(max(_checkpoint_bytes(plan) / 3, SAVED), MOST_SAVED))


def _saving(output: Path, size: int, clock: Stopwatch) -> float:
    """Seconds in which a byte of a checkpoint is copied, written, synced and hashed where the run will be."""
    beside = next(path for path in output.absolute().parents if path.is_dir())
    tensor = torch.zeros(size // 4)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".timed-") as directory:
        path, started = Path(directory) / "tensors", clock()
        save_file({"zeros": tensor.clone()}, path)  # once: blocks of the disk that were written before are quicker
        sync_file(path)
        file_sha256(path)
        return (clock() - started) / size


def _unpacking(planned: Planned, shape: Shape, clock: Stopwatch) -> float:
    """Seconds that a micro-batch takes to make frozen weights out of 4 bits: for every product with them."""
    spec, plan = planned.recipe.model, planned.plan
    held = settled_quantization(spec.quantization, planned.config, spec.path)
    if held is None or held.kind not in FOUR_BIT:
        return 0.0
    from bitsandbytes.functional import quantize_4bit  # pyright: ignore[reportMissingImports]

    weight = torch.empty(shape.intermediate, shape.hidden, device=planned.hardware.device).uniform_(-0.03, 0.03)
    dtype = DTYPES[plan.dtype]
    data, state = quantize_4bit(weight.to(dtype), quant_type=held.kind, compress_statistics=held.double)
    packed = PackedWeight(_Stored(data, state))
    passes = 3 if plan.gradient_checkpointing else 2
    return passes * shape.linear_weights / weight.numel() * median(clock.in_turn([lambda: packed.to(dtype)], 0.1)[0])


@dataclass(frozen=True)
class _Stored:
    """As bitsandbytes' parameters have it."""

    data: Tensor
    quant_state: Any
