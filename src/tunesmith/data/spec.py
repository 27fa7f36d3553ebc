"""The recipe's `data` section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from tunesmith.base import Spec

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "dolly",
    "prompt-completion",
    "prompts",
    "instruction-response",
    "task",
    "openassistant",
    "preference",
    "rated",
    "unpaired",
    "labelled",
    "token-labels",
    "text",
]

Columns = Annotated[
    dict[str, str],
    Field(
        description="Which column of the file holds which part of a row, for example `{prompt: question, completion: "
        "answer}`. A value may also be a template over columns: `{prompt: 'Summarise: {document}', completion: "
        "summaries}`, with `{{` and `}}` for braces themselves. Name every part that is to be used: other columns "
        "are read only where a part that the format needs would be missing. A column that holds a list of answers "
        "gives several references; the first one is trained on."
    ),
]


_REFUSED = object()


def _no_boolean(off: Any = _REFUSED) -> Callable[[Any], Any]:
    """YAML reads `off` and `no` as false, which would become the number 0."""

    def checked(value: Any) -> Any:
        if isinstance(value, bool):
            if value or off is _REFUSED:
                raise ValueError("a path or a fraction such as 0.1 is needed")
            return off
        return value

    return checked


class SourceSpec(Spec):
    """One of several training sources."""

    path: str
    """A file (JSONL, JSON, CSV, TSV, Parquet, plain text; `.gz`, `.bz2`, `.xz`, `.zst` too), a `datasets` directory, a
    hub id, the name of a preset (`tunesmith data presets` lists them), or `-` for standard input."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Which split of a hub data set or of a directory with several is read; `train` when none is named."""
    weight: float | None = Field(default=None, gt=0)
    """Share of rows drawn from this source, relative to the other weights. Without any weight every row is used once
    an epoch."""
    epochs: float | None = Field(default=None, gt=0)
    """How often this source's rows are used in one epoch of the whole, instead of a weight: 2 is twice each, 0.5 every
    other row, the others in the next epoch."""
    format: Format = "auto"
    """How this source's rows are written; `auto` is detected from the columns and printed."""
    columns: Columns = Field(default_factory=dict)


SELF = "self"
"""Path of a replay that the base writes itself."""


