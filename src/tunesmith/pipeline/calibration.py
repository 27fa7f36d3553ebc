"""How fast this machine runs a job's own blocks: copies of the model with one and with three of them, timed.

The difference is what blocks take, the remainder what embeddings, head and loss take. Rows, method, dtype and
checkpointing are the job's own, so that nothing of the arithmetic has to be modelled; weights are made up, because they
do not change the time. A prediction alone depends on it, never a decision.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.base import InputError, Progress, TunesmithError, silent
from tunesmith.batch import Batch, pack
from tunesmith.engine.generate import Sampling, generate
from tunesmith.files import file_sha256, sync_file
from tunesmith.methods import trainable_parameters
from tunesmith.models.attention import use_default_attention
from tunesmith.models.measure import Shape, shape_of
from tunesmith.models.projection import rounded_up
from tunesmith.models.quantized import FOUR_BIT, PackedWeight, settled_quantization
from tunesmith.models.task_head import model_class
from tunesmith.objectives import Supervised, TaskObjective
from tunesmith.pipeline.planning import Planned
from tunesmith.plan.duration import Pace, Span, predict_duration
from tunesmith.plan.hardware import DTYPES, wait_for
from tunesmith.plan.resolve import timed_job
from tunesmith.resolved import Plan
from tunesmith.train.batches import StepBatches
from tunesmith.train.optim import build_optimizer
from tunesmith.train.parallel import clip_gradients
from tunesmith.train.precision import Precision

BLOCKS = (1, 3)
SECONDS = 4.0
"""What the whole measurement should take."""
WORTH_TIMING = 60.0
"""Seconds that a job must seem to take before its own blocks are timed without being asked."""
MOST_MEMORY = 0.25
"""Share of the machine's memory that copies may take."""
LOOKED_AT = 8
"""Steps among whose micro-batches a usual one is looked for."""
WRITTEN = 6
"""Tokens of the answers that are timed."""
SAVED, MOST_SAVED = 2**26, 2**29
"""Bytes that are written to time a checkpoint: at least, and at most."""
LARGE = 2**25
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
        shape.head_weights * (1 if shape.head_tied else 2) + BLOCKS[1] * shape.linear_weights / max(1, shape.layers)
    )
    if needed > MOST_MEMORY * planned.hardware.memory_bytes:
        raise InputError(f"even {BLOCKS[1]} of them take {needed / 2**30:.1f} GiB")
    batches = tuple(batch.to(planned.hardware.device) for batch in _usual_batches(planned, plan))
    batch = batches[0]
    few, more = (_times(planned, blocks, batches, _Clock(clock, planned)) for blocks in BLOCKS)
    gap = BLOCKS[1] - BLOCKS[0]

    def span(one: float, three: float) -> Span:
        block = max(0.0, (three - one) / gap)
        return Span(block, max(0.0, one - BLOCKS[0] * block))

    writing = None if few.writing is None or more.writing is None else span(few.writing, more.writing)
    return Pace(
        tokens=batch.tokens,
        learning=span(few.learning, more.learning),
        reading=span(few.reading, more.reading),
        updating=span(few.updating, more.updating),
        starting=span(few.starting, more.starting),
        writing=writing,
        unpacking=_unpacking(planned, shape, _Clock(clock, planned)),
        fresh=few.fresh,
        saving=_saving(Path(planned.recipe.output), _timed_bytes(plan), _Clock(clock, planned)),
        seconds=clock() - started,
    )


@dataclass(frozen=True)
class _Clock:
    clock: Clock
    planned: Planned

    def __call__(self) -> float:
        wait_for(self.planned.hardware.device)
        return self.clock()

    def timed(self, run: Callable[[], Any], most: float) -> float:
        """Seconds of the quickest of some runs after a first one, within so many seconds, or twice that for a third.

        The first runs of a process are slow for longer than one of them: memory is new to it.
        """
        run()
        taken, started = list[float](), self()
        while not taken or (len(taken) < 9 and self() - started + min(taken) < most * (2 if len(taken) < 3 else 1)):
            before = self()
            run()
            taken.append(self() - before)
        return min(taken)

    def first(self, run: Callable[[], Any]) -> float:
        """Seconds that a first run takes longer than a second one."""
        times = [self(), *((run(), self())[1] for _ in range(2))]
        return max(0.0, 2 * times[1] - times[0] - times[2])


@dataclass(frozen=True)
class _Times:
    """Seconds of one copy; ``writing`` of a pass, ``fresh`` more of a first pass of some size, ``starting`` more of the
    first update."""

    learning: float
    fresh: float
    reading: float
    updating: float
    starting: float
    writing: float | None


