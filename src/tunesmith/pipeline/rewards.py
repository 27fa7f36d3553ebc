"""A recipe's rewards at work: verifiers, a function of the user's own, a reward model; and how answers are judged."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.evaluation.answers import Judged, Judging, judge, turns_text
from tunesmith.files import read_json
from tunesmith.metrics.verifiers import has_keys, has_number, has_pattern, is_exact, json_value
from tunesmith.objectives.rewards import (
    ExactReward,
    FunctionReward,
    JsonReward,
    ModelReward,
    NumberReward,
    RegexReward,
    Rewards,
)
from tunesmith.pipeline.user_function import OfAnswer, file_hash, loaded_function
from tunesmith.train.rollouts import Score

if TYPE_CHECKING:
    from tunesmith.pipeline.reward_model import ByModel


def references_of(row: Row) -> list[str]:
    """The reference answers of a row, none where it leaves its answer empty."""
    return [reference for reference in row.references if reference.strip()]


@dataclass(frozen=True)
class ByText:
    """A reward that looks at texts alone."""

    of_answer: OfAnswer

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        return [
            self.of_answer(turns_text(row.messages[:-1]), answer, references_of(row))
            for row, answer in zip(rows, answers, strict=True)
        ]


@dataclass
class Scorer:
    """What answers are worth by all rewards of a recipe.

    Attributes:
        parts: each reward with its weight.
        models: those of them that are reward models.
        record: what identifies code and models that are not in the recipe itself, by name.
    """

    parts: list[tuple[float, Score]]
    models: list[ByModel]
    record: dict[str, str]

    @classmethod
    def of(cls, rewards: Rewards, dtype: str = "auto") -> Scorer:
        """Raises InputError when a file, function, package or model that a reward needs is not there."""
        parts: list[tuple[float, Score]] = []
        models: list[ByModel] = []
        record: dict[str, str] = {}
        for reward in rewards:
            if isinstance(reward, FunctionReward):
                of_answer, record[reward.path] = loaded_function(reward.path, "reward", "objective.reward.path")
                parts.append((reward.weight, ByText(of_answer)))
            elif isinstance(reward, ModelReward):
                models.append(_by_model(reward.path, dtype))
                parts.append((reward.weight, models[-1]))
            else:
                if isinstance(reward, JsonReward) and reward.schema_file is not None:
                    record[reward.schema_file] = file_hash(Path(reward.schema_file), "objective.reward.schema_file")
                parts.append((reward.weight, ByText(_verifier(reward))))
        return cls(parts, models, record)

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        if not rows:
            return []
        totals = [0.0] * len(rows)
        for weight, part in self.parts:
            totals = [total + weight * value for total, value in zip(totals, part(rows, answers), strict=True)]
        return totals

    def share(self, model: nn.Module) -> int:
        """Keeps weights that reward models have in common with the trained one once; how many."""
        return sum(part.share(model) for part in self.models)


def _by_model(path: str, dtype: str) -> ByModel:
    from tunesmith.pipeline.reward_model import ByModel  # which takes seconds to import

    return ByModel(path, dtype)


def _verifier(reward: ExactReward | RegexReward | JsonReward | NumberReward) -> OfAnswer:
    if isinstance(reward, ExactReward):
        return lambda prompt, answer, references: is_exact(answer, references)
    if isinstance(reward, NumberReward):
        return lambda prompt, answer, references: has_number(answer, references)
    if isinstance(reward, RegexReward):
        pattern = re.compile(reward.pattern)
        return lambda prompt, answer, references: has_pattern(answer, pattern)
    if reward.schema_file is not None:
        return partial(_keeps_schema, _schema(Path(reward.schema_file)))
    return lambda prompt, answer, references: has_keys(answer, reward.keys)


def _schema(path: Path) -> Any:
    """A validator of the package `jsonschema` for the schema in a file."""
    where = "objective.reward.schema_file"
    try:
        validators = importlib.import_module("jsonschema.validators")
        errors = importlib.import_module("jsonschema.exceptions")
    except ImportError as error:
        raise InputError(
            "JSON schemas are checked by the package jsonschema, which is not installed",
            where=where,
            fix="pip install jsonschema, or name the keys in objective.reward.keys",
        ) from error
    try:
        schema = read_json(path)
        kind = validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, errors.SchemaError) as error:
        raise InputError(f"no JSON schema can be read: {error}", where=f"{where} {path}") from error
    return kind(schema)


def _keeps_schema(schema: Any, prompt: str, answer: str, references: list[str]) -> float:
    try:
        return float(schema.is_valid(json_value(answer)))
    except ValueError:
        return 0.0


def judge_and_score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Rendered],
    how: Judging,
    score: Scorer,
    progress: Progress,
) -> list[Judged]:
    """Answers every prompt greedily, and says what the answers are worth."""
    judged = judge(model, tokenizer, rows, replace(how, likelihoods=False), progress)
    rewards = score([row.row for row in rows], [one.answer or "" for one in judged])
    return [
        replace(one, reward=reward, references=references_of(row.row))
        for one, reward, row in zip(judged, rewards, rows, strict=True)
    ]
