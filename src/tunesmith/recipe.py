"""`Recipe` is what was asked; `Plan` is every `auto` turned into a value with its reason."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from tunesmith.base import Spec
from tunesmith.data.spec import DataSpec
from tunesmith.methods import Lora, Method, QLora
from tunesmith.metrics import COMPARED, METRICS, OF_DOCUMENTS, REWARD
from tunesmith.metrics.spec import AskedMetric, OwnMetric, name_of
from tunesmith.models.quantized import Quantization, quantization
from tunesmith.objectives import Objective, Supervised

Auto = Literal["auto"]


def _off(value: Any) -> Any:
    """YAML 1.1 reads `off` as false; both mean that a feature is off."""
    return "off" if value is False else value


Off = Annotated[Literal["off"], BeforeValidator(_off)]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


class ModelSpec(Spec):
    """Which model is adapted, and how its weights are held in memory."""

    path: str
    """A directory with a model, a hub id, a run, or an adapter's directory, which is merged into a copy of its base
    (docs/stages.md); in a stage `stages.NAME` too. `demo` is the 135 M demo model."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """How frozen weights are stored; `auto` follows `train.dtype`. Trained weights are always kept in fp32."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store frozen linear weights in 4-bit NormalFloat or floating point (Dettmers et al. 2023, section 3) or 8-bit
    integers, through bitsandbytes, each as it is read from the file. `method.kind: qlora` makes it `nf4` where it is
    `none`. Weights that are stored in one of these already are held as they are."""
    double_quantization: bool = True
    """Store the scales of 4-bit blocks in 8 bits too: 4.127 bits a weight instead of 4.5 (Dettmers et al. 2023,
    section 3)."""
    add_tokens: list[str] = Field(default_factory=list)
    """Texts that become one token each, in the tokenizer and in the model, where they start as the mean of all others
    (Hewitt 2021). The method must train them: `method.trainable_tokens: added` with LoRA, or the embeddings whole. The
    result's tokenizer has them."""

    @property
    def quantization(self) -> Quantization | None:
        return quantization(self.quantize, self.double_quantization)


class EarlyStopping(Spec):
    """Ends a run when the validation loss no longer falls."""

    patience: PositiveInt = 3
    """Evaluations in a row without improvement before the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest fall of the validation loss that counts as improvement."""


