"""Answers that say nothing. An answer that looks cut off is not one of them: only the length limit knows that."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter

from tunesmith.data.check.finding import Finding, Instance, Tally, agreeing, counted, quoted, share
from tunesmith.data.check.labels import LabelBalance
from tunesmith.data.check.said import Said
from tunesmith.data.check.words import folded, hash_of, words_of

PLACEHOLDERS = frozenset(
    "todo|tbd|fixme|placeholder|lorem ipsum|insert answer here|your answer here|answer here|answer goes here|write here"
    "|to be filled in|fill me in|xxx|xxxx|<answer>|[answer]|{answer}|<output>|[output]|{output}|<response>|[response]"
    .split("|")
)  # fmt: skip
UNCERTAIN = frozenset("n/a|null|nan|undefined|#n/a|\\n".split("|"))
"""Placeholders in prose, but sometimes a right answer where answers are labels."""

REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence)(?: language)? (?:model|assistant)\b|\bas a (?:large )?language model\b"
    r"|^i(?:'m|’m| am) (?:sorry|afraid),? (?:but )?i (?:can(?:'t|’t|not)|am (?:not able|unable))",
    re.IGNORECASE,
)

SAME_ANSWER_WORDS, SAME_ANSWER_ROWS, SAME_ANSWER_SHARE = 8, 20, 0.05
KNOWN_CLASS = 5
"""Rows that an answer must have in data with labels to count as a label whatever it looks like."""


class Degenerate:
    """Finds them row by row; what only the whole data can tell (is "N/A" a label?) is decided at the end."""

    def __init__(self, labels: LabelBalance) -> None:
        self.labels = labels
        self.seen = 0
        self.sure: list[tuple[int, Instance]] = []
        self.reasons = Counter[str]()
        self.drop = array("q")
        self.unsure: dict[str, tuple[str, Tally, array[int]]] = {}
        self.refusals = Tally()
        self.long_answers = Counter[int]()
        self.examples: dict[int, Instance] = {}

    def add(self, said: Said) -> None:
        if said.kind != "conversation" or said.row.messages[-1].get("tool_calls"):
            return
        self.seen += 1
        answer = said.answer.strip()
        if not answer:
            return
        if refuses(answer):
            self.refusals.add(said.source, "" if self.refusals.full else quoted(answer))
        if len(answer) <= 30 and (reason := unsure_reason(answer)):
            self._hold(said, reason, answer)
        elif reason := sure_reason(said, answer):
            self.reasons[reason] += 1
            if len(self.sure) < 20:
                self.sure.append((said.number, Instance(str(said.source), f"{reason}: {quoted(answer)}")))
            if said.training:
                self.drop.append(said.number)
        if len(answer) > 40:
            self._remember(said, answer)

    def _hold(self, said: Said, reason: str, answer: str) -> None:
        _, tally, numbers = self.unsure.setdefault(folded(answer), (reason, Tally(), array("q")))
        tally.add(said.source, f"{reason}: {quoted(answer)}")
        numbers.append(said.number if said.training else -1)

    def _remember(self, said: Said, answer: str) -> None:
        """Counts long answers; when there are too many different ones, those seen once so far are forgotten."""
        key = hash_of(folded(answer))
        self.long_answers[key] += 1
        if self.long_answers[key] == 2:
            self.examples[key] = Instance(str(said.source), quoted(answer))
        if len(self.long_answers) > 200_000:
            self.long_answers = Counter({k: n for k, n in self.long_answers.items() if n > 1 + self.seen // 50_000})

    def _decided(self) -> list[tuple[str, Tally, array[int]]]:
        """Held answers that are no labels."""
        classes = self.labels.classes()
        return [entry for answer, entry in self.unsure.items() if classes.get(answer, 0) < KNOWN_CLASS]

    def flagged(self) -> list[int]:
        return sorted({*self.drop, *(n for _, _, numbers in self._decided() for n in numbers if n >= 0)})

    def findings(self) -> list[Finding]:
        found = [self._degenerate(), self._repeated(), self._refusals()]
        return [finding for finding in found if finding]

    def _degenerate(self) -> Finding | None:
        reasons, instances = Counter(self.reasons), [instance for _, instance in self.sure]
        for reason, tally, _ in self._decided():
            reasons[reason] += tally.rows
            instances += tally.instances
        rows = sum(reasons.values())
        if not rows:
            return None
        what = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
        title = f"{counted(rows, 'answer')} ({share(rows, self.seen)}) {agreeing(rows, 'says', 'say')} nothing: {what}"
        fix = "`tunesmith data check --fix OUT` drops these rows; or give them real answers"
        return Finding("degenerate-answers", "problem", title, rows, self.seen, tuple(instances[:20]), fix)

    def _repeated(self) -> Finding | None:
        enough = max(SAME_ANSWER_ROWS, SAME_ANSWER_SHARE * self.seen)
        often = {key: n for key, n in self.long_answers.items() if n >= enough and key in self.examples}
        if not often:
            return None
        rows = sum(often.values())
        instances = tuple(
            Instance(self.examples[key].source, f"{n:,} times {self.examples[key].what}")
            for key, n in sorted(often.items(), key=lambda item: (-item[1], item[0]))
        )[:20]
        title = (
            f"{counted(len(often), 'long answer')} {agreeing(len(often), 'stands', 'stand')} word for word in "
            f"{counted(rows, 'row')} ({share(rows, self.seen)})"
        )
        fix = (
            "a model learns to give this answer to everything; keep a few of these rows, unless it is a wanted refusal"
        )
        return Finding("repeated-answer", "warning", title, rows, self.seen, instances, fix)

    def _refusals(self) -> Finding | None:
        rows = self.refusals.rows
        if not rows:
            return None
        verbs = agreeing(rows, "refuses or speaks", "refuse or speak")
        title = f"{counted(rows, 'answer')} ({share(rows, self.seen)}) {verbs} as an AI model"
        fix = "drop them unless refusing is what the model should learn; they often come from another model's answers"
        return Finding("refusals", "note", title, rows, self.seen, tuple(self.refusals.instances), fix)


def refuses(answer: str) -> bool:
    """Whether an answer begins with an apology, or speaks of itself as a model, in its first 400 characters."""
    beginning = answer[:400].lower()
    likely = any(map(beginning.__contains__, ("as an ai", "as a language", "as a large", "as an artif")))
    return bool((likely or beginning.startswith("i")) and REFUSAL.search(beginning))


def unsure_reason(answer: str) -> str | None:
    """Why a short answer says nothing, if it is no label."""
    if answer.casefold().strip(" .!*_\"'`") in UNCERTAIN:
        return "only a placeholder"
    if all(c.isspace() or unicodedata.category(c)[0] == "P" for c in answer):
        return "only punctuation"
    return None


def sure_reason(said: Said, answer: str) -> str | None:
    """Why an answer says nothing, whatever the other rows are."""
    if len(answer) <= 40 and answer.casefold().strip(" .!:;*_\"'`") in PLACEHOLDERS:
        return "only a placeholder"
    if all(c.isspace() or unicodedata.category(c)[0] == "P" for c in answer[:200]) and not any(
        map(str.isalnum, answer)
    ):
        return "only punctuation"
    if said.bare and len(answer) >= 20 and len(answer.split()) >= 4 and folded(answer) == folded(said.question):
        return "the same as its prompt"
    return "one thing over and over" if repeats(answer) else None


def repeats(answer: str) -> bool:
    """Whether most of a text is one word or a run of up to eight words, repeated without a break.

    Numbers may repeat (a matrix, a bit string), and lines of code and tables have other words between.
    """
    if (
        len(answer) >= 24
        and re.fullmatch(r"\s*(\D{1,3}?)\1{15,}.{0,2}", answer, re.DOTALL)
        and answer.strip()[0].isalpha()
    ):
        return True
    if len(answer) < 24:
        return False
    rough = answer.split()
    if len(rough) >= 10 and len(set(rough)) > 0.5 * len(rough) + 4:
        return False
    words = words_of(answer)
    if len(words) < 10 or len(set(words)) > 0.4 * len(words) + 2:
        return False
    for n in range(1, 9):
        longest, run, start = 0, 0, 0
        for i in range(n, len(words)):
            run = run + 1 if words[i] == words[i - n] else 0
            if run > longest:
                longest, start = run, i
        covered = longest + n
        unit = words[max(start - n + 1, 0) : start + 1]
        if longest >= max(6, 3 * n) and covered >= 0.6 * len(words) and any(w.isalpha() and len(w) > 1 for w in unit):
            return True
    return False
