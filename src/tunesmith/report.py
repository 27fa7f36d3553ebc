"""What `report.json` holds: the types behind its published schema, docs/report.schema.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from tunesmith.base import Spec
from tunesmith.resolved import Parameters, Resolved

Better = Literal["higher", "lower"]


class MetricEntry(Spec):
    """One metric of base and tuned model on the same rows."""

    name: str
    base: float
    tuned: float
    difference: float
    """Tuned minus base."""
    low: float | None
    """Lower end of the difference's interval; null where none can be stated."""
    high: float | None
    better: Better
    n: int
    """Rows, or texts."""
    primary: bool
    """Whether this metric decides the verdict."""
    p: float | None = None
    """Two-sided p-value of the difference."""
    test: str | None = None
    p_corrected: float | None = None
    """Corrected for several metrics (Holm 1979); the deciding one stands by itself."""
    shown: Literal["better", "worse", "no_difference", "no_interval"] | None = None


class Value(Spec):
    """One metric of one model."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int


class Check(Spec):
    """One requirement of the recipe's gate."""

    name: str
    required: float
    measured: float | None
    passed: bool | None
    """Null where it could not be checked, which is no pass."""
    reason: str


class TaskEntry(Spec):
    """One of several tasks."""

    name: str
    rows: int
    metrics: list[MetricEntry]


class PreferenceEntry(Spec):
    """What became of better and worse answers, in nats."""

    pairs: int
    reward_accuracy: float
    reward_margin: float
    chosen_logps: list[float]
    """Before and after."""
    rejected_logps: list[float]
    chosen_tokens: float
    rejected_tokens: float
    sentence: str


class BenchmarkEntry(Spec):
    """One of lm-eval's benchmarks before and after, on the same items."""

    name: str
    skill: str
    """What it asks for, in plain words."""
    metric: str
    shots: int
    """Worked examples before each item."""
    n: int
    better: Better
    base: float
    tuned: float
    difference: float
    low: float | None
    """Lower end of the difference's interval; null where the score is no mean over items."""
    high: float | None


class Divergence(Spec):
    """KL(base || tuned) over the base's own answers to general prompts, in nats a token."""

    status: Literal["measured", "off", "could_not_run"]
    reason: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Prompts."""


class SeenItem(Spec):
    """A test item that stands in the training data."""

    item: int
    """Its number, from 1."""
    text: str
    source: str
    """File and line of the training row."""


class SeenEntry(Spec):
    """How many of some test items stand in the training data."""

    name: str
    found: int
    of: int
    too_short: int
    """Items that have too few words to be looked for."""
    examples: list[SeenItem]


class Forgetting(Spec):
    """Perplexity on general text before and after."""

    status: Literal["measured", "off", "could_not_run"]
    reason: str | None = None
    source: str | None = None
    base: float | None = None
    tuned: float | None = None
    change: float | None = None
    """Relative to the base: 0.05 is a rise of 5 %."""
    low: float | None = None
    high: float | None = None
    n: int | None = None


class Bounded(Spec):
    """A difference of shares and its interval."""

    value: float
    low: float
    high: float


class Memorisation(Spec):
    """How many training answers come back from their prompts, against held-out ones."""

    status: Literal["measured", "off", "could_not_run"]
    reason: str | None = None
    window: int | None = None
    """Tokens of an answer that could be compared."""
    trained: dict[str, Any] | None = None
    """Counts over training rows."""
    held_out: dict[str, Any] | None = None
    difference: Bounded | None = None
    details: list[dict[str, Any]] = Field(default_factory=list)
    """Names, numbers, addresses and keys, each kind counted apart."""
    examples: list[str] = Field(default_factory=list)
    """Files and lines."""
    sentence: str | None = None
    left_out: dict[str, int] | None = None
    warnings: list[str]
    remark: str | None
    """What the verdict says of it."""


class Sample(Spec):
    """One row with both answers."""

    prompt: str
    references: list[str]
    base: str | None
    tuned: str | None
    score_base: float
    score_tuned: float
    source: str
    """File and line."""


class Samples(Spec):
    """Where tuning helped most and hurt most, by the deciding metric."""

    best: list[Sample] = Field(default_factory=list)
    worst: list[Sample] = Field(default_factory=list)


class Confusion(Spec):
    """Which label was given for which, by both models: a row for each right label, a column for each given one."""

    labels: list[str]
    """The last column is for answers that are none of these."""
    base: list[list[int]]
    tuned: list[list[int]]


class Curves(Spec):
    """What was measured on the way, as pairs of step and value; null is a value that was not finite."""

    train: list[tuple[int, float | None]]
    validation: list[tuple[int, float | None]]
    best_step: int | None
    rollouts: dict[str, list[tuple[int, float | None]]] = Field(default_factory=dict)
    """Of policies by name: reward, kl, entropy, length and more."""


class Manifest(Spec):
    """What the model learned from. Further keys are as in `data.json`."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    rows_used: int
    rows_lost: int
    target_tokens_used: int
    target_tokens_lost: int
    tokens: int
    lost: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    validation: dict[str, Any] | None
    test: dict[str, Any] | None


class SeedResult(Spec):
    """One of several runs that differ in their seed alone."""

    seed: int
    run: str
    """Directory, relative to the report's own."""
    verdict: Literal["ship", "dont_ship", "no_difference"]
    values: dict[str, float]
    """Of the tuned model, by metric."""


class Report(Spec):
    """The verdict on a run and the evidence for it: `report.json`."""

    verdict: Literal["ship", "dont_ship", "no_difference"]
    sentence: str
    name: str
    created: str
    """ISO 8601, UTC."""
    warnings: list[str]
    gate: list[Check]
    metrics: list[MetricEntry]
    tasks: list[TaskEntry]
    prompted: list[Value] = Field(default_factory=list)
    """Of the base with the teacher's prompt."""
    preference: PreferenceEntry | None
    confusion: Confusion | None = None
    forgetting: Forgetting
    memorisation: Memorisation | None = None
    benchmarks: list[BenchmarkEntry] = Field(default_factory=list)
    benchmark_notes: list[str] = Field(default_factory=list)
    """Where benchmarks differ from lm-eval's own."""
    divergence: Divergence | None = None
    contamination: list[SeenEntry] = Field(default_factory=list)
    samples: Samples
    curves: Curves
    seeds: list[SeedResult] = Field(default_factory=list)
    """Of a verdict over several seeds; empty for one run."""
    data: Manifest
    predicted: dict[str, float | str | None]
    """What the plan foresaw: peak_bytes, seconds and their parts; peak_phase and time_from are texts."""
    measured: dict[str, float | None]
    """The same as measured, and tokens_per_second."""
    parameters: Parameters
    model: str
    method: str
    objective: str
    recipe: str
    """YAML, with every setting."""
    resolved: list[Resolved]
    environment: dict[str, Any]
    command: str


def report_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `report.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema(mode="validation")}
