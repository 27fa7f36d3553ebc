"""From a recipe to a plan: every `auto` becomes a value with its reason, nothing depends on a timing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from tunesmith.base import InputError
from tunesmith.evaluation.compare import LIKELIHOODS
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.methods.token_rows import trained_token_ids
from tunesmith.models.embeddings import added_tokens
from tunesmith.models.measure import Shape, shape_of
from tunesmith.models.parts import parameters_by_part
from tunesmith.models.quantized import settled_quantization
from tunesmith.models.streamed import StreamedModel, streaming_obstacle
from tunesmith.objectives import Policy, Pretrain
from tunesmith.plan.duration import Timed, predict_duration
from tunesmith.plan.hardware import Hardware, native_dtypes
from tunesmith.plan.memory import Load, counted, predict_memory
from tunesmith.plan.streaming import (
    StreamedLoad,
    refuse_targets_outside_blocks,
    refuse_what_cannot_stream,
    streamed_memory,
    tokens_at_once,
)
from tunesmith.recipe import Recipe
from tunesmith.resolved import Memory, Parameters, Plan, Resolved, Workload

DEFAULT_EPOCHS = 3.0
TOKENS_AT_ONCE = {"cpu": 2048, "mps": 4096, "cuda": 16384}
"""Tokens in a micro-batch beyond which a device of this kind is no faster, only fuller."""
GENERAL_TOKENS = 4096
"""Tokens of general text that are read at a time; there are some four times as many."""
USABLE_MEMORY = 0.85
PAGING = ("cuda", "xpu")
"""Kinds of devices for which bitsandbytes keeps optimizer states in memory that the host shares."""
DTYPE = Literal["fp32", "bf16", "fp16"]


@dataclass
class Decisions:
    """Collects what every `auto` became."""

    made: list[Resolved] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settle(self, name: str, asked: Any, value: Any, reason: str) -> Any:
        """Returns what was asked, or records and returns ``value`` when `auto` was asked."""
        if asked != "auto":
            return asked
        self.made.append(Resolved(name=name, value=value, reason=reason))
        return value


@dataclass(frozen=True)
class Judged:
    """What the evaluation will be, as far as the data decides it.

    Attributes:
        limit: new tokens of an answer that the objective itself allows; None where references say it.
        answer: tokens of a reference answer on average.
    """

    metrics: list[str]
    why: str
    rows: int
    longest_answer: int
    writes: bool = True
    limit: int | None = None
    answer: float = 0.0


class Largest(NamedTuple):
    """Of a job's micro-batches: tokens of the largest and the targets among them, and how many sizes there are.

    Sizes are counted as `models.projection.rounded_up` makes them.
    """

    tokens: int
    targets: int
    sizes: int


Heaviest = Callable[[int], Largest]
"""From rows of a micro-batch to the largest one that the job will have."""
USUAL_SIZES = 16
"""Sizes of micro-batches where nobody has counted them."""


@dataclass(frozen=True)
class Given:
    """What is known of a job besides its recipe.

    Attributes:
        max_length: longest row that is trained on, in tokens.
        heaviest: read off the rows in their order; None where it must be estimated from the averages.
        beside: bytes of other models that stay in memory while this one is trained.
        before: bytes of a model that is gone before this one is loaded.
    """

    workload: Workload
    judged: Judged
    max_length: int
    heaviest: Heaviest | None = None
    beside: float = 0.0
    before: float = 0.0


def resolve(recipe: Recipe, model: nn.Module, hardware: Hardware, given: Given) -> Plan:
    """Makes the plan.

    Args:
        model: the architecture on the meta device, not adapted yet.

    Raises:
        InputError: when settings do not fit the model or the machine.
    """
    decided, workload, judged = Decisions(), given.workload, given.judged
    shape = shape_of(model)
    adapted = copy.deepcopy(model)
    cast(Any, adapted).is_quantized = _quantized(recipe, model, hardware, decided)
    decided.notes += recipe.method.adapt(adapted)
    _refuse_untrained_additions(added_tokens(model), adapted)
    dtype, frozen_dtype = _dtypes(recipe, hardware, decided)
    steps, epochs = _length(recipe, workload, decided)
    fit = Fit(workload, hardware, dtype, frozen_dtype, given, _longest_answer(recipe, judged, Decisions()))
    micro_batch, checkpointing, memory, streamed_tokens = _fit_or_stream(recipe, adapted, shape, fit, decided)
    if streamed_tokens is not None:
        judged = replace(judged, metrics=["perplexity"], why="each token of an answer would read the whole model")
    evaluate_every, checkpoint_every = _intervals(recipe, steps, decided)
    max_new = _longest_answer(recipe, judged, decided)
    why = "tokens of a block" if isinstance(recipe.objective, Pretrain) else "the longest row"
    decided.settle("data.max_length", recipe.data.max_length, given.max_length, why)
    parameters = _parameters(model, adapted)
    timed = timed_job(recipe, hardware, judged, workload, Settled(dtype, steps, max_new, micro_batch))
    return Plan(
        device=str(hardware.device),
        dtype=dtype,
        frozen_dtype=frozen_dtype,
        packing=_packing(recipe, decided),
        gradient_checkpointing=checkpointing,
        streamed_tokens=streamed_tokens,
        steps=steps,
        epochs=epochs,
        micro_batch=micro_batch,
        warmup_steps=_warmup_steps(recipe, steps),
        learning_rate=_learning_rate(recipe, decided),
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        max_length=given.max_length,
        max_new_tokens=max_new,
        metrics=judged.metrics,
        parameters=parameters,
        memory=memory,
        time=predict_duration(recipe, shape, parameters, timed),
        workload=workload,
        resolved=decided.made,
        notes=decided.notes,
    )


def _packing(recipe: Recipe, decided: Decisions) -> bool:
    why = "rows laid end to end need no padding; tested when the model is loaded"
    return decided.settle("train.packing", recipe.train.packing, True, why)


def _warmup_steps(recipe: Recipe, steps: int) -> int:
    warmup = recipe.train.warmup
    return round(warmup * steps) if warmup < 1 else int(warmup)


def _learning_rate(recipe: Recipe, decided: Decisions) -> float:
    factor = recipe.objective.default_rate
    less = "" if factor == 1 else f", times {factor:g} for objective {recipe.objective.kind}"
    why = f"the default for method {recipe.method.kind}{less}"
    return decided.settle(
        "train.learning_rate", recipe.train.learning_rate, recipe.method.default_learning_rate * factor, why
    )


def _refuse_untrained_additions(added: Mapping[str, int], adapted: nn.Module) -> None:
    """Raises InputError when the rows of added tokens would stay as they start, or be lost with the base."""
    table = cast(Any, adapted).get_input_embeddings()
    missing = set() if table.weight.requires_grad else set(added.values()) - set(trained_token_ids(adapted))
    if missing:
        raise InputError(
            f"the method does not train the embeddings of {len(missing)} added tokens",
            where="model.add_tokens",
            fix="use LoRA with method.trainable_tokens: added, or method.kind: full",
        )


def _quantized(recipe: Recipe, model: nn.Module, hardware: Hardware, decided: Decisions) -> bool:
    """Whether the base will be quantized, and what follows from it."""
    asked = recipe.model.quantization
    held = settled_quantization(asked, model.config, recipe.model.path)
    if recipe.train.optimizer.startswith("paged") and hardware.device.type not in PAGING:
        raise InputError(
            f"paged optimizer states need a GPU whose memory they can leave, and this device is {hardware.name}",
            where="train.optimizer",
            fix="use adamw-8bit",
        )
    if recipe.method.kind == "qlora" and held is not None:
        reason = "qlora is LoRA over a base in 4 bits" if held == asked else "the weights are stored so"
        decided.made.append(Resolved(name="model.quantize", value=held.name, reason=reason))
    elif held is not None and asked is None:
        decided.made.append(Resolved(name="model.quantize", value=held.name, reason="the weights are stored so"))
    if isinstance(recipe.method, Lora) and recipe.method.quantization_aware != "none":
        decided.notes.append(
            f"the tuned model is judged as it will be in 4 bits ({recipe.method.quantization_aware}), and the base as "
            "it is; the adapter's file is an ordinary LoRA, so merge and quantize it"
        )
    return held is not None


def _intervals(recipe: Recipe, steps: int, decided: Decisions) -> tuple[int | None, int | None]:
    """Steps between validations and between checkpoints; None is never."""
    every = max(1, math.ceil(steps / 10))
    validates = recipe.data.validation is not None
    evaluate_every = decided.settle(
        "train.evaluate_every",
        recipe.train.evaluate_every,
        every if validates else "off",
        "ten times a run" if validates else "there are no validation rows",
    )
    checkpoint_every = decided.settle(
        "train.checkpoint_every", recipe.train.checkpoint_every, min(every, 500), "ten times a run"
    )
    return None if evaluate_every == "off" else evaluate_every, None if checkpoint_every == "off" else checkpoint_every


def _longest_answer(recipe: Recipe, judged: Judged, decided: Decisions) -> int:
    """New tokens that an answer may have; the metrics are settled with it."""
    if recipe.evaluate == "off":
        return 16 if judged.limit is None else judged.limit
    if not judged.writes:
        decided.settle("evaluate.metrics", recipe.evaluate.metrics, judged.metrics, judged.why)
        return 0
    found = max(16, math.ceil(1.5 * judged.longest_answer))
    why = f"one and a half times the longest reference answer ({judged.longest_answer} tokens)"
    if judged.limit is not None:
        found, why = judged.limit, "objective.max_new_tokens"
    longest = decided.settle("evaluate.max_new_tokens", recipe.evaluate.max_new_tokens, found, why)
    decided.settle("evaluate.metrics", recipe.evaluate.metrics, judged.metrics, judged.why)
    return longest


def _parameters(model: nn.Module, adapted: nn.Module) -> Parameters:
    parts: dict[str, int] = {name: count for name, count in parameters_by_part(model).items() if count}
    total = sum(parameter.numel() for parameter in adapted.parameters())
    trainable = sum(parameter.numel() for parameter in trainable_parameters(adapted).values())
    return Parameters(total=total, trainable=trainable, parts=parts, added=total - sum(parts.values()))


def _dtypes(recipe: Recipe, hardware: Hardware, decided: Decisions) -> tuple[DTYPE, DTYPE]:
    native = native_dtypes(hardware.device)
    why = f"{hardware.name} computes bf16 natively" if "bf16" in native else f"{hardware.name} has no native bf16"
    dtype = cast(DTYPE, decided.settle("train.dtype", recipe.train.dtype, "bf16" if "bf16" in native else "fp32", why))
    if dtype == "fp16" and "fp16" not in native:
        raise InputError(f"{hardware.name} does not compute fp16", where="train.dtype", fix="use bf16 or fp32")
    if dtype == "bf16" and "bf16" not in native:
        decided.notes.append(f"{hardware.name} has no native bf16: it is emulated, and slower than fp32")
    if recipe.method.trains_all:
        if recipe.model.dtype not in ("auto", "fp32"):
            raise InputError(
                "weights that are trained are kept in fp32",
                where="model.dtype",
                fix="remove it; train.dtype chooses the arithmetic",
            )
        return dtype, "fp32"
    frozen_dtype = cast(DTYPE, decided.settle("model.dtype", recipe.model.dtype, dtype, "follows train.dtype"))
    if dtype == "fp32" and frozen_dtype != dtype:
        decided.notes.append(f"frozen weights are kept in {frozen_dtype}, and their products are computed in it too")
    return dtype, frozen_dtype


def _length(recipe: Recipe, workload: Workload, decided: Decisions) -> tuple[int, float]:
    """Optimizer steps, and the passes over the data that they make."""
    train = recipe.train
    epochs = train.epochs
    if epochs is None and train.steps is None:
        epochs = DEFAULT_EPOCHS
        decided.made.append(Resolved(name="train.epochs", value=epochs, reason="neither epochs nor steps was given"))
    limits = []
    if epochs is not None:
        limits.append(max(1, math.ceil(round(epochs * workload.epoch_rows) / train.batch_size)))
    if train.steps is not None:
        limits.append(train.steps)
    steps = min(limits)
    return steps, steps * train.batch_size / workload.epoch_rows if epochs is None or steps < limits[0] else epochs


class Settled(NamedTuple):
    """What of a plan its time depends on."""

    dtype: str
    steps: int
    max_new_tokens: int
    micro_batch: int


def timed_job(recipe: Recipe, hardware: Hardware, judged: Judged, workload: Workload, plan: Settled | Plan) -> Timed:
    """What a job does, as far as its time depends on it."""
    general = recipe.evaluate != "off" and recipe.evaluate.forgetting != "off"
    return Timed(
        workload,
        hardware,
        plan.dtype,
        plan.steps,
        plan.max_new_tokens,
        judged.rows,
        writes=judged.writes and any(name not in LIKELIHOODS for name in judged.metrics),
        answer=judged.answer,
        general_tokens=GENERAL_TOKENS * 4 if general else 0,
        micro_batches=-(-recipe.train.batch_size // plan.micro_batch),
    )


def steps_of(recipe: Recipe, workload: Workload) -> int:
    """Optimizer steps of a job."""
    return _length(recipe, workload, Decisions())[0]


@dataclass(frozen=True)
class Fit:
    """What decides how many rows fit.

    Attributes:
        max_new: tokens of the longest answer that is written while judging.
    """

    workload: Workload
    hardware: Hardware
    dtype: DTYPE
    frozen_dtype: DTYPE
    given: Given
    max_new: int = 0

    @property
    def average(self) -> int:
        """Tokens of a row."""
        return max(1, self.workload.tokens // max(1, self.workload.rows))

    def largest(self, rows: int) -> Largest:
        """The largest micro-batch of so many rows, as it is or as it is expected to be."""
        if self.given.heaviest is not None:
            return self.given.heaviest(rows)
        longest = self.workload.longest
        tokens = min(longest * rows, longest + self.average * (rows - 1) * 5 // 4)
        targets = math.ceil(tokens * self.workload.targets / max(1, self.workload.tokens))
        return Largest(tokens, targets, USUAL_SIZES)

    def load(self, recipe: Recipe, rows: int, checkpointing: bool) -> Load:
        largest = self.largest(rows)
        judged, most = self.given.judged, max(1, recipe.train.batch_size // self.hardware.processes)
        reads, writes, batch = 0, False, 0
        if recipe.evaluate != "off":
            reads = GENERAL_TOKENS if recipe.evaluate.forgetting != "off" else judged.rows * self.average
            writes = judged.writes and any(name not in LIKELIHOODS for name in judged.metrics)
            batch = min(recipe.evaluate.batch_size, judged.rows)
        drawing = recipe.objective if isinstance(recipe.objective, Policy) else None
        return Load(
            tokens=largest.tokens,
            targets=largest.targets,
            sizes=largest.sizes,
            longest=self.workload.longest,
            checkpointing=checkpointing,
            device=self.hardware.device.type,
            accumulates=rows < most,
            judged=reads if judged.rows else 0,
            answers=batch if writes else 0,
            answer_tokens=self.workload.longest + self.max_new,
            drawn=0 if drawing is None else min(drawing.sample_batch, most * drawing.group_size),
            beside=self.given.beside,
            before=self.given.before,
            validates=recipe.train.evaluate_every != "off",
        )


def _fit_or_stream(
    recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions
) -> tuple[int, bool, Memory, int | None]:
    """As `_fit`, and tokens at a time when the recipe's budget leaves room for one block of the model only."""
    budget = recipe.budget.memory_bytes
    if budget is None:
        return *_fit(recipe, adapted, shape, fit, decided), None
    if fit.hardware.device.type != "cpu" or fit.hardware.processes > 1:
        raise InputError(
            "a memory budget is kept by one process on a CPU; this job runs on "
            f"{fit.hardware.name} in {fit.hardware.processes} process{'es' * (fit.hardware.processes > 1)}",
            where="budget.memory",
            fix="leave it out; train.micro_batch and model.quantize lower a device's memory",
        )
    ordinary = Decisions()
    micro_batch, checkpointing, memory = _fit(recipe, adapted, shape, fit, ordinary)
    if memory.peak_bytes <= budget:
        decided.made += ordinary.made
        reason = f"the whole job is expected to need {memory.peak_bytes / 1e6:,.0f} MB"
        decided.made.append(Resolved(name="model in memory", value="whole", reason=reason))
        return micro_batch, checkpointing, memory, None
    return _streamed(recipe, adapted, shape, fit, decided)


