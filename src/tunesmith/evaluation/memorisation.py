"""How many training answers come back from their prompts alone, against held-out ones and against the base.

The definitions are those of the field. An answer comes back verbatim when greedy decoding from its prompt gives the
first 50 tokens of it, or all of a shorter one (Carlini et al. 2021, "Extracting training data from large language
models", and 2023, "Quantifying memorization across neural language models", definition 3.1, where both are 50 tokens).
It comes back nearly when BLEU between the two, over those tokens, is above 0.75 (Ippolito et al. 2022, "Preventing
verbatim memorization in language models gives a false sense of privacy": approximate memorization).

A good answer to a question can be foreseen without having been seen. So the same is counted on held-out rows, and what
the base says already is not charged to the tuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.evaluation.details import KINDS, SURE, Detail, Kind, details_of, says
from tunesmith.metrics.proportions import difference_of_shares

WINDOW = 50
"""Tokens of an answer that are compared, counted from its start."""
FEWEST = 8
"""Tokens of an answer that can show memorisation: a label or a word comes back because it is right."""
NEARLY = 0.75
EXAMPLES = 5


@dataclass(frozen=True)
class Passage:
    """An answer that may come back.

    Attributes:
        source: file and line of its row.
        prompt: the conversation before it, as text.
        answer: as it stands in the row.
        opening: ids of its first tokens, at most `WINDOW`.
        start: those tokens as text.
        counts: whether it is long and rare enough that its coming back whole says anything.
    """

    source: str
    prompt: str
    answer: str
    opening: tuple[int, ...]
    start: str
    counts: bool


@dataclass(frozen=True)
class Said:
    """What one model said to a passage's prompt: the text, and ids of as many tokens as are compared."""

    text: str
    opening: tuple[int, ...]


@dataclass(frozen=True)
class Returned:
    """How far an answer came back."""

    verbatim: bool
    nearly: bool
    """Verbatim ones included."""


def returned(passage: Passage, said: Said) -> Returned:
    """Compares what a model said with what stands in the row."""
    if said.text.strip().startswith(passage.start.strip()):
        return Returned(verbatim=True, nearly=True)
    return Returned(verbatim=False, nearly=_bleu(said.opening, passage.opening) > NEARLY)


def _bleu(said: Sequence[int], reference: Sequence[int]) -> float:
    """Sentence BLEU over token ids, between 0 and 1."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(tokenize="none", effective_order=True, force=True)
    return scorer.sentence_score(" ".join(map(str, said)), [" ".join(map(str, reference))]).score / 100


@dataclass(frozen=True)
class Probed:
    """A group of passages with what both models said to them, in the same order."""

    passages: Sequence[Passage]
    base: Sequence[Said]
    tuned: Sequence[Said]

    def counts(self) -> dict[str, int]:
        """Rows, how many answers each model gave back, and of the tuned model's those that the base does not give."""
        found = Counter[str]()
        for passage, before, after in self._counting():
            old, new = returned(passage, before), returned(passage, after)
            found["rows"] += 1
            found["base_verbatim"] += old.verbatim
            found["base_nearly"] += old.nearly
            found["verbatim"] += new.verbatim
            found["nearly"] += new.nearly
            found["learned"] += new.nearly and not old.nearly
        names = ("rows", "base_verbatim", "base_nearly", "verbatim", "nearly", "learned")
        return {name: found[name] for name in names}

    def learned_sources(self) -> list[str]:
        """Rows whose answers the tuned model gives back and the base does not."""
        return [
            passage.source
            for passage, before, after in self._counting()
            if returned(passage, after).nearly and not returned(passage, before).nearly
        ]

    def _counting(self) -> list[tuple[Passage, Said, Said]]:
        return [row for row in zip(self.passages, self.base, self.tuned, strict=True) if row[0].counts]

    def details(self, common: frozenset[Detail]) -> list[tuple[Passage, Detail, bool, bool]]:
        """Details that stand in an answer and not in its prompt; and whether the base and the tuned model say them."""
        return [
            (passage, detail, says(before.text, detail), says(after.text, detail))
            for passage, before, after in zip(self.passages, self.base, self.tuned, strict=True)
            for detail in details_of(passage.answer)
            if detail not in common and not says(passage.prompt, detail)
        ]


