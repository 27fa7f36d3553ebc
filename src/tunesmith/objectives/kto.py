"""Kahneman-Tversky optimization: single answers of which it is known whether they are good (Ethayarajh et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from tunesmith.batch import Batch, without_segments
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.preference import REFERENCE, Preference, which_answer

BASELINE, DESIRABLE = "baseline", "desirable"
"""Names of tensors with one entry a row: the baseline in nats, and 1 for a good answer, 0 for a bad one."""


class Kto(Preference):
    """Every row holds a prompt, its answer, and behind the same prompt the answer of another row.

    What the model makes of the other rows' answers says how far it has moved altogether: the baseline against which an
    answer is good or bad.
    """

    kind: Literal["kto"] = "kto"
    """Make good answers likelier and bad ones less likely, without pairs (Ethayarajh et al. 2024, equation 8)."""
    beta: PositiveFloat = 0.1
    """How much moving away from the reference costs."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of good answers. The paper asks for `desirable_weight` times the number of good rows to be 1 to 4/3 times
    as much as `undesirable_weight` times the number of bad rows (section 4.2)."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of bad answers."""

    default_rate: ClassVar[float] = 0.25
    terms: ClassVar[tuple[str, ...]] = ("rows",)

    @property
    def uses_reference(self) -> bool:
        return True

    def prepare(self, model: nn.Module, window: Sequence[Batch]) -> Sequence[Batch]:
        """Measures the baseline over the step, in training over all processes; leaves other rows' answers away."""
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in window:
                others = _without_answers(batch, own=True)
                ratios = token_logps(model, others).logps - others.tensors[REFERENCE]
                total += torch.tensor([float(ratios.double().sum()), others.tensors[DESIRABLE].numel()])
        # Validation runs on one process alone, and would wait for the others for ever.
        if model.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            device = window[0].token_ids.device if window else torch.device("cpu")
            total = total.to(device)
            torch.distributed.all_reduce(total)
        baseline = max(0.0, float(total[0]) / max(1.0, float(total[1])))
        return [_with_baseline(_without_answers(batch, own=False), baseline) for batch in window]

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"rows": torch.tensor(batch.tensors[DESIRABLE].numel(), dtype=torch.float64)}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ratios = token_logps(model, batch).logps - batch.tensors[REFERENCE]
        rows = batch.tensors[DESIRABLE].numel()
        moved = torch.zeros(rows, device=ratios.device).index_add(0, which_answer(batch), ratios)
        return {"rows": self.losses(moved, batch.tensors[DESIRABLE], batch.tensors[BASELINE]).sum()}

    def losses(self, moved: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        """The loss of each row, fp32 ``[rows]``.

        Args:
            moved: log-likelihood of each answer against the reference, in nats.
            desirable: 1 for good answers, 0 for bad ones.
            baseline: of the whole step, one for each row.
        """
        sign = 2 * desirable - 1
        value = torch.sigmoid(self.beta * sign * (moved - baseline))
        weight = torch.where(desirable > 0, self.desirable_weight, self.undesirable_weight)
        return weight * (1 - value)


def _with_baseline(batch: Batch, baseline: float) -> Batch:
    rows = torch.full_like(batch.tensors[DESIRABLE], baseline)
    return replace(batch, tensors={**batch.tensors, BASELINE: rows}, scopes={**batch.scopes, BASELINE: "row"})


def _without_answers(batch: Batch, *, own: bool) -> Batch:
    """The batch without the rows' own answers, or without those of other rows, which stand behind them."""
    which, places = which_answer(batch), torch.nonzero(batch.tensors["target_weights"] > 0).squeeze(1)
    left_out = places[which % 2 == (0 if own else 1)].cpu()
    starts = batch.segments[:, 0].contiguous()
    return without_segments(batch, set((torch.searchsorted(starts, left_out, right=True) - 1).tolist()))
