"""From a recipe to a plan: every `auto` becomes a value with its reason, nothing depends on a timing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import nn

from tunesmith.base import InputError
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.methods.token_rows import trained_token_ids
from tunesmith.models.embeddings import added_tokens
from tunesmith.models.measure import shape_of
from tunesmith.models.parts import parameters_by_part
from tunesmith.models.quantized import settled_quantization
from tunesmith.objectives import Pretrain
from tunesmith.plan.decisions import Decisions
from tunesmith.plan.duration import Timed, predict_duration
from tunesmith.plan.fit import DTYPE, GENERAL_TOKENS, Fit, fit_or_stream
from tunesmith.plan.given import Given, Judged
from tunesmith.plan.hardware import Hardware, native_dtypes
from tunesmith.recipe import Recipe
from tunesmith.resolved import Parameters, Plan, Resolved, Workload

DEFAULT_EPOCHS = 3.0
PAGING = ("cuda", "xpu")
"""Kinds of devices for which bitsandbytes keeps optimizer states in memory that the host shares."""


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
    micro_batch, checkpointing, memory, streamed_tokens = fit_or_stream(recipe, adapted, shape, fit, decided)
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
        judged.row or workload.tokens / max(1, workload.rows),
        writes=judged.generates,
        answer=_usual_answer(judged, plan.max_new_tokens),
        general_tokens=GENERAL_TOKENS * 4 if general else 0,
        micro_batches=-(-recipe.train.batch_size // plan.micro_batch),
    )


def _usual_answer(judged: Judged, limit: int) -> float:
    """Tokens of a reference answer on average, as far as the limit; the limit where there are no references."""
    return sum(min(length, limit) for length in judged.answers or (limit,)) / max(1, len(judged.answers))


def steps_of(recipe: Recipe, workload: Workload) -> int:
    """Optimizer steps of a job."""
    return _length(recipe, workload, Decisions())[0]