class GroupSpec(Spec):
    """Trained weights that learn at another rate than the others."""

    match: str
    """A regular expression that is searched for in the names of trained weights, such as `lora_B` or `embed_tokens`."""
    rate: PositiveFloat = 1.0
    """Factor on the learning rate."""
    schedule: Schedule | None = None
    """Instead of `train.schedule`; the warmup is everybody's."""
    weight_decay: NonNegativeFloat | None = None
    """Instead of `train.weight_decay`."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return match


class TrainSpec(Spec):
    """The loop: how long, how many rows at a time, how fast, and how often it is looked at."""

    epochs: PositiveFloat | None = None
    """Passes over the training rows; 3 when neither `epochs` nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps. With `epochs` as well, whichever ends first."""
    batch_size: PositiveInt = 16
    """Rows per optimizer step over all processes. Source for the default: PEFT's method comparison and "LoRA Without
    Regret" (Schulman et al. 2025), which finds LoRA hurt by large batches."""
    micro_batch: PositiveInt | Auto = "auto"
    """Rows per forward pass of one process; gradient accumulation follows from it. It never changes the gradient."""
    learning_rate: PositiveFloat | Auto = "auto"
    """`auto` is 2e-4 for adapters and 2e-5 for full fine-tuning: the ratio of ten is from "LoRA Without Regret"
    (Schulman et al. 2025)."""
    schedule: Schedule = "cosine"
    """Learning rate after warmup: constant, to zero along a line or half a cosine, or warmup-stable-decay (Hu et al.
    2024, MiniCPM), which holds the rate and falls to zero over the last fifth of the steps."""
    warmup: NonNegativeFloat = 0.03
    """Steps over which the rate rises from zero: a fraction of all steps when below 1, else a number of steps."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (Loshchilov & Hutter 2019); never on biases, norms and other vectors."""
    kl_to_base: NonNegativeFloat = 0.0
    """Adds this times KL(base || model) at the tokens that are trained on (`kl_on`), in nats a token: the base's own
    predictions are soft targets, against forgetting (Li & Hoiem 2016, Learning without Forgetting, equation 2). The
    base is the model with its adapter off, so it costs one more forward pass and no second model. Where the method
    changes the base itself (`full`, `modules_to_save`, PiSSA, OLoRA), what it says of the training rows is kept on disk
    before they begin: its 64 likeliest tokens at each target and all others together, which makes it the divergence of
    this coarser choice, never more than the whole one. For `sft` and `pretrain`."""
    kl_on: Literal["targets", "replay"] = "targets"
    """Where: at every token that is trained on, or only at those of `data.replay`, so that the task is learned without
    hindrance."""
    l2_to_base: NonNegativeFloat = 0.0
    """Adds half of this times the squared distance of the trained weights from where they began (Li et al. 2018,
    L2-SP, equation 2); for LoRA the squared norm of its update of each weight, scale and all. Unlike weight decay,
    which pulls towards zero. Full fine-tuning keeps a copy of the start in memory."""
    clip: PositiveFloat | Off = 1.0
    """Largest L2 norm of the gradient (Pascanu et al. 2013)."""
    groups: list[GroupSpec] = Field(default_factory=list)
    """Weights with a learning rate, schedule or weight decay of their own; the first group that matches counts."""
    ema: Annotated[float, Field(gt=0, lt=1)] | Off = "off"
    """Judge and keep a running average of the trained weights, w' = d w' + (1 - d) w after every step, with this decay
    d, for example 0.999, while the optimizer goes on with the weights themselves (Polyak & Juditsky 1992; the
    exponential form: Kingma & Ba 2015, section 7.2). While the run is young the decay is (1 + t) / (10 + t) after t
    steps, where that is smaller (as in TensorFlow's ExponentialMovingAverage): else the start would weigh most in a
    short run. One more fp32 copy of the trained weights is kept in memory and in every checkpoint."""
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = "adamw"
    """AdamW with fp32 states, or with 8-bit block-wise states (Dettmers et al. 2022) through bitsandbytes; paged ones
    move to the host's memory when the device's is full (Dettmers et al. 2023, section 3), so they need a GPU."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the forward and backward pass; `auto` is bf16 where the device computes it natively, else fp32."""
    packing: bool | Auto = "auto"
    """Lay the rows of a micro-batch end to end instead of padding them. `auto` tests once that the model keeps packed
    rows apart and falls back to padding, saying so, when it does not."""
    shard: bool = False
    """Spread the weights of the model's blocks, their gradients and what the optimizer keeps of them over the processes
    that torchrun started (FSDP2; Rajbhandari et al. 2020, ZeRO-3), for models that are too large to be trained whole on
    each. It never changes the gradient; each process still loads the model whole, and holds it whole while it is
    judged. With one process it does nothing."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass (Chen et al. 2016); `auto` when the plan does not fit in memory."""
    evaluate_every: PositiveInt | Auto | Off = "auto"
    """Steps between validation losses; `auto` is ten times a run when there are validation rows."""
    generate_every: PositiveInt | Off = "off"
    """Steps between generated answers to validation rows, scored with the metrics of `evaluate`."""
    checkpoint_every: PositiveInt | Auto | Off = "auto"
    """Steps between checkpoints; `auto` is ten times a run, and at least every 500 steps."""
    keep: PositiveInt = 2
    """Checkpoints kept besides the best one."""
    bad_step: Literal["skip", "rollback", "stop"] = "skip"
    """What happens when loss or gradient is not a finite number, or jumps (`spike`): leave the weights as they are and
    go on; go back to the last good checkpoint and pass this step's rows over, three times at most; or end the run. An
    overflow of fp16's loss scaling is always skipped, as the scaling means it to be. Source for passing rows over:
    Chowdhery et al. 2022 (PaLM), section 5.1, who restart 100 steps before a spike and skip 200 to 500 batches."""
    spike: Annotated[float, Field(gt=1)] | Off = "off"
    """A loss this many times the median of the last twenty is a bad step too, for example 3."""
    early_stopping: EarlyStopping | Off = "off"
    """End the run when the validation loss no longer falls; needs validation rows."""
    best: Literal["validation-loss", "last"] = "validation-loss"
    """Which weights become the result: those with the lowest validation loss (the last ones without validation rows),
    or always the last ones."""
    log: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where the loss curve is sent besides `events.jsonl`."""


class MemorisationSpec(Spec):
    """How many training answers a model is asked for, to see whether it learned them by heart."""

    rows: PositiveInt = 64
    """Training rows drawn at random, and at most as many more whose answers hold numbers, addresses or access keys
    that their prompts do not."""


class EvaluateSpec(Spec):
    """How base and tuned model are compared on held-out rows."""

    rows: PositiveInt = 200
    """At most this many test rows are answered, drawn with the recipe's seed."""
    metrics: list[AskedMetric] | Auto = "auto"
    """The first decides the verdict. Known: `exact_match`, `contains`, `f1`, `rouge1`, `rouge2`, `rougeL`, `bleu`,
    `chrf`, `accuracy`, `macro_f1`, `micro_f1`, `json_valid`, `json_fields`, `sql_execution`, `perplexity`,
    `bits_per_byte`, for words `entity_f1` and `word_accuracy`, for numbers `rmse`, `mae` and `pearson`, for pairs
    `reward_accuracy`, `preference_accuracy` and `margin`, for pairs and short answers `calibration_error`;
    `file.py:function` is one of your own (see below). `auto` chooses from the answers: `accuracy` for a few labels,
    `exact_match` for short answers, `rougeL` for longer text, `perplexity` for raw text; perplexity is always added.
    Where answers are rewarded it is `reward`, their mean."""
    max_new_tokens: PositiveInt | Auto = "auto"
    """Longest generated answer; `auto` is one and a half times the longest reference answer, at least 16 tokens."""
    batch_size: PositiveInt = 16
    """Rows answered at a time."""
    resamples: PositiveInt = 1000
    """Bootstrap resamples behind each interval (Efron 1979; paired as in Koehn 2004)."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Coverage of the intervals."""
    forgetting: str = "auto"
    """General text on which perplexity is compared before and after: a path, `auto` for text that comes with Python,
    or `off`."""
    samples: NonNegativeInt = 8
    """Best and worst answers shown in the report, of each."""
    memorisation: MemorisationSpec | Auto | Off = "auto"
    """How many training answers come back from their prompts, against held-out ones and against the base
    (docs/verdict.md): `auto` asks for 32 where answers are generated anyway, `{rows: 64}` for as many as it says."""

    @property
    def probed_rows(self) -> int:
        """Training rows that are asked at random."""
        return 0 if self.memorisation == "off" else 32 if self.memorisation == "auto" else self.memorisation.rows

    @property
    def metric_names(self) -> list[str] | Auto:
        """What the metrics are called in reports."""
        return self.metrics if isinstance(self.metrics, str) else [name_of(metric) for metric in self.metrics]

    @property
    def own_metrics(self) -> list[OwnMetric]:
        """Those that need more than a name."""
        return [] if isinstance(self.metrics, str) else [one for one in self.metrics if not isinstance(one, str)]

    @field_validator("metrics")
    @classmethod
    def _own_names(cls, metrics: Any) -> Any:
        names = [] if isinstance(metrics, str) else [name_of(metric) for metric in metrics]
        for metric in [] if isinstance(metrics, str) else metrics:
            known = {*METRICS, *OF_DOCUMENTS, *COMPARED, REWARD}
            if not isinstance(metric, str) and (names.count(metric.name) > 1 or metric.name in known):
                raise ValueError(f"there is another metric called {metric.name}: rename the function")
        return metrics

    @model_validator(mode="before")
    @classmethod
    def _forgetting_off(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("forgetting") is False:
            return {**value, "forgetting": "off"}
        return value


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _bytes_of(value: Any) -> int:
    """Reads `512MB` (millions of bytes), `2GiB` (powers of 1024) or a number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", value.strip(), re.IGNORECASE)
        if isinstance(value, str)
        else None
    )
    if found is None or not float(found[1]):
        raise ValueError(f"{value!r} is not a size such as 512MB or 2GiB")
    number, unit, binary = float(found[1]), found[2].upper(), bool(found[3])
    return int(number * (1024 if binary else 1000) ** _UNITS[unit])


_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def _seconds_of(value: Any) -> float:
    """Reads `90s`, `45min`, `2h`, `1d` or a number of seconds."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return float(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"{value!r} is not a time such as 90s, 45min, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


class BudgetSpec(Spec):
    """What the job may use."""

    memory: str | int | None = None
    """The most memory that the whole process may have at any time, as the operating system counts it: `512MB`
    (millions of bytes), `2GiB`, or a number of bytes. When the job does not fit, the frozen model is read from its
    files block by block, at every step, and LoRA is trained beside it; see docs/training.md for what that costs. For
    training on a CPU."""

    time: str | int | None = None
    """The longest that the job may take: `90s`, `45min`, `2h`, `1d` or a number of seconds. Training refuses to start
    when it is predicted to take longer, and `tunesmith plan` says what fits; no setting is changed by itself."""
    money: PositiveFloat | None = None
    """The most that it may cost. `tunesmith plan` looks for a machine among those of its table; training here needs
    `hourly_price`, and refuses to start when it is predicted to cost more."""
    hourly_price: PositiveFloat | None = None
    """What an hour of this machine costs, in the currency of `money`."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: Any) -> Any:
        if time is not None:
            _seconds_of(time)
        return time

    @model_validator(mode="after")
    def _has_a_use(self) -> BudgetSpec:
        if self.hourly_price is not None and self.money is None:
            raise ValueError("hourly_price is for `money`, and there is none")
        return self

    @property
    def seconds(self) -> float | None:
        return None if self.time is None else _seconds_of(self.time)

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, memory: Any) -> Any:
        if memory is not None:
            _bytes_of(memory)
        return memory

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else _bytes_of(self.memory)


def _gate_threshold(value: Any) -> float:
    """Reads `+0.02`, `0.02` or `5%` as a number."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ValueError(f"{value!r} is not a number or a percentage such as +0.02 or 5%") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a threshold is a number or a percentage such as +0.02 or 5%")
    return float(value)


