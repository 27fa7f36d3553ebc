"""Balance of classes, where the answers look like labels."""

from __future__ import annotations

from collections import Counter, defaultdict

from tunesmith.data.check.finding import Finding, Instance, agreeing, counted, quoted, share
from tunesmith.data.check.said import Said
from tunesmith.data.check.words import folded

FEW_ROWS = 5
"""Rows below which a class can hardly be learned, or judged when it is held out."""

IMBALANCE = 20.0
MOST_CLASSES = 1_000
LABEL_CHARACTERS, LABEL_WORDS = 50, 5
OUTSIDE = "O"


class LabelBalance:
    """Counts short answers; gives up when they are too many or too different to be labels."""

    def __init__(self) -> None:
        self.training, self.held = Counter[str](), Counter[str]()
        self.spellings: defaultdict[str, set[str]] = defaultdict(set)
        self.first: dict[str, str] = {}
        self.rows, self.long, self.tokens, self.too_many = 0, 0, 0, False

    def add(self, said: Said) -> None:
        if said.kind == "text" or said.rejected is not None:
            return
        self.rows += said.training
        if said.kind == "token labels":
            self.tokens += 1
            for label in said.row.labels:
                if str(label) != OUTSIDE:
                    self._count(said, str(label))
            return
        answer = said.answer
        if len(answer) > LABEL_CHARACTERS or len(answer.split()) > LABEL_WORDS:
            self.long += said.training
        elif not self.too_many:
            self._count(said, answer)

    def _count(self, said: Said, label: str) -> None:
        key = folded(label)
        (self.training if said.training else self.held)[key] += 1
        self.spellings[key].add(label)
        self.first.setdefault(key, str(said.source))
        self.too_many = len(self.training) > MOST_CLASSES

    def classes(self) -> dict[str, int]:
        """Training rows of each label (folded), or nothing when the answers do not look like labels."""
        few = 2 <= len(self.training) <= max(self.rows / 5, 2) and not self.too_many
        looks = self.tokens > 0 or (self.rows >= 20 and few and self.long <= 0.02 * self.rows)
        return dict(self.training) if looks and self.training else {}

    def findings(self) -> list[Finding]:
        classes = self.classes()
        if not classes:
            return []
        found = [self._balance(classes)]
        if unseen := {label: n for label, n in self.held.items() if label not in classes}:
            rows = sum(unseen.values())
            title = (
                f"{counted(len(unseen), 'label')} of the held-out rows {agreeing(len(unseen), 'is', 'are')} never seen "
                f"in training ({counted(rows, 'row')})"
            )
            instances = tuple(Instance(self.first[k], f"{quoted(k)}: {n:,}") for k, n in unseen.items())[:20]
            fix = "add training rows of these labels, or set data.stratify so that every label stands on both sides"
            found.append(Finding("label-balance", "warning", title, rows, sum(self.held.values()), instances, fix))
        if twice := {k: s for k, s in self.spellings.items() if len({x.strip() for x in s}) > 1 and k in classes}:
            rows = sum(classes[k] for k in twice)
            title = f"{counted(len(twice), 'label')} {agreeing(len(twice), 'is', 'are')} written in more than one way"
            instances = tuple(
                Instance(self.first[k], " or ".join(quoted(x) for x in sorted(s))) for k, s in twice.items()
            )[:20]
            fix = "write each label in one way; the model would have to guess which is wanted"
            found.append(Finding("label-balance", "warning", title, rows, self.rows, instances, fix))
        return found

    def _balance(self, classes: dict[str, int]) -> Finding:
        total = sum(classes.values())
        ordered = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
        (most, top), (least, bottom) = ordered[0], ordered[-1]
        rare = [(label, n) for label, n in ordered if n < FEW_ROWS]
        ratio = top / bottom
        name = "label" if self.tokens else "class"
        title = (
            f"{counted(len(classes), name, f'{name}s' if self.tokens else 'classes')}: the largest is "
            f"{quoted(most)} with {share(top, total)}, the smallest {quoted(least)} with {share(bottom, total)} "
            f"(ratio {ratio:.1f})"
        )
        if rare:
            title += f"; {counted(len(rare), 'has', 'have')} fewer than {FEW_ROWS} rows"
        shown = rare or ordered
        instances = tuple(
            Instance(self.first[label], f"{quoted(label)}: {counted(n, 'row')} ({share(n, total)})")
            for label, n in shown
        )[:20]
        level = "warning" if rare or ratio > IMBALANCE else "note"
        fix = (
            "collect more rows of the small classes, and judge by macro F1 rather than accuracy"
            if level == "warning"
            else "nothing to do; a model that always gives the largest class would be right that often"
        )
        rows = sum(n for _, n in rare) if rare else total
        return Finding("label-balance", level, title, rows, total, instances, fix)