def _times(planned: Planned, blocks: int, batches: tuple[Batch, ...], clock: _Clock) -> _Times:
    batch, others = batches[0], batches[1:]
    plan, method = planned.plan, planned.recipe.method
    model = copy_of(planned, blocks)
    method.adapt(model)
    if plan.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    casts = method.needs_autocast or plan.dtype != plan.frozen_dtype
    precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)
    optimizer = build_optimizer(model, planned.recipe.train.model_copy(update={"groups": []}), plan.learning_rate)
    objective = planned.objective if isinstance(planned.objective, TaskObjective) else Supervised()
    parameters = list(trainable_parameters(model).values())
    share = SECONDS / 2

    accumulates = plan.micro_batch * planned.hardware.processes < planned.recipe.train.batch_size

    def learn(rows: Batch = batch) -> None:
        if not accumulates:  # then every pass makes its gradients anew, in memory that is new to the process
            optimizer.zero_grad(set_to_none=True)
        with precision.arithmetic():
            loss = torch.stack(list(objective.loss(model, rows).values())).sum()
        precision.backward(loss)

    def read() -> None:
        with torch.no_grad():
            objective.target_logps(model, batch)

    def update() -> None:
        clip_gradients(parameters, 1.0)
        optimizer.step()

    model.train()
    learning = clock.timed(learn, 0.5 * share)
    fresh = sum(clock.first(partial(learn, other)) for other in others) / max(1, len(others))
    started = clock()
    update()
    starting = clock() - started
    updating = clock.timed(update, 0.05 * share)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    reading = clock.timed(read, 0.15 * share)
    writing = _writing(planned, model, batch, clock, 0.3 * share)
    return _Times(learning, fresh, reading, updating, max(0.0, starting - updating), writing)


def _writing(planned: Planned, model: nn.Module, batch: Batch, clock: _Clock, most: float) -> float | None:
    """Seconds of one pass that adds a token to each answer of a batch."""
    recipe, plan = planned.recipe, planned.plan
    judged = None if planned.given is None else planned.given.judged
    if recipe.evaluate == "off" or judged is None or not judged.writes or planned.judges is not None:
        return None
    rows = min(recipe.evaluate.batch_size, judged.rows)
    length = max(1, plan.workload.tokens // max(1, plan.workload.rows))
    ids = batch.token_ids.repeat(-(-length * rows // max(1, batch.tokens)) + 1)
    prompts = [ids[at * length : (at + 1) * length].tolist() for at in range(rows)]

    def seconds(tokens: int) -> float:
        def write() -> None:
            sampling = Sampling(tokens, 1.0)  # drawn at random: no guess of the next tokens comes true
            generate(model, prompts, sampling, stop_ids={-1}, batch_size=rows, progress=silent)

        return clock.timed(write, most / 2)

    use_default_attention(model)
    return max(0.0, seconds(1 + WRITTEN) - seconds(1)) / WRITTEN if rows else None


def _usual_batches(planned: Planned, plan: Plan) -> list[Batch]:
    """A micro-batch of the job with about as many tokens as most, and another of another size if there is one."""
    prepared = planned.prepared
    assert prepared is not None
    batches = StepBatches.of_job(planned.recipe, plan, prepared.train, prepared.order)
    groups = [group for step in range(1, min(plan.steps, LOOKED_AT) + 1) for group in batches.groups(step)]
    groups.sort(key=lambda group: int(prepared.train.lengths[group].sum()))
    layout = "packed" if plan.packing else "padded"
    chosen = [groups[int(place * len(groups))] for place in (1 / 2, 1 / 4)]
    found = [pack([prepared.train[at].example for at in group], layout) for group in chosen]
    return found[: len({rounded_up(batch.tokens) for batch in found})]


def copy_of(planned: Planned, blocks: int | None) -> nn.Module:
    """The model with so many blocks and made-up weights; None is the whole of it, without any."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(planned.config)
    head = None if planned.judges is None else planned.judges.task_head()
    if head is not None:
        config.update(head.settings())
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    text = config.get_text_config()
    if blocks is not None:
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:blocks]
    device = torch.device("meta") if blocks is None else planned.hardware.device
    with torch.device(device), no_init_weights():
        model = model_class(head).from_config(config, dtype=DTYPES[planned.plan.frozen_dtype])
    cast(Any, model).tie_weights()  # which transformers leaves out together with the first values
    if blocks is None:
        return model
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        for weight in model.parameters():
            _fill(weight, generator)
    return model.eval()


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Small numbers, the same again and again in a large table: neither their value nor their kind costs time."""
    if weight.dim() < 2:
        weight.fill_(1.0)
        return
    flat = weight.view(-1)
    first = flat[:LARGE]
    first.uniform_(-0.03, 0.03, generator=generator)
    for at in range(LARGE, len(flat), LARGE):
        piece = flat[at : at + LARGE]
        piece.copy_(first[: len(piece)])


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


def _saving(output: Path, size: int, clock: _Clock) -> float:
    """Seconds in which a byte of a checkpoint is copied, written, synced and hashed where the run will be."""
    beside = next(path for path in output.absolute().parents if path.is_dir())
    tensor = torch.zeros(size // 4)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".timed-") as directory:
        path, started = Path(directory) / "tensors", clock()
        save_file({"zeros": tensor.clone()}, path)  # once: blocks of the disk that were written before are quicker
        sync_file(path)
        file_sha256(path)
        return (clock() - started) / size


def _unpacking(planned: Planned, shape: Shape, clock: _Clock) -> float:
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
    return passes * shape.linear_weights / weight.numel() * clock.timed(lambda: packed.to(dtype), 0.1)


@dataclass(frozen=True)
class _Stored:
    """As bitsandbytes' parameters have it."""

    data: Tensor
    quant_state: Any
