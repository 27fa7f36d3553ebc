"""A model that says which of two answers is better, asked twice with the answers changed round.

Models that judge like what they read first, or last (Zheng et al. 2023, "Judging LLM-as-a-judge with MT-bench and
chatbot arena", section 3.3). Their remedy is used (section 3.4): only a verdict that stays the same when the answers
change places counts, another one is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.votes import Pair, Vote, agreement, scores_by_row, win_rate

MAX_TOKENS = 1024
SYSTEM = (
    "You compare two answers to the same request. Look at whether they are right, complete, to the point and in the "
    "form that was asked for. Do not let length, order or confidence of tone decide. Think briefly, then end with one "
    "line: [[1]] when the first answer is better, [[2]] when the second one is, [[tie]] when neither is."
)
_VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.IGNORECASE)
Said = Literal["first", "second", "tie"]
_SAID: dict[str, Said] = {"1": "first", "2": "second", "tie": "tie"}
ORDERS: tuple[Literal["a", "b"], ...] = ("a", "b")
"""Whose answer is read first."""


@dataclass(frozen=True)
class Asked:
    """One question to the judge and what came of it.

    Attributes:
        first: whose answer it read first.
        said: None where the answer holds no verdict.
    """

    row: int
    model: str
    first: Literal["a", "b"]
    said: Said | None
    text: str
    prompt_tokens: int | None
    completion_tokens: int | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def better(self) -> Literal["a", "b", "tie"] | None:
        if self.said in (None, "tie"):
            return self.said  # type: ignore[return-value]
        return self.first if self.said == "first" else ("b" if self.first == "a" else "a")


def question(pair: Pair, first: Literal["a", "b"]) -> list[dict[str, str]]:
    """What the judge reads."""
    answers = [pair.a, pair.b] if first == "a" else [pair.b, pair.a]
    parts = [f"# Request\n{pair.prompt}"]
    if pair.references:
        parts.append(f"# An answer that is known to be good\n{pair.references[0]}")
    parts += [f"# {which} answer\n{text}" for which, text in zip(("First", "Second"), answers, strict=True)]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def verdict_of(text: str) -> Said | None:
    """The last verdict of an answer; None where there is none."""
    found = _VERDICT.findall(text)
    return _SAID[found[-1].lower()] if found else None


def ask(endpoint: Endpoint, pair: Pair, first: Literal["a", "b"]) -> Asked:
    """Asks once. Raises as `Endpoint.ask` does."""
    reply = endpoint.ask(question(pair, first), MAX_TOKENS)
    tokens = reply.prompt_tokens, reply.completion_tokens
    return Asked(pair.row, endpoint.model, first, verdict_of(reply.text), reply.text, *tokens)


def judge_results(
    pairs: Sequence[Pair], asked: Iterable[Mapping[str, Any]], votes: Sequence[Vote], confidence: float
) -> list[dict[str, Any]]:
    """For every model that judged what its verdicts come to, and how far they agree with people's votes.

    Returns:
        `model`, a `win_rate` over rows, `unparsable` (answers without a verdict), `undecided` (rows that lack one of
        their two verdicts), `changed` (rows whose verdict changed with the places, counted as ties), `first` and
        `second` (shares of the decided verdicts for the answer in that place), `tokens` and `agreement`.
    """
    by_model: dict[str, list[Asked]] = {}
    known = {pair.row for pair in pairs}
    for line in asked:
        if line["row"] in known:
            by_model.setdefault(line["model"], []).append(Asked(**line))
    people = {row: _preferred(score) for row, score in scores_by_row(votes).items()}
    return [_of_model(model, found, people, confidence) for model, found in sorted(by_model.items())]


def _preferred(score: float) -> str:
    return "a" if score > 0.5 else "b" if score < 0.5 else "neither"


def _of_model(model: str, asked: Sequence[Asked], people: Mapping[int, str], confidence: float) -> dict[str, Any]:
    by_row: dict[int, dict[str, Asked]] = {}
    for one in asked:
        by_row.setdefault(one.row, {})[one.first] = one
    whole = {row: both for row, both in by_row.items() if len(both) == len(ORDERS)}
    verdicts = {
        row: (both["a"].better, both["b"].better)
        for row, both in whole.items()
        if both["a"].better is not None and both["b"].better is not None
    }
    settled = {row: first if first == second else "tie" for row, (first, second) in verdicts.items()}
    scores = {row: {"a": 1.0, "b": 0.0}.get(str(verdict), 0.5) for row, verdict in settled.items()}
    decided = [one.said for one in asked if one.said in ("first", "second")]
    both = [(people[row], _preferred(score)) for row, score in scores.items() if row in people]
    counted = [(one.prompt_tokens, one.completion_tokens) for one in asked]
    told = all(None not in pair for pair in counted)
    return {
        "model": model,
        **win_rate(list(scores.values()), confidence),
        "unparsable": sum(one.said is None for one in asked),
        "undecided": len(by_row) - len(settled),
        "changed": sum(first != second for first, second in verdicts.values()),
        "first": decided.count("first") / len(decided) if decided else None,
        "second": decided.count("second") / len(decided) if decided else None,
        "tokens": {
            "prompt": sum(pair[0] or 0 for pair in counted) if told else None,
            "completion": sum(pair[1] or 0 for pair in counted) if told else None,
        },
        "agreement": agreement(both),
    }