def _streamed(
    recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions
) -> tuple[int, bool, Memory, int]:
    """As `_fit`, for a model of which one block is in memory, and the tokens that run through it at a time."""
    budget = cast(int, recipe.budget.memory_bytes)
    refuse_what_cannot_stream(recipe)
    if not isinstance(adapted, StreamedModel):
        obstacle = streaming_obstacle(cast(Any, adapted).config)
        raise InputError(
            f"{budget / 1e6:,.0f} MB is too little for the whole model, and {obstacle}",
            where="budget.memory",
            fix="raise it or leave it out",
        )
    refuse_targets_outside_blocks(adapted)

    share = fit.workload.targets / max(1, fit.workload.tokens)

    def memory(tokens: int) -> Memory:
        load = StreamedLoad(tokens, math.ceil(tokens * share), fit.dtype, fit.frozen_dtype)
        return streamed_memory(adapted, shape, load)

    batch, longest = recipe.train.batch_size, fit.workload.longest
    tokens = tokens_at_once(lambda tokens: memory(tokens).peak_bytes, budget, longest, batch * fit.average)
    why = f"as many rows as {tokens} tokens hold, within budget.memory"
    micro_batch = decided.settle("train.micro_batch", recipe.train.micro_batch, batch, why)
    reason = f"block by block: the whole job does not fit into {budget / 1e6:,.0f} MB"
    decided.made.append(Resolved(name="model in memory", value="one block", reason=reason))
    decided.settle(
        "train.gradient_checkpointing", recipe.train.gradient_checkpointing, True, "each block is read and run again"
    )
    decided.notes.append(
        "the model is read from its files twice for every micro-batch, and the backward pass computes every block "
        "again: training takes several times as long (docs/results/small-memory.md)"
    )
    return micro_batch, True, memory(tokens), tokens


