"""Objectives of models that judge: a label of a row, several labels, a label of each word, or a number."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.batch import Batch
from tunesmith.metrics import BETWEEN
from tunesmith.models.task_head import Pooling, TaskHead, outputs_of, row_features, token_features
from tunesmith.objectives.objective import Head, TargetLogps, TrainingObjective

MOST_LABELS = 10_000
"""More distinct answers than these are no labels."""
FEATURES = "features"
"""Name of the tensor that holds what the head reads, where the trunk has run already: one row for each target."""


def _read_by_yaml(value: Any) -> Any:
    """Labels that YAML read as numbers are texts."""
    return [str(item) for item in value] if isinstance(value, list) else value


Labels = Annotated[
    list[str] | Literal["auto"],
    BeforeValidator(_read_by_yaml),
    Field(
        description="Names of the labels in the order of the outputs; `auto` is those of the training rows, sorted. "
        "They are saved with the model."
    ),
]
ClassWeights = Annotated[
    dict[str, PositiveFloat] | Literal["none", "balanced"],
    Field(
        description="Weight of each label's rows in the loss: `balanced` is rows / (labels × rows of the label) (King "
        "& Zeng 2001), or `{label: weight}` with 1 for labels that are not named."
    ),
]


class TaskObjective(TrainingObjective):
    """What is common to all: outputs of a head, read at the targets of a batch."""

    layer: PositiveInt | None = None
    """Read hidden states behind this many blocks instead of the last ones: middle layers of a model that was trained to
    write often know more of a text's meaning (Skean et al. 2025)."""
    head_rate: PositiveFloat = 10.0
    """Factor on the learning rate of a new head where more than the head is trained: the trunk has been trained
    already, and the head begins at random. Measured with MiniLM on banking77, 120 steps: LoRA's accuracy 0.71 without,
    0.88 with 4 and 0.89 with 10; 80 steps of full fine-tuning at 3e-4: 0.82 with 10, 0.87 with 100, because ten times a
    small rate is a small one (`bench/head_rate.py`). A head that the model has already learns as the trunk does."""

    head: ClassVar[Head] = "sequence"
    terms: ClassVar[tuple[str, ...]] = ("nll",)
    words: ClassVar[bool] = False
    """Whether words are judged, and not rows."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """By which it is judged, the deciding one first."""

    @abstractmethod
    def task_head(self) -> TaskHead:
        """The head that `models.load` builds; labels must be settled."""

    @abstractmethod
    def settled(self, answers: Iterable[Sequence[str]]) -> TaskObjective:
        """The same objective with everything that depends on the training rows filled in.

        Raises:
            InputError: when their answers cannot be such labels.
        """

    @abstractmethod
    def encoded(self, answers: Sequence[str], targets: int) -> Tensor:
        """A row's answers as numbers, ``[1, …]``, or ``[targets]`` for words.

        Raises:
            ValueError: when an answer is none that the head can give; the message says why.
        """

    @abstractmethod
    def answer(self, outputs: Tensor) -> str:
        """What outputs ``[targets, labels]`` of one row say."""

    @abstractmethod
    def said(self, answers: Sequence[str]) -> str:
        """A row's answers in the form of `answer`."""

    @abstractmethod
    def baseline(self, answers: Iterable[Sequence[str]]) -> Tensor:
        """Constant outputs ``[labels]`` that are best without looking at a row: what a new head is compared with."""

    def margin_of(self, outputs: Tensor) -> float | None:
        """By how much one answer of a row is better than the other; None where nothing is compared."""
        return None

    def confidence_of(self, outputs: Tensor) -> float | None:
        """Probability of the one label that outputs ``[targets, labels]`` of a row say; None where they say others."""
        return None

    def features(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head reads for every target of the batch, ``[targets, width]``."""
        if self.words:
            return token_features(model, batch, places_of_targets(batch), self.task_head())
        found = row_features(model, batch, self.task_head())
        return found[: len(places_of_targets(batch))]  # a batch that only fills up has rows and no targets

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the head gives for every target, fp32 ``[targets, labels]``."""
        found = batch.tensors.get(FEATURES)
        return outputs_of(model, self.features(model, batch) if found is None else found)

    def target_logps(self, model: nn.Module, batch: Batch) -> TargetLogps:
        return TargetLogps(-self.losses(self.outputs(model, batch), batch.tensors["labels"]), places_of_targets(batch))

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Negative log-likelihood of each target, fp32 ``[targets]``."""

    def importance(self, labels: Tensor) -> Tensor:
        """How much each target counts, ``[targets]``."""
        return torch.ones(len(labels), device=labels.device)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        asked = batch.tensors["target_weights"]
        counted = asked[asked > 0].double() * self.importance(batch.tensors["labels"])
        return {"nll": counted.sum()}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        asked, labels = batch.tensors["target_weights"], batch.tensors["labels"]
        losses = self.losses(self.outputs(model, batch), labels, float(getattr(self, "label_smoothing", 0.0)))
        return {"nll": (losses * asked[asked > 0] * self.importance(labels)).sum()}


def places_of_targets(batch: Batch) -> Tensor:
    """Where outputs are read: int64 ``[targets]``."""
    return torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)


class Classify(TaskObjective):
    """One label of a row, or several, by a head on the trunk."""

    kind: Literal["classify"] = "classify"
    """Minimise the cross-entropy of a row's label; of each label for itself when a row may have several."""
    labels: Labels = "auto"
    multi_label: bool = False
    """Whether a row may have several labels, or none; its label is then a list, and each output a yes or no."""
    class_weights: ClassWeights = "none"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This share of each target is spread evenly over the labels (Szegedy et al. 2016, section 7)."""
    pooling: Pooling = "auto"
    """What of a row the head reads: the mean of its tokens, the first (`cls`) or the last one, or what the model's own
    `pooler` makes of the first; `auto` is what the model was made for, and the last token where tokens only see those
    before them."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("micro_f1", "macro_f1", "accuracy") if self.multi_label else ("accuracy", "macro_f1")

    def task_head(self) -> TaskHead:
        problem = "multi_label_classification" if self.multi_label else "single_label_classification"
        return TaskHead("sequence", tuple(self.labels), problem, self.pooling, self.layer)

    def settled(self, answers: Iterable[Sequence[str]]) -> Classify:
        counts = _counted(answers, several=self.multi_label)
        labels = _settled_labels(self.labels, counts)
        weights = _settled_weights(self.class_weights, labels, counts)
        return self.model_copy(update={"labels": labels, "class_weights": weights})

    def encoded(self, answers: Sequence[str], targets: int) -> Tensor:
        numbers = [_number(label.strip(), self.labels) for label in answers if label.strip()]
        if self.multi_label:
            found = torch.zeros(1, len(self.labels))
            found[0, numbers] = 1.0
            return found
        if len(numbers) != 1:
            raise ValueError(
                f"one label is needed and there are {len(numbers)}: set objective.multi_label: true for several"
            )
        return torch.tensor(numbers)

    def answer(self, outputs: Tensor) -> str:
        if self.multi_label:
            return BETWEEN.join(
                label for label, value in zip(self.labels, outputs[0].tolist(), strict=True) if value > 0
            )
        return self.labels[int(outputs[0].argmax())]

    def confidence_of(self, outputs: Tensor) -> float | None:
        return None if self.multi_label else float(outputs[0].softmax(0).max())

    def said(self, answers: Sequence[str]) -> str:
        given = {label.strip() for label in answers if label.strip()}
        return BETWEEN.join(label for label in self.labels if label in given)

    def baseline(self, answers: Iterable[Sequence[str]]) -> Tensor:
        rows = [[label.strip() for label in row if label.strip()] for row in answers]
        counts = Counter(label for row in rows for label in row)
        shares = torch.tensor([(counts[label] + 1) / (len(rows) + 2) for label in self.labels])
        return torch.logit(shares) if self.multi_label else shares.log()

    def losses(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if self.multi_label:
            targets = labels * (1 - smoothing) + smoothing / 2
            every = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            return (every * _weights_of(self, outputs)).mean(1)
        return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing)

    def importance(self, labels: Tensor) -> Tensor:
        if self.multi_label:  # weighs its labels within a row
            return super().importance(labels)
        return _weights_of(self, labels)[labels]


class Tag(TaskObjective):
    """A label of each word, such as the names in a sentence."""

    kind: Literal["tag"] = "tag"
    """Minimise the cross-entropy of each word's label, read at its first token (at its last one where tokens only see
    those before them)."""
    labels: Labels = "auto"
    class_weights: ClassWeights = "none"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This share of each target is spread evenly over the labels (Szegedy et al. 2016, section 7)."""

    head: ClassVar[Head] = "token"
    words: ClassVar[bool] = True

    @property
    def metrics(self) -> tuple[str, ...]:
        entities = any(label.startswith(("B-", "I-", "E-", "S-")) for label in self.labels)
        return ("entity_f1", "word_accuracy") if entities else ("word_accuracy",)

    def task_head(self) -> TaskHead:
        return TaskHead("token", tuple(self.labels), layer=self.layer)

    def settled(self, answers: Iterable[Sequence[str]]) -> Tag:
        counts = _counted(answers, several=True)
        if spaced := [label for label in counts if label.split() != [label]]:
            raise InputError(f"the label {spaced[0]!r} holds a blank", where="data.train", fix="write it without one")
        labels = _settled_labels(self.labels, counts)
        weights = _settled_weights(self.class_weights, labels, counts)
        return self.model_copy(update={"labels": labels, "class_weights": weights})

    def encoded(self, answers: Sequence[str], targets: int) -> Tensor:
        return torch.tensor([_number(label, self.labels) for label in answers[:targets]])

    def answer(self, outputs: Tensor) -> str:
        return " ".join(self.labels[at] for at in outputs.argmax(1).tolist())

    def said(self, answers: Sequence[str]) -> str:
        return " ".join(answers)

    def baseline(self, answers: Iterable[Sequence[str]]) -> Tensor:
        counts = Counter(label for row in answers for label in row)
        total = counts.total()
        return torch.tensor([(counts[label] + 1) / (total + len(self.labels)) for label in self.labels]).log()

    def losses(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=smoothing)

    def importance(self, labels: Tensor) -> Tensor:
        return _weights_of(self, labels)[labels]


class Regress(TaskObjective):
    """A number for each row."""

    kind: Literal["regress"] = "regress"
    """Minimise the squared difference from a row's number, in units of the training numbers' variance."""
    pooling: Pooling = "auto"
    """What of a row the head reads: the mean of its tokens, the first (`cls`) or the last one, or what the model's own
    `pooler` makes of the first; `auto` is what the model was made for, and the last token where tokens only see those
    before them."""
    spread: PositiveFloat | Literal["auto"] = "auto"
    """The number that counts as one unit of error; `auto` is the standard deviation of the training numbers."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("rmse", "mae", "pearson")

    def task_head(self) -> TaskHead:
        return TaskHead("sequence", ("value",), "regression", self.pooling, self.layer)

    def settled(self, answers: Iterable[Sequence[str]]) -> Regress:
        numbers = torch.tensor([float(self.encoded(row, 1)) for row in answers], dtype=torch.float64)
        deviation = float(numbers.std(correction=0))
        if deviation == 0.0:
            raise InputError("all rows have the same number", where="data.train", fix="give rows that differ")
        return self if self.spread != "auto" else self.model_copy(update={"spread": deviation})

    def encoded(self, answers: Sequence[str], targets: int) -> Tensor:
        try:
            value = float(answers[0])
        except (ValueError, IndexError):
            value = math.nan
        if len(answers) != 1 or not math.isfinite(value):
            raise ValueError(f"one number is needed, found {', '.join(answers)[:60]!r}")
        return torch.tensor([value])

    def answer(self, outputs: Tensor) -> str:
        return repr(float(outputs[0, 0]))

    def said(self, answers: Sequence[str]) -> str:
        return repr(float(answers[0]))

    def baseline(self, answers: Iterable[Sequence[str]]) -> Tensor:
        return torch.tensor([float(self.encoded(row, 1)) for row in answers]).mean()[None]

    def losses(self, outputs: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return ((outputs[:, 0] - labels) / float(self.spread)).square()


def _counted(answers: Iterable[Sequence[str]], *, several: bool) -> Counter[str]:
    counts = Counter(label.strip() for row in answers for label in (row if several else row[:1]) if label.strip())
    if len(counts) > MOST_LABELS:
        raise InputError(
            f"there are {len(counts)} different answers, which are no labels",
            where="objective.kind",
            fix="use objective.kind: sft to write answers, or regress for numbers",
        )
    if split := [label for label in counts if BETWEEN in label]:
        raise InputError(f"the label {split[0]!r} holds {BETWEEN!r}", where="data.train", fix="write it otherwise")
    return counts


def _settled_labels(asked: list[str] | str, counts: Counter[str]) -> list[str]:
    labels = sorted(counts) if isinstance(asked, str) else asked
    if len(set(labels)) != len(labels):
        raise InputError("a label stands there twice", where="objective.labels", fix="name each once")
    if len(labels) < 2 and isinstance(asked, str):
        raise InputError(
            f"the training rows have {len(labels)} label",
            where="objective.labels",
            fix="give rows of two labels at least",
        )
    return labels


def _settled_weights(asked: dict[str, float] | str, labels: list[str], counts: Counter[str]) -> dict[str, float] | str:
    if asked == "none":
        return asked
    if isinstance(asked, dict):
        for label in asked:
            if label not in labels:
                raise InputError(f"there is no label {label!r}", where="objective.class_weights", fix=_known(labels))
        return asked
    missing = [label for label in labels if not counts[label]]
    if missing:
        raise InputError(
            f"no training row has the label {missing[0]!r}", where="objective.class_weights", fix="give weights by name"
        )
    return {label: counts.total() / (len(labels) * counts[label]) for label in labels}


def _weights_of(objective: Classify | Tag, like: Tensor) -> Tensor:
    """The weight of each label, ``[labels]``."""
    asked = objective.class_weights
    named = asked if isinstance(asked, dict) else {}
    return torch.tensor([named.get(label, 1.0) for label in objective.labels], device=like.device)


def _number(label: str, labels: Sequence[str]) -> int:
    try:
        return labels.index(label)
    except ValueError:
        raise ValueError(f"the label {label!r} stands in no training row; {_known(labels)}") from None


def _known(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 12} more" if len(labels) > 12 else ""
    return f"labels: {', '.join(labels[:12])}{more}"


def objective_of(head: TaskHead) -> TaskObjective:
    """The objective that a saved head was trained with, as far as its outputs tell."""
    labels = list(head.labels)
    if head.kind == "token":
        return Tag(labels=labels, layer=head.layer)
    if head.problem == "regression":
        return Regress(pooling=head.pooling, layer=head.layer, spread=1.0)
    several = head.problem == "multi_label_classification"
    return Classify(labels=labels, multi_label=several, pooling=head.pooling, layer=head.layer)
