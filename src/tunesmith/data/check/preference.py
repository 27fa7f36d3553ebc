"""Preference pairs: answers that do not differ, and whether the longer one is simply the chosen one."""

from __future__ import annotations

from tunesmith.data.check.finding import Finding, Tally, agreeing, counted, quoted, share
from tunesmith.data.check.said import Said
from tunesmith.data.check.words import folded


class PreferencePairs:
    def __init__(self) -> None:
        self.pairs, self.longer, self.differ = 0, 0, 0
        self.chosen_words, self.rejected_words = 0, 0
        self.equal = Tally()

    def add(self, said: Said) -> None:
        if said.rejected is None:
            return
        self.pairs += 1
        if folded(said.answer) == folded(said.rejected):
            self.equal.add(said.source, f"chosen and rejected are both {quoted(said.answer)}")
            return
        chosen, rejected = len(said.answer.split()), len(said.rejected.split())
        self.chosen_words += chosen
        self.rejected_words += rejected
        self.differ += chosen != rejected
        self.longer += chosen > rejected

    def findings(self) -> list[Finding]:
        found = []
        if rows := self.equal.rows:
            have = agreeing(rows, "has", "have")
            title = f"{counted(rows, 'pair')} ({share(rows, self.pairs)}) {have} the same chosen and rejected answer"
            fix = "drop these rows: nothing can be learned from a pair without a difference"
            found.append(Finding("preference", "problem", title, rows, self.pairs, tuple(self.equal.instances), fix))
        if self.differ and self.rejected_words:
            ratio = self.chosen_words / self.rejected_words
            title = (
                f"chosen answers are on average {ratio:.2f} times as long as rejected ones (in words); where the "
                f"lengths differ, the longer one is chosen in {share(self.longer, self.differ)}"
            )
            fix = "far from 1 and from 50 %, the model learns length before quality: judge answers of equal length"
            found.append(Finding("preference", "note", title, self.longer, self.differ, (), fix))
        return found
