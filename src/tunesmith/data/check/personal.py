"""Personal data and access keys in the texts: counted and shown masked, never changed."""

from __future__ import annotations

from collections import Counter

from tunesmith.data.check.finding import Finding, Tally, agreeing, counted, share
from tunesmith.data.check.masking import private_parts
from tunesmith.data.check.said import Said

PLURALS = {"e-mail address": "e-mail addresses"}


class PersonalData:
    def __init__(self) -> None:
        self.tally, self.seen, self.sorts = Tally(), 0, Counter[str]()

    def add(self, said: Said) -> None:
        self.seen += 1
        parts = private_parts(said.everything)
        if parts:
            self.sorts.update(part.sort for part in parts)
            more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
            self.tally.add(said.source, f"{parts[0].sort} {parts[0].shown}{more}")

    def findings(self) -> list[Finding]:
        if not self.tally.rows:
            return []
        sorts = ", ".join(counted(n, sort, PLURALS.get(sort, "")) for sort, n in self.sorts.most_common())
        rows = self.tally.rows
        title = (
            f"{counted(rows, 'row')} ({share(rows, self.seen)}) {agreeing(rows, 'holds', 'hold')} what looks like "
            f"personal data or access keys: {sorts}"
        )
        fix = (
            "replace them with invented ones if the model must not learn and repeat them; nothing is changed by itself"
        )
        return [Finding("personal-data", "warning", title, rows, self.seen, tuple(self.tally.instances), fix)]