Gate = Annotated[
    dict[str, Annotated[float, BeforeValidator(_gate_threshold)]],
    Field(
        description="What the run must show to be shipped, else exit code 3. A metric's threshold is the least gain "
        "(in its better direction) of the tuned model over the base; a positive one must also lie outside the "
        "interval's reach of zero. `forgetting` is the largest allowed rise of perplexity on general text."
    ),
]


class Recipe(Spec):
    """Everything a run was asked to do."""

    model: ModelSpec
    """A path, hub id, run or adapter, or `{path, revision, dtype, quantize}`."""
    data: DataSpec
    """What is trained on and what is judged on."""
    method: Method = Lora()
    """What is trainable."""
    objective: Objective = Supervised()
    """What is minimised."""
    train: TrainSpec = TrainSpec()
    """How long, how fast, how many rows at a time."""
    evaluate: EvaluateSpec | Off = EvaluateSpec()
    """How the result is proven; `off` skips it, and the report says so."""
    gate: Gate = Field(default_factory=dict)
    budget: BudgetSpec = BudgetSpec()
    """What the job may use at most."""
    output: str = "runs/{name}"
    """Directory of the run. `{name}` becomes the recipe's file name (`run` for a recipe made in
    Python). An existing run is never overwritten."""
    seed: NonNegativeInt = 0
    """Seed of every random choice: splits, order, initial weights, dropout, bootstrap."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if isinstance(value.get("model"), str):
            value["model"] = {"path": value["model"]}
        for section, default in (("method", "lora"), ("objective", "sft")):
            given = value.get(section)
            if isinstance(given, str):
                value[section] = {"kind": given}
            elif isinstance(given, dict) and "kind" not in given:
                value[section] = {"kind": default, **given}
        return _over_quantized_base(value)


def _over_quantized_base(value: dict[str, Any]) -> dict[str, Any]:
    """`qlora` is LoRA over a base in 4 bits: NF4 unless another quantization is asked for."""
    method, model = value.get("method"), value.get("model")
    kind = method.kind if isinstance(method, QLora) else method.get("kind") if isinstance(method, dict) else None
    if kind != "qlora":
        return value
    if isinstance(model, ModelSpec) and model.quantize == "none":
        return {**value, "model": model.model_copy(update={"quantize": "nf4"})}
    if isinstance(model, dict) and model.get("quantize", "none") == "none":
        return {**value, "model": {**model, "quantize": "nf4"}}
    return value


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
