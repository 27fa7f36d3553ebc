"""Bytes by component and by phase, computed from the shapes of the model and the method.

A job does one thing after another, and the most memory that it ever has is that of the phase with the largest sum: for
a small adapter the forward pass of the longest rows, for full fine-tuning often the moment in which a checkpoint is
written, for a large vocabulary or long answers the evaluation. Every phase is added up from the same components.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import cast

from torch import Tensor, nn

from tunesmith.methods import trainable_parameters
from tunesmith.methods.targets import linear_modules, output_head_name
from tunesmith.models.measure import Shape
from tunesmith.models.projection import rounded_up
from tunesmith.models.quantized import FOUR_BIT, Quantization, settled_quantization
from tunesmith.objectives import Policy
from tunesmith.plan.activations import BYTES, Kept, attention_workspace, kept_by_token, logit_bytes
from tunesmith.recipe import Recipe
from tunesmith.resolved import Memory, Phase

CONVENTION = (
    "frozen weights in the dtype named or quantized; trained weights in fp32 (4 bytes, the master copy of mixed "
    "precision), their gradients in fp32 (4), Adam's two states in fp32 (8): 16 bytes a trained weight"
)
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256), "paged-adamw-8bit": 2 * (1 + 4 / 256)}
MIB = 2**20
AT_ONCE = 4096
"""Tokens that are scored, or read of prompts, at a time."""
RUNTIME_BYTES = 510 * MIB
"""Resident memory of the interpreter with torch, transformers and datasets imported (330 MiB of it code and data of
their libraries) and the rows read. The same jobs took 50 MiB more on one machine than on another."""
KERNEL_BYTES = 40 * MIB
SIZE_BYTES = 20 * MIB
GENERAL_PATH = 1 / 3
"""Share of these kernels where low-rank updates are no products of their own: BERT-like models."""
MOST_SIZES, MOST_ANSWERS = 24, 64
SCORING_KERNELS, ANSWERING_KERNELS, ANSWER_KERNELS = 30 * MIB, 60 * MIB, 3.5 * MIB
"""Kernels that the CPU's library of products (oneDNN) writes for narrow dtypes and keeps: some thirty for every number
of tokens that is new to it, whatever the model's width, until a thousand of them are there. Measured for training one
size, every further size, and for reading and answering held-out rows once; each answer at a
time adds more."""
QUANTIZING_BYTES = 20 * MIB
"""Resident memory of bitsandbytes when it is imported."""
SLACK_KEPT = {"cpu": 0.25, "mps": 0.1}
SLACK_PASSED = {"cpu": 0.2}
"""Shares of the activations that the allocator holds besides: of those that are kept, and of all that come to be in a
pass, kept or computed again. On a CPU glibc keeps freed pieces below 32 MB, and rows of other lengths do not fit into
the holes of those before: measured were 20 to 50 % without checkpointing. On CUDA what is counted is what tensors hold,
and `USABLE_MEMORY` leaves room for the rest."""

HOLES, FEW_PASSES, MOST_HOLES = 0.15, 8, 0.8
"""What more is held with each doubling of the micro-batches, where these differ: pieces of another size lie between
those that are kept, and glibc comes to hold far more than was ever in use at a time."""


def quantized_bytes(held: Quantization) -> float:
    """Bytes a weight of a linear layer, its constants included."""
    return payload_bytes(held) + constant_bytes(held)


def payload_bytes(held: Quantization) -> float:
    return 0.5 if held.kind in FOUR_BIT else 1.0


def constant_bytes(held: Quantization) -> float:
    """4 bits with one fp32 scale for 64 weights (0.5 bits), or 0.127 bits when scales are quantized too (Dettmers et
    al. 2023, section 3); 8 bits with one scale a row."""
    if held.kind == "int8":
        return 4 / 512
    return (0.127 if held.double else 0.5) / 8


@dataclass(frozen=True)
class Load:
    """The largest piece of work of each phase.

    Attributes:
        tokens: of the largest micro-batch.
        targets: of those, how many have logits.
        sizes: how many numbers of tokens micro-batches have; ``passes``: how many micro-batches there are.
        longest: tokens of the longest row.
        checkpointing: whether activations are recomputed.
        device: its type, such as `cpu`.
        accumulates: whether a step has several micro-batches.
        judged: tokens that are scored at a time; 0 when nothing is judged.
        answers: answers written at a time, and ``answer_tokens`` of the longest, its prompt included; 0 for none.
        drawn: the same while training, where the model trains on its own answers.
        beside: bytes of other models that stay in memory; ``before``: of one that is gone before the model is loaded.
        validates: whether a validation loss is measured while training.
    """

    tokens: int
    targets: int
    longest: int
    checkpointing: bool
    device: str
    accumulates: bool = True
    judged: int = 0
    answers: int = 0
    answer_tokens: int = 0
    drawn: int = 0
    beside: float = 0.0
    before: float = 0.0
    validates: bool = False
    sizes: int = 1
    passes: int = 1

    @property
    def shares_host_memory(self) -> bool:
        return self.device in ("cpu", "mps")


@dataclass(frozen=True)
class _Held:
    """Bytes that are there throughout; ``mapped`` is the weights' file while it is read, ``stays`` what of it stays."""

    frozen: float
    constants: float
    trained: float
    mapped: float
    stays: float
    runtime: float


