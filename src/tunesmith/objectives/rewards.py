"""What answers are rewarded for: verifiers, a function of the user's own, a reward model; one explicit union."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunesmith.base import Spec
from tunesmith.metrics.spec import names_function


class RewardSpec(Spec):
    """One reward of an answer."""

    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor on this reward; an answer is worth the sum of all. A negative one punishes."""

    needs_reference: ClassVar[bool] = False
    """Whether the answer is compared with a row's own."""


class ExactReward(RewardSpec):
    """1 for an answer that is the reference."""

    kind: Literal["exact"] = "exact"
    """1 when the answer equals a reference answer of its row, white space at both ends aside, else 0."""

    needs_reference: ClassVar[bool] = True


class RegexReward(RewardSpec):
    """1 for an answer in which a pattern is found."""

    kind: Literal["regex"] = "regex"
    """1 when the pattern is found in the answer, else 0."""
    pattern: str
    """A regular expression in Python's syntax; `^` and `$` tie it to the ends of the answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


class JsonReward(RewardSpec):
    """1 for an answer that is JSON as it was asked for."""

    kind: Literal["json"] = "json"
    """0 when the answer, as a whole, is not JSON; else the share of `keys` that it has, or 1 when it keeps the schema,
    or 1 when neither is asked for."""
    keys: list[str] = Field(default_factory=list)
    """Keys that the object must have."""
    schema_file: str | None = None
    """A file with a JSON schema that the answer must keep, checked by the package `jsonschema`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> JsonReward:
        if self.keys and self.schema_file:
            raise ValueError("use keys or schema_file; a schema names keys under `required`")
        return self


class NumberReward(RewardSpec):
    """1 for an answer that ends with the right number."""

    kind: Literal["number"] = "number"
    """1 when the last number of the answer equals the last one of the row's reference answer, else 0 (Cobbe et al.
    2021, GSM8K)."""

    needs_reference: ClassVar[bool] = True


class FunctionReward(RewardSpec):
    """What a function of yours says."""

    kind: Literal["function"] = "function"
    """A number from a Python function of your own. It runs in this process with all that you may do; nothing holds it
    back, so name only code that you trust. Its hash is kept with the run."""
    path: str
    """`file.py:function`, called as `function(prompt: str, answer: str, references: list[str])` for every answer. It
    must return a finite number, and the same one for the same arguments."""

    @field_validator("path")
    @classmethod
    def _names_both(cls, path: str) -> str:
        return names_function(path)


class ModelReward(RewardSpec):
    """What a reward model says."""

    kind: Literal["model"] = "model"
    """The number that a reward model gives to prompt and answer. Weights that it shares with the trained model's base
    are kept once."""
    path: str
    """A run of Tunesmith, an adapter or a model directory with a head that gives one number."""


def _as_list(value: Any) -> Any:
    """One reward may stand without a list, and one without settings as its name alone."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"kind": item} if isinstance(item, str) else item for item in items]


Reward = Annotated[
    ExactReward | RegexReward | JsonReward | NumberReward | FunctionReward | ModelReward, Field(discriminator="kind")
]
Rewards = Annotated[
    list[Reward],
    BeforeValidator(_as_list),
    Field(
        min_length=1,
        description="What an answer is worth: `exact`, `regex`, `json`, `number`, `function` or `model` with its "
        "settings, or a list of several, whose weighted sum counts.",
    ),
]