def memorisation_summary(
    sample: Probed, personal: Probed, held_out: Probed, *, window: int, confidence: float
) -> dict[str, Any]:
    """What the report says.

    Args:
        sample: training rows drawn at random.
        personal: further training rows, drawn because their answers hold details.
        held_out: rows that were not trained on.
        window: tokens of an answer that could be compared.
        confidence: coverage of the intervals.

    Returns:
        `status`, `trained` and `held_out` (see `Probed.counts`), `difference` (`value`, `low`, `high`: of the shares of
        answers that tuning made come back; None where one side has no rows), `details` (for each kind `held`, `tuned`,
        `base`, `learned`, and `held_out` alike), `examples` (sources), `warnings`, `sentence`, and `remark` for the
        verdict (None where there is nothing to warn of).
    """
    trained, others = sample.counts(), held_out.counts()
    difference = None
    if trained["rows"] and others["rows"]:
        pairs = [(counts["learned"], counts["rows"]) for counts in (trained, others)]
        low, high = difference_of_shares(pairs[0], pairs[1], confidence)
        value = pairs[0][0] / pairs[0][1] - pairs[1][0] / pairs[1][1]
        difference = {"value": value, "low": low, "high": high}
    # What held-out rows hold too is common knowledge of the task, such as the address of the help desk.
    common = frozenset(
        detail
        for passage in held_out.passages
        for text in (passage.prompt, passage.answer)
        for detail in details_of(text)
    )
    of_trained = [*sample.details(common), *personal.details(common)]
    of_others = held_out.details(frozenset())
    details = [_of_kind(kind, of_trained, of_others, confidence) for kind in KINDS]
    warned = _warned_of_answers(trained, others, difference)
    warnings = [*warned, *_warned_of_details(details)]
    leaked = [passage.source for passage, detail, old, new in of_trained if new and not old and detail.kind in SURE]
    shown = [*leaked, *sample.learned_sources()] if warnings else []
    remark = None
    if warnings:
        remark = (
            _sentence(trained, others) if warned else f"{len(leaked)} details of training answers come back by heart"
        )
    return {
        "status": "measured",
        "window": window,
        "trained": trained,
        "held_out": others,
        "difference": difference,
        "details": [entry for entry in details if entry["held"]],
        "examples": list(dict.fromkeys(shown))[:EXAMPLES],
        "warnings": warnings,
        "sentence": _sentence(trained, others),
        "remark": remark,
    }


Found = Sequence[tuple[Passage, Detail, bool, bool]]


def _of_kind(kind: Kind, trained: Found, others: Found, confidence: float) -> dict[str, Any]:
    def counted(found: Found) -> dict[str, int]:
        said = [(old, new) for _, detail, old, new in found if detail.kind == kind]
        return {
            "held": len(said),
            "base": sum(old for old, _ in said),
            "tuned": sum(new for _, new in said),
            "learned": sum(new and not old for old, new in said),
        }

    mine, theirs = counted(trained), counted(others)
    beyond = bool(mine["held"] and theirs["held"]) and (
        difference_of_shares((mine["learned"], mine["held"]), (theirs["learned"], theirs["held"]), confidence)[0] > 0
    )
    alarming = mine["learned"] > 0 and (beyond or kind in SURE)
    return {"kind": kind, **mine, "held_out": theirs, "alarming": alarming}


def _sentence(trained: dict[str, int], others: dict[str, int]) -> str:
    if not trained["rows"]:
        return "no training answer is long and rare enough to show whether it was memorised"
    told = f"{trained['nearly']} of {trained['rows']} training answers come back word for word or nearly"
    if trained["base_nearly"]:
        told += f" (from the base {trained['base_nearly']})"
    return f"{told}, {others['nearly']} of {others['rows']} held-out ones" if others["rows"] else told


def _warned_of_answers(
    trained: dict[str, int], others: dict[str, int], difference: dict[str, float] | None
) -> list[str]:
    # Without a held-out answer to compare with, what comes back may be what anybody would say.
    if difference is None or difference["low"] <= 0:
        return []
    return [
        f"memorisation: {_sentence(trained, others)} (of those that the base does not say, difference of the shares "
        f"{difference['value']:+.1%}, interval {difference['low']:+.1%} to {difference['high']:+.1%}); fewer epochs, a "
        "lower rate or more rows let a model keep less"
    ]


def _warned_of_details(details: Sequence[dict[str, Any]]) -> list[str]:
    found = [f"{entry['learned']} of {entry['held']} {entry['kind']}" for entry in details if entry["alarming"]]
    if not found:
        return []
    return [
        f"memorisation: {' and '.join(found)} that stand in training answers, and not in their prompts, come back and "
        "the base does not say them; if they are private, replace them in the data (`tunesmith data check` names rows)"
    ]
