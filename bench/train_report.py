"""What `train_speed.py` found, as text and as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from turns import Side, Turn

OURS, DEFAULT, BEST, GEMM = "tunesmith", "trl-default", "trl-best", "gemm"
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """A number from every alternation: its median, and the smallest and largest."""

    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> list[float]:
        return [min(self.values), max(self.values)]

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.2f} ({low:.2f} … {high:.2f})"


@dataclass(frozen=True)
class Result:
    """One group's measurements.

    Attributes:
        shape: sizes of the model; ``tokens`` and ``targets`` of an average step.
        sides: by name, each with all of its turns.
        best: which settings of TRL are compared as its best.
        tried: targets a second of each of TRL's settings that were tried for that, one after the other.
    """

    group: str
    method: str
    warmup: int
    shape: dict[str, Any]
    sides: dict[str, Side]
    best: str | None
    tried: dict[str, float]

    def turns(self, side: str) -> list[Turn]:
        """The turns after the warm-up."""
        return self.sides[side].turns[1:]

    def rate(self, side: str, what: str = "targets") -> Measured:
        """Targets or tokens a second."""
        return Measured([turn.total(what) / turn.seconds for turn in self.turns(side)])

    def step_seconds(self, side: str) -> Measured:
        return Measured([turn.seconds / len(turn.steps) for turn in self.turns(side)])

    def ratio(self, other: str) -> Measured:
        """How many times more targets a second than the other side, in each alternation."""
        return Measured(
            [a / b for a, b in zip(self.rate(OURS).values, self.rate(other).values, strict=True)],
        )

    def peak_bytes(self, side: str) -> int:
        return self.sides[side].turns[-1].peak_bytes

    def memory_ratio(self, other: str) -> float:
        """Our peak memory as a share of the other side's."""
        return self.peak_bytes(OURS) / self.peak_bytes(other)

    def losses(self, side: str) -> list[float]:
        return [step["loss"] for turn in self.sides[side].turns for step in turn.steps]

    def loss_difference(self, other: str, side: str = OURS) -> float:
        """The largest difference between two loss curves, over every step that both sides took."""
        return max(abs(a - b) for a, b in zip(self.losses(side), self.losses(other), strict=False))

    def same_rows(self, other: str, side: str = OURS) -> bool:
        """Whether two sides saw the same targets in every step; packing puts other rows together."""
        first, second = (
            [step["targets"] for turn in self.sides[name].turns for step in turn.steps] for name in (side, other)
        )
        return first == second

    @property
    def others(self) -> list[str]:
        return [name for name in (DEFAULT, BEST) if name in self.sides]

    def useful_operations(self, turn: Turn) -> float:
        """4 per frozen weight and token, 6 per trained one, the head on targets; no attention, nothing recomputed."""
        tokens, targets, shape = turn.total("tokens"), turn.total("targets"), self.shape
        if self.method == "full":
            return 6 * (tokens * shape["linear_weights"] + targets * shape["head_weights"])
        frozen = tokens * shape["linear_weights"] + targets * shape["head_weights"]
        return 4 * frozen + 6 * tokens * shape["trainable"]

    def gemm_rate(self) -> Measured:
        return Measured([turn.steps[0]["best"] for turn in self.turns(GEMM)])

    def gemm_fraction(self, side: str) -> Measured:
        """Useful operations a second over the rate of the best matrix product, both of the same alternation."""
        rates = self.gemm_rate().values
        return Measured(
            [
                self.useful_operations(turn) / turn.seconds / rate
                for turn, rate in zip(self.turns(side), rates, strict=True)
            ]
        )


def head(about: dict[str, Any]) -> str:
    """What was measured on, and with what."""
    machine, versions = about["machine"], about["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{machine['processor']}, {machine['cores']} cores; {named}\n"
        "Medians over alternations, in brackets the smallest and the largest."
    )