def _fit(recipe: Recipe, adapted: nn.Module, shape: Shape, fit: Fit, decided: Decisions) -> tuple[int, bool, Any]:
    """Micro-batch and checkpointing: the fullest micro-batch that fits, recomputing only when it must."""
    budget = min(USABLE_MEMORY * fit.hardware.memory_bytes, recipe.budget.memory_bytes or math.inf)
    average = fit.average
    most = max(1, recipe.train.batch_size // fit.hardware.processes)

    model = counted(adapted, shape, recipe, fit.dtype, fit.frozen_dtype)

    def memory(rows: int, checkpointing: bool) -> Any:
        return predict_memory(model, recipe, fit.load(recipe, rows, checkpointing))

    asked_checkpointing = recipe.train.gradient_checkpointing
    checkpointing = (
        memory(1 if recipe.train.micro_batch == "auto" else recipe.train.micro_batch, False).peak_bytes > budget
        if asked_checkpointing == "auto"
        else bool(asked_checkpointing)
    )
    decided.settle(
        "train.gradient_checkpointing",
        asked_checkpointing,
        checkpointing,
        "it does not fit without" if checkpointing else "it fits without",
    )
    rows = 1
    if recipe.train.micro_batch == "auto":
        cap = TOKENS_AT_ONCE.get(fit.hardware.device.type, 2048)
        while rows * 2 <= most and rows * 2 * average <= cap and memory(rows * 2, checkpointing).peak_bytes <= budget:
            rows *= 2
        if rows * 2 > most >= rows and most * average <= cap and memory(most, checkpointing).peak_bytes <= budget:
            rows = most
    micro_batch = decided.settle(
        "train.micro_batch", recipe.train.micro_batch, rows, f"about {rows * average} tokens at a time, within memory"
    )
    predicted = memory(micro_batch, checkpointing)
    if predicted.peak_bytes > budget:
        decided.notes.append(
            f"the job is expected to need {predicted.peak_bytes / 2**30:.1f} GiB; {fit.hardware.name} has "
            f"{fit.hardware.memory_bytes / 2**30:.1f} GiB"
        )
    return micro_batch, checkpointing, predicted