class ReplaySpec(Spec):
    """Rows of a general kind, mixed in so that the model does not forget what it could."""

    path: str
    """As in `train`: conversations or raw text, whatever the task's rows are. Rows that `evaluate.forgetting` is
    measured on should not stand here. `self` is the base's own answers to general prompts, made once before training
    and kept on disk (Huang et al. 2024, Self-Synthesized Rehearsal)."""
    prompts: str = "auto"
    """With `self`: what the base is asked. A file, of whose conversations everything before the last answer is taken
    and whose raw texts are prompts, or `auto` for 384 general prompts that come with Tunesmith."""
    answers: PositiveInt = 256
    """With `self`: how many prompts are answered at most, drawn with the recipe's seed."""
    max_new_tokens: PositiveInt = 256
    """With `self`: longest answer. One that does not end within it is left out."""
    temperature: NonNegativeFloat = 1.0
    """With `self`: 1 draws answers as probable as the base finds them, so that training on them pulls it nowhere in the
    mean; 0 takes its likeliest words, which makes it surer than it was."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Part of an epoch's rows that is replayed. The other sources keep all of theirs: an epoch grows by these. Source
    for the default: Scialom et al. 2022 (continual instruction tuning) rehearse 1 %, Ibrahim et al. 2024 replay 5 to
    50 % of tokens in continued pretraining."""
    format: Format = "auto"
    """How these rows are written; `auto` is detected from the columns and printed."""
    columns: Columns = Field(default_factory=dict)
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """Which split of a hub data set or of a directory with several is read; `train` when none is named."""

    @model_validator(mode="after")
    def _asks_only_itself(self) -> ReplaySpec:
        if self.path == SELF:
            if self.subset is not None or self.split is not None:
                raise ValueError("subset and split are for data sets, and the base writes these rows itself")
            if self.prompts == "auto" and (self.format != "auto" or self.columns):
                raise ValueError("format and columns are for a file of prompts, and none is named")
            return self
        for name in ("prompts", "answers", "max_new_tokens", "temperature"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for replay.path: self")
        return self


def _from_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class DataSpec(Spec):
    """What is trained on, what is judged on, and what happens to rows that cannot be used as they are."""

    train: str | list[str | SourceSpec]
    """A path, a list of paths, or a list of `{path, weight, epochs, format, columns, subset, split}`."""
    temperature: float | None = Field(default=None, gt=0)
    """Mixes several sources in proportion to rows^(1/temperature): 1 is as they are, more is nearer to equal shares.
    Source: Raffel et al. 2020 (T5), section 3.5.2."""
    replay: Annotated[ReplaySpec | None, BeforeValidator(_from_path)] = None
    """Rows of a general kind mixed into training, against forgetting: a path, `self`, or `{path, share, …}`."""
    validation: Annotated[str | float | None, BeforeValidator(_no_boolean(off=None))] = None
    """A path, or the fraction of the training rows to hold back for early stopping and the best checkpoint. Rows that
    also stand in the test are left out of it, unless `overlap` is `keep`."""
    test: Annotated[str | float, BeforeValidator(_no_boolean())] = "auto"
    """A path, or the fraction of the training rows to hold back for the verdict; `auto` is a tenth, but at least 20
    and at most 200 rows. These rows are never trained on and never used for early stopping."""
    split_seed: NonNegativeInt | None = None
    """Seed of which rows are held back and which test rows are answered; the recipe's `seed` when none is given. With
    one of its own, runs of several seeds are judged on the same rows (`train --seeds`)."""
    stratify: str | None = None
    """Field of the rows whose values keep their shares when rows are held back, for example `label`. Dots reach into
    nested objects."""
    group: str | None = None
    """Field of the rows that must not stand on both sides, for example `document` or `user`: rows that share its value
    are held back together, or not at all."""
    format: Format = "auto"
    """How the rows are written; `auto` is detected from the columns and printed."""
    columns: Columns = Field(default_factory=dict)
    answer_after: str | None = Field(default=None, min_length=1)
    """For rows of raw text: the marker after which the answer begins (for example `"\\nA: "`). What stands before and
    the marker itself become the prompt. It must occur once in every row. Without it every token of a text row is
    trained on."""
    system: str | None = None
    """A system turn put before every conversation that has none."""
    template: str = "auto"
    """How a conversation becomes text: `auto` is the model's own chat template, or `plain` when it has none; `plain`
    is prompt + completion + end-of-text; a named template (`chatml`, `llama-3`, `zephyr`, `gemma`), or a path to a
    Jinja file."""
    train_on: Literal["answers", "last-answer", "everything"] = "answers"
    """Which tokens are targets: every assistant turn with its end-of-turn token, the last one only, or all tokens.
    Source for the default: Ouyang et al. 2022 (InstructGPT) train on demonstrations' answers; TRL and Axolotl mask
    prompts by default for prompt/completion data."""
    max_length: PositiveInt | Literal["auto"] = "auto"
    """Longest row in tokens; `auto` is the longest row of the data, but never more than the model's own limit."""
    overlong: Literal["error", "drop", "truncate"] = "error"
    """What happens to rows longer than `max_length`: refuse, leave them out, or cut the end of the answer. The question
    is never cut, nor the end-of-turn of an answer that fits; a row whose answer would vanish is dropped. What was lost
    is counted and reported. Held-out answers that the model cannot hold are refused or left out, never cut."""
    empty: Literal["error", "drop"] = "error"
    """What happens to rows whose answer or prompt is empty."""
    duplicates: Literal["drop", "keep", "error"] = "drop"
    """What happens to rows that stand in the training data more than once."""
    overlap: Literal["drop", "keep", "error"] = "drop"
    """What happens to training rows that also stand in the validation or test rows (same prompt after folding case and
    white space)."""
    checks: bool = True
    """Whether training rows are looked through for near duplicates, contradictory or degenerate answers, personal data,
    oddities of encoding and language, and text of the held-out rows; what is found is reported, never changed."""
    benchmarks: list[str] = Field(default_factory=list)
    """Files of benchmarks that training rows must not hold; rows that share 13 words in a row with one are reported.
    Source for 13: Brown et al. 2020 (GPT-3), appendix C."""