@dataclass(frozen=True)
class Counted:
    """An adapted model, counted once for any load.

    Attributes:
        trained, frozen: weights; ``quantized`` are those of the frozen ones that are held so, and ``held`` is how.
        head_trained: whether the output head is trained.
        kept: bytes of a token.
        dtype, frozen_dtype: of the arithmetic and of frozen weights.
    """

    shape: Shape
    trained: int
    frozen: int
    quantized: int
    held: Quantization | None
    head_trained: bool
    kept: Kept
    dtype: str
    frozen_dtype: str


def counted(model: nn.Module, shape: Shape, recipe: Recipe, dtype: str, frozen_dtype: str) -> Counted:
    """Counts a model that is adapted by the recipe's method, on the meta device or any other."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    quantized, held = 0, settled_quantization(recipe.model.quantization, model.config, recipe.model.path)
    if held is not None:
        head = output_head_name(model)
        linears = linear_modules(model)
        quantized = sum(cast(Tensor, linears[name].weight).numel() for name in linears if name != head)
    head_trained = any(weight.requires_grad for weight in _head_weights(model))
    kept = kept_by_token(model, shape, dtype, frozen_dtype)
    return Counted(shape, trained, frozen, quantized, held, head_trained, kept, dtype, frozen_dtype)


def predict_memory(model: Counted, recipe: Recipe, load: Load) -> Memory:
    """Bytes of every phase of a job, and of the largest."""
    shape, kept, width = model.shape, model.kept, BYTES[model.dtype]
    held = _held(model, load)
    loaded = held.frozen + (held.trained if recipe.method.trains_all else 0.0)
    always = {"weights": loaded, "constants": held.constants, "runtime": held.runtime, "mapped": held.stays}
    phases = [Phase(name="loading", parts=_whole(always | {"workspace": held.mapped}))]
    if load.before:
        phases.append(Phase(name="asking the teacher", parts=_whole({"weights": load.before, "runtime": held.runtime})))
    narrow = load.device == "cpu" and model.dtype != "fp32"
    judging = narrow * (SCORING_KERNELS * bool(load.judged) + _answering_kernels(load.answers))
    phases += _judging(model, always | {"runtime": held.runtime + judging}, load)

    training = _training(model, recipe, load)
    weights, copies = held.frozen + held.trained, _copies(held, recipe, load)
    further = 0 if recipe.method.trunk_is_frozen else min(load.sizes, MOST_SIZES) - 1
    kernels = narrow * (KERNEL_BYTES + further * SIZE_BYTES * (1 if shape.fused else GENERAL_PATH))
    runtime = held.runtime + judging + kernels
    steady = always | {"weights": weights, "copies": copies, "runtime": runtime}
    cache = _cache(shape, load.drawn, load.answer_tokens, width)
    phases.append(Phase(name="training", parts=_whole(steady | training)))
    saving = {name: training[name] for name in ("gradients", "optimizer")}
    if recipe.data.validation is not None and load.validates:
        reading = {"workspace": kept.passing * AT_ONCE, "logits": logit_bytes(shape, AT_ONCE, width)}
        phases.append(Phase(name="validating", parts=_whole(steady | saving | reading)))
    if cache:
        workspace = kept.passing * min(AT_ONCE, load.drawn * load.longest)
        drawing = {"optimizer": training["optimizer"], "cache": cache, "workspace": workspace}
        phases.append(Phase(name="drawing answers", parts=_whole(steady | drawing)))
    if load.shares_host_memory:  # else the copies that a checkpoint is written from lie in the host's memory
        written = {"copies": copies + training["optimizer"] + (held.trained if recipe.train.ema != "off" else 0)}
        slack = {"workspace": _slack(kept, load) / 2}  # the copies fill the other half of it
        phases.append(Phase(name="writing a checkpoint", parts=_whole(steady | saving | written | slack)))
        again = narrow * _answering_kernels(load.answers)  # rows are read with the kernels of the first time
        after = steady | {"runtime": runtime + again, "optimizer": training["optimizer"]}
        phases += _judging(model, after, load, again=_slack(kept, load))
    most = max(phases, key=lambda phase: phase.total)
    shown = next(phase for phase in phases if phase.name == "training").parts
    return Memory(
        weights=int(weights),
        gradients=int(training["gradients"]),
        optimizer=int(training["optimizer"]),
        activations=int(training["activations"]),
        runtime=int(runtime),
        peak_bytes=most.total,
        constants=int(held.constants),
        copies=int(copies),
        logits=int(training["logits"]),
        cache=max(phase.parts.get("cache", 0) for phase in phases),
        workspace=shown.get("workspace", 0),
        phases=phases,
        peak_phase=most.name,
        convention=CONVENTION,
    )


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {name: int(size) for name, size in parts.items() if size}


def _held(model: Counted, load: Load) -> _Held:
    shape, held = model.shape, model.held
    size = BYTES[model.frozen_dtype] * (model.frozen - model.quantized)
    file = BYTES[shape.stored] * (model.frozen or model.trained)
    runtime, mapped, stays = 0.0, 0.0, 0.0
    if load.shares_host_memory:
        runtime = RUNTIME_BYTES + (QUANTIZING_BYTES if held is not None else 0)
        mapped = file if shape.stored != model.frozen_dtype else 0.0
        if held is not None and shape.stored == model.frozen_dtype:
            stays = max(0.0, file - size)  # embeddings are a view of the mapped file, which is in memory as a whole
    payload = 0.0 if held is None else model.quantized * payload_bytes(held)
    constants = 0.0 if held is None else model.quantized * constant_bytes(held)
    return _Held(size + payload, constants, 4.0 * model.trained, mapped, stays, runtime)


def _copies(held: _Held, recipe: Recipe, load: Load) -> float:
    """Further copies of the model or of what is trained."""
    size = load.beside
    size += held.trained * (recipe.train.ema != "off")
    size += held.trained * (recipe.train.l2_to_base > 0 and recipe.method.trains_all)
    apart = recipe.method.saved_as != "adapter" or bool(getattr(recipe.method, "modules_to_save", []))
    if isinstance(recipe.objective, Policy) and recipe.objective.kl_weight and apart:
        size += held.frozen + held.trained  # the model as it was, to compare with
    return size


def _training(model: Counted, recipe: Recipe, load: Load) -> dict[str, float]:
    """Gradients, states, activations, logits and workspace at the worst moment of a step."""
    shape, kept, width = model.shape, model.kept, BYTES[model.dtype]
    tokens = rounded_up(load.tokens) if load.device == "cpu" and model.dtype != "fp32" else load.tokens
    activations = tokens * kept.of_token(load.checkpointing) if not recipe.method.trunk_is_frozen else 0.0
    activations += load.targets * shape.hidden * (4 + width)  # what the head reads, and its gradient
    casts = 0.0
    if recipe.method.trains_all and model.dtype != "fp32":
        casts = width * (shape.head_weights if shape.fused else shape.linear_weights + shape.head_weights)
    logits = logit_bytes(shape, load.targets, width)
    of_head = (4.0 + width) * shape.head_weights if model.head_trained else 0.0
    workspace = tokens * kept.backward + casts
    workspace += attention_workspace(shape, tokens, load.longest, width) if load.device == "cpu" else 0.0
    gradients, states = 4.0 * model.trained, OPTIMIZER_BYTES[recipe.train.optimizer] * model.trained
    if not load.accumulates:  # activations go as gradients come
        rest = max(activations + logits + workspace + of_head - gradients, of_head)
        activations = min(activations, rest)
        logits, workspace = min(logits, rest - activations), max(0.0, rest - activations - logits)
    else:
        workspace += of_head
    workspace += _slack(kept, load)
    return {
        "gradients": gradients,
        "optimizer": states,
        "activations": activations,
        "logits": logits,
        "workspace": workspace,
    }


def _answering_kernels(answers: int) -> float:
    return ANSWERING_KERNELS + ANSWER_KERNELS * min(answers, MOST_ANSWERS) if answers else 0.0


def _slack(kept: Kept, load: Load) -> float:
    passed = SLACK_PASSED.get(load.device, 0.0) * kept.blocks
    holes = SLACK_KEPT.get(load.device, 0.0)
    if load.device == "cpu" and load.sizes > 1:
        holes += min(MOST_HOLES, HOLES * max(0.0, log2(load.passes / FEW_PASSES)))
    return load.tokens * (holes * kept.of_token(load.checkpointing) + passed)


def _head_weights(model: nn.Module) -> list[nn.Parameter]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [] if head is None else list(head.parameters())


def _cache(shape: Shape, answers: int, tokens: int, width: int) -> float:
    """Keys and values of answers that are written at a time, of all layers."""
    return float(width) * shape.layers * shape.key_value * answers * tokens


def _judging(model: Counted, always: dict[str, float], load: Load, again: float | None = None) -> list[Phase]:
    """Reading held-out rows, and answering them: nothing is kept for a gradient.

    Args:
        again: what the allocator holds since training, when it is the tuned model that is judged.
    """
    shape, passing = model.shape, model.kept.passing
    width, phases = BYTES[model.dtype], list[Phase]()
    who, held = ("the base", 0.0) if again is None else ("the result", again)
    if load.judged:
        tokens = min(load.judged, AT_ONCE)
        parts = {"logits": logit_bytes(shape, tokens, width), "workspace": passing * tokens + held}
        phases.append(Phase(name=f"scoring {who}", parts=_whole(always | parts)))
    if load.answers:
        at_once = min(AT_ONCE, load.answers * load.answer_tokens)
        parts = {
            "logits": float(load.answers * shape.vocabulary * (width + 4)),
            "cache": _cache(shape, load.answers, load.answer_tokens, width),
            "workspace": passing * at_once + held,
        }
        phases.append(Phase(name=f"answering with {who}", parts=_whole(always | parts)))
    return phases