def as_text(result: Result) -> str:
    shape, count = result.shape, len(result.turns(OURS))
    steps = len(result.turns(OURS)[0].steps)
    average = f"{shape['tokens']} tokens and {shape['targets']} targets a step"
    lines = [
        f"\n## {result.group}\n",
        f"{count} alternations of {steps} steps, {result.warmup} warm-up steps of each side left out; "
        f"about {average}, {shape['trainable']:,} trained weights.",
        "",
        "| side | s a step | targets/s | tokens/s | of the GEMM rate | peak memory | first loss | warm-up s |",
        "|---|---|---|---|---|---|---|---|",
        *(_side_line(result, side) for side in (*result.others, OURS)),
        "",
    ]
    for other in result.others:
        ratio, memory = result.ratio(other), result.memory_ratio(other)
        same = "" if result.same_rows(other) else ", which had other rows in its steps"
        lines.append(
            f"Over {other}: {ratio} × the targets a second, {memory:.2f} of its peak memory; the loss differs by "
            f"{result.loss_difference(other):.4f} at most{same}."
        )
    if BEST in result.sides and result.same_rows(BEST, DEFAULT):
        lines.append(f"TRL's own two loss curves differ by {result.loss_difference(BEST, DEFAULT):.4f} at most.")
    rate = result.gemm_rate()
    gemm = result.turns(GEMM)[-1].steps[0]
    lines += ["", f"GEMM: {rate.median / 1e12:.2f} TFLOP/s, the best of these shapes ({gemm['layer']}):", gemm["table"]]
    return "\n".join([*lines, "", *_settings_lines(result)])


def _side_line(result: Result, side: str) -> str:
    cells = [
        side,
        str(result.step_seconds(side)),
        f"{result.rate(side).median:.1f}",
        f"{result.rate(side, 'tokens').median:.0f}",
        f"{result.gemm_fraction(side).median:.1%}",
        f"{result.peak_bytes(side) / GIB:.2f} GiB",
        f"{result.losses(side)[0]:.5f}",
        f"{result.sides[side].turns[0].seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _settings_lines(result: Result) -> list[str]:
    lines = []
    own = result.sides[DEFAULT].facts["own_rendering"]
    found = ", ".join(f"{what} in {rows} rows" for what, rows in own["differences"].items()) or "the same targets"
    lines.append(
        f"TRL's own rendering of the {own['rows']} rows has the same token ids in {own['same_ids']}; {found}. "
        "Both sides are given Tunesmith's ids and targets."
    )
    if result.best is not None:
        tried = ", ".join(f"{name} {rate:.1f}" for name, rate in result.tried.items())
        how = f"targets/s when tried: {tried}" if tried else "taken without trying others, which a full run does"
        lines.append(f"{BEST} is: {result.best} ({how}).")
    for side in result.others:
        facts = result.sides[side].facts
        lines.append(
            f"{side}: weights {', '.join(facts['dtypes'])}; attention {facts['attention']}; {facts['trainable']:,} "
            f"trained weights; settings in full: {json.dumps(facts['settings'], default=str)}"
        )
    lines.append(f"{OURS}: plan: {json.dumps(result.sides[OURS].facts['plan'])}")
    return lines


def as_json(results: list[Result], about: dict[str, Any]) -> dict[str, Any]:
    """The numbers of LoRA in bf16 at the top, those of every group below `groups`."""
    found: dict[str, Any] = {}
    for result in results:
        short = "" if result.group == "lora-bf16" else "_" + result.group.replace("-", "_")
        for other in result.others:
            ratio, name = result.ratio(other), other.replace("-", "_")
            found[f"ratio_{name}{short}"] = ratio.median
            found[f"ratio_{name}{short}_spread"] = ratio.spread
        found[f"memory_ratio{short}"] = result.memory_ratio(DEFAULT)
        found[f"gemm_fraction{short}"] = result.gemm_fraction(OURS).median
        found[f"gemm_fraction{short}_spread"] = result.gemm_fraction(OURS).spread
        found[f"loss_difference{short}"] = result.loss_difference(DEFAULT)
    return {**found, **about, "groups": {result.group: _group_json(result) for result in results}}


def _group_json(result: Result) -> dict[str, Any]:
    sides = {}
    for side in (*result.others, OURS):
        sides[side] = {
            "step_seconds": result.step_seconds(side).values,
            "targets_per_second": result.rate(side).median,
            "tokens_per_second": result.rate(side, "tokens").median,
            "peak_bytes": result.peak_bytes(side),
            "gemm_fraction": result.gemm_fraction(side).median,
            "losses": result.losses(side),
            "facts": result.sides[side].facts,
        }
    rate = result.gemm_rate()
    return {
        "sides": sides,
        "memory_ratios": {other: result.memory_ratio(other) for other in result.others},
        "loss_differences": {other: result.loss_difference(other) for other in result.others},
        "trl_best": result.best,
        "trl_tried": result.tried,
        "gemm_flops_per_second": rate.median,
        "gemm_flops_per_second_spread": rate.spread,
        "tokens": result.shape["tokens"],
        "targets": result.shape["targets"],
        "warmup_steps": result.warmup,
    }
