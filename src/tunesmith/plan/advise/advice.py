"""The answer: a strategy with its reasons, and what would change it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.base import InputError
from tunesmith.files import write_text
from tunesmith.plan.advise.answers import Answers
from tunesmith.plan.advise.data_look import DataLook
from tunesmith.plan.advise.rules import Rule, Strategy, deciding_rule
from tunesmith.plan.advise.situation import Situation
from tunesmith.plan.advise.training import PLACEHOLDER, method_for, objective_for, recipe_for
from tunesmith.plan.advise.warnings import TRAINED, warnings_for

SENTENCES: dict[Strategy, str] = {
    "prompt": "Write a better prompt",
    "few-shot": "Put examples into the prompt",
    "rag": "Retrieve the facts",
    "fine_tune": "Fine-tune",
    "fine_tune_rag": "Fine-tune the form, retrieve the facts",
    "continued_pretraining": "Go on with pretraining",
    "do_not": "Do not fine-tune",
}


@dataclass(frozen=True)
class Reason:
    """A sentence and where it comes from."""

    text: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        rule: the row of the table that decided.
        method, objective: None where nothing is trained.
        would_change: what would lead to another answer.
        recipe: settings that `tunesmith plan` takes; None where nothing should be trained or measured yet.
    """

    rule: Rule
    method: str | None
    objective: str | None
    reasons: list[Reason]
    would_change: list[str]
    warnings: list[str]
    recipe: dict[str, Any] | None
    data: DataLook | None

    @property
    def strategy(self) -> Strategy:
        return self.rule.strategy

    @property
    def sentence(self) -> str:
        return SENTENCES[self.strategy]

    def as_json(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "sentence": self.sentence,
            "rule": self.rule.name,
            "method": self.method,
            "objective": self.objective,
            "reasons": [reason.text for reason in self.reasons],
            "sources": list(dict.fromkeys(source for reason in self.reasons for source in reason.sources)),
            "would_change": self.would_change,
            "warnings": self.warnings,
            "data": self.data.as_json() if self.data is not None else None,
            "recipe": self.recipe,
        }


def advise(answers: Answers, data: DataLook | None = None) -> Advice:
    """Applies the rules.

    Args:
        data: what was found in the file that the answers name.
    """
    known = Situation(answers, data)
    rule = deciding_rule(known)
    reasons = [Reason(rule.reason, rule.sources), *_further(known, rule)]
    method = objective = None
    if rule.strategy in TRAINED:
        chosen, learned = method_for(known), objective_for(known, rule.strategy)
        method, objective = chosen.kind, learned.kind
        reasons += [Reason(f"{choice.kind}: {choice.reason}.", (choice.source,)) for choice in (chosen, learned)]
    warnings = warnings_for(known, rule.strategy)
    recipe = recipe_for(known, rule.strategy)
    if recipe is not None and answers.data is None:
        warnings.append(f"no file was named with --data: put yours in the place of {PLACEHOLDER} in the recipe")
    return Advice(rule, method, objective, reasons, list(rule.would_change), warnings, recipe, data)


def _further(known: Situation, rule: Rule) -> list[Reason]:
    """What else speaks for the answer."""
    from tunesmith.plan.advise.sources import WHEN

    found: list[Reason] = []
    if rule.strategy not in ("fine_tune", "fine_tune_rag"):
        return found
    if known.shots_overflow:
        needed, context = known.answers.shots, known.answers.context
        found.append(Reason(f"{needed} examples in the prompt do not fit into {context:,} positions.", (WHEN,)))
    if (known.answers.prompt_tokens or 0) >= 300:
        text = (
            f"The prompt of {known.answers.prompt_tokens:,} tokens becomes a short one: its rules go into the weights "
            "(objective distill with a teacher_prompt does that without answers: docs/distillation.md)."
        )
        found.append(Reason(text, (WHEN,)))
    if known.hurried and rule.strategy == "fine_tune" and not known.facts:
        found.append(Reason("The latency leaves no room for a long prompt or a lookup.", (WHEN,)))
    return found


def write_recipe(advice: Advice, path: Path) -> None:
    """Writes the recipe, which is checked before; what exists is not overwritten.

    Raises:
        InputError: when there is none to write, the file exists, or it cannot be written.
    """
    from tunesmith.recipe_file import check_recipe

    if advice.recipe is None:
        raise InputError(
            f"there is no recipe to write: {advice.sentence[0].lower()}{advice.sentence[1:]} ({advice.rule.name})",
            where=path,
            fix=f"what would change that: {advice.would_change[0]}",
        )
    if path.exists():
        raise InputError("this exists already; it is not overwritten", where=path, fix="name a new file")
    check_recipe(dict(advice.recipe), str(path))
    text = "".join(f"# {line}\n" for line in _comments(advice))
    text += yaml.safe_dump(advice.recipe, sort_keys=False, allow_unicode=True)
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(
            f"the recipe cannot be written: {error.strerror}", where=path, fix="name a file in a directory that exists"
        ) from error


def _comments(advice: Advice) -> list[str]:
    lines = [f"{advice.sentence}: {advice.reasons[0].text}"]
    if advice.strategy not in TRAINED:
        lines.append("This run is what that is measured against: the same rows, the tuned model.")
    return [*lines, *(f"Warning: {text}" for text in advice.warnings)]
