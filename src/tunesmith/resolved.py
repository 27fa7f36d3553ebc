"""`Plan` is a recipe with every `auto` turned into a value with its reason, and what the job will need."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tunesmith.base import Spec


class Resolved(Spec):
    """One `auto` and what it became."""

    name: str
    value: Any
    reason: str


class Parameters(Spec):
    """Numbers of weights; shared ones are counted once."""

    total: int
    """Base and what the method adds."""
    trainable: int
    parts: dict[str, int] = Field(default_factory=dict)
    """Of the base, by component: `embeddings` (a tied head's weights are theirs), `attention`, `mlp`, `norms`, `head`
    and `other`."""
    added: int = 0
    """Of those, what the method adds to the base."""


class Phase(Spec):
    """Bytes in use while a job does one thing, by component."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Memory(Spec):
    """Bytes by component, in each phase and at the moment of the largest use."""

    weights: int
    """Frozen weights as they are stored, and trained ones in fp32: the master copy that mixed precision needs."""
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    """The interpreter and its libraries, where the device shares the host's memory."""
    peak_bytes: int
    constants: int = 0
    """Scales of quantized blocks; not part of `weights`."""
    copies: int = 0
    """Further copies of weights: a running average, a reference, a teacher, a reward model."""
    logits: int = 0
    cache: int = 0
    """Keys and values of the answers that are written at a time."""
    workspace: int = 0
    """What one operation needs for itself: gradients on their way, casts of weights, and what the allocator cannot
    give back."""
    phases: list[Phase] = Field(default_factory=list)
    peak_phase: str = ""
    convention: str = ""


class Duration(Spec):
    """Seconds that the job is expected to take, and from what they were computed."""

    train_seconds: float
    evaluate_seconds: float
    seconds: float
    flops: float
    """Useful floating-point operations of training."""
    flops_per_second: float
    """Rate that this machine reaches on such work."""
    source: str = "a large matrix product, timed for a moment"
    """What the rate was taken from."""
    measured_in_seconds: float = 0.0
    """How long the blocks were timed for; nothing where they were not."""


class Workload(Spec):
    """How many tokens are trained on; estimated when there is no data or tokenizer to count with."""

    rows: int
    epoch_rows: int
    """Rows that an epoch visits: more or fewer than there are when sources are mixed."""
    tokens: int
    targets: int
    longest: int
    estimated: bool


class Plan(Spec):
    """Every `auto` turned into a value, and what the job will need. `--resume` uses the stored plan."""

    device: str
    dtype: Literal["fp32", "bf16", "fp16"]
    frozen_dtype: Literal["fp32", "bf16", "fp16"]
    packing: bool
    gradient_checkpointing: bool
    streamed_tokens: int | None = None
    """Tokens that run through a block at a time when the frozen model is read from its files block by block."""
    steps: int
    epochs: float
    micro_batch: int
    warmup_steps: int
    learning_rate: float
    evaluate_every: int | None
    checkpoint_every: int | None
    max_length: int
    max_new_tokens: int
    metrics: list[str]
    parameters: Parameters
    memory: Memory
    time: Duration
    workload: Workload
    resolved: list[Resolved]
    notes: list[str]
