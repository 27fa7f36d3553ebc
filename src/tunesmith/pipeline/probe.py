"""A linear head on frozen features closes with an exact solver, where its loss is convex."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.base import Progress
from tunesmith.data.stored import RenderedRows
from tunesmith.methods import HeadOnly
from tunesmith.models.task_head import HEADS, head_modules
from tunesmith.objectives import Classify, Regress, Reward, TaskObjective
from tunesmith.objectives.task import FEATURES
from tunesmith.pipeline.planning import Planned

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the L2 penalty that are tried in turn until the loss on rows held back rises again, on
features scaled to a mean square of 1 and losses averaged over rows."""
HELD_BACK = 0.1
MOST_VALUES = 2**28
"""Features beyond which solving would take more memory than training."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class _Data:
    """Features ``[n, width]`` in fp32, labels ``[n]``, and how much each target counts."""

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def some(self, chosen: np.ndarray) -> _Data:
        return _Data(self.features[chosen], self.labels[chosen], self.weights[chosen])


def obstacle(planned: Planned, model: nn.Module) -> str | None:
    """Why the exact solver cannot close a job, or None when it can."""
    method, objective = planned.recipe.method, planned.judges
    if not isinstance(method, HeadOnly) or method.solver != "auto":
        return "it was not asked for"
    if (
        objective is None
        or isinstance(objective, Reward)
        or (isinstance(objective, Classify) and objective.multi_label)
    ):
        return "the loss is none that a solver for labels or numbers minimises"
    if getattr(objective, "label_smoothing", 0.0):
        return "labels are smoothed"
    if head_modules(model) not in ([name] for name in HEADS) or not isinstance(_layer(model), nn.Linear):
        return "the head is more than one linear layer"
    prepared = planned.prepared
    if prepared is None or int(prepared.train.targets.sum()) * _layer(model).in_features > MOST_VALUES:
        return "there are too many features to hold at once"
    return None


def close(planned: Planned, model: nn.Module, progress: Progress) -> Figures:
    """Solves for the head and keeps it where it does better than gradient steps on rows held back from the solving.

    Returns:
        ``penalty``, the mean loss on those rows of both (``solver``, ``gradient``), and which was ``kept``.
    """
    objective, prepared = planned.judges, planned.prepared
    assert objective is not None and prepared is not None
    train = _gathered(prepared.train, objective)
    if len(prepared.validation):
        fitted, held = train, _gathered(prepared.validation, objective)
    else:
        order = np.random.default_rng(planned.recipe.seed).permutation(len(train.labels))
        cut = max(1, round(HELD_BACK * len(order)))
        fitted, held = train.some(order[cut:]), train.some(order[:cut])
    layer, scale = _layer(model), float(np.sqrt(np.mean(train.features**2)) or 1.0)
    solver = _Ridge(layer) if isinstance(objective, Regress) else _Logistic(layer)
    losses = list[float]()
    before = _loss(objective, held, layer.weight.detach().double().cpu().numpy(), _bias(layer))
    for at, penalty in enumerate(PENALTIES):
        progress("solving for the head", at, len(PENALTIES) + 1)
        losses.append(_loss(objective, held, *solver.solved(fitted, penalty, scale)))
        if losses[-1] > min(losses):
            break
    best = int(np.argmin(losses))
    figures = {"penalty": PENALTIES[best], "solver": losses[best], "gradient": before, "kept": "gradient"}
    if losses[best] < before:
        progress("solving for the head", len(PENALTIES), len(PENALTIES) + 1)
        weight, bias = solver.solved(train, PENALTIES[best], scale)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            if layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(bias))
        figures["kept"] = "solver"
    return figures


def _layer(model: nn.Module) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(head_modules(model)[0]))


def _bias(layer: nn.Linear) -> np.ndarray:
    return np.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().double().cpu().numpy()


def _gathered(rows: RenderedRows, objective: TaskObjective) -> _Data:
    tensors = [rows[at].example.tensors for at in range(len(rows))]
    labels = torch.cat([tensor["labels"] for tensor in tensors])
    asked = torch.cat([tensor["target_weights"][tensor["target_weights"] > 0] for tensor in tensors])
    weights = asked.double() * objective.importance(labels)
    features = torch.cat([tensor[FEATURES].float() for tensor in tensors])
    return _Data(features.numpy(), labels.numpy(), weights.numpy())


def _loss(objective: TaskObjective, data: _Data, weight: np.ndarray, bias: np.ndarray) -> float:
    outputs = torch.from_numpy(data.features @ weight.T + bias)
    found: Tensor = objective.losses(outputs, torch.from_numpy(data.labels))
    return float(np.average(found.numpy(), weights=data.weights))


class _Logistic:
    """Multinomial logistic regression; each solution starts from the one before."""

    def __init__(self, layer: nn.Linear) -> None:
        from sklearn.linear_model import LogisticRegression

        self.layer = layer
        self.solver = LogisticRegression(fit_intercept=layer.bias is not None, max_iter=100, warm_start=True)

    def solved(self, data: _Data, penalty: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Weight ``[labels, width]`` and bias ``[labels]``."""
        solver, layer = self.solver, self.layer
        solver.set_params(C=1 / (penalty * data.weights.sum()))
        if hasattr(solver, "classes_") and len(solver.classes_) != len(np.unique(data.labels)):
            del solver.coef_  # other rows may have labels that the first ones lacked
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what has not quite converged is judged like the rest
            solver.fit(data.features / np.float32(scale), data.labels, sample_weight=data.weights)
        weight, bias = np.zeros((layer.out_features, layer.in_features)), np.full(layer.out_features, -30.0)
        found = solver.coef_ / scale
        offset = np.broadcast_to(solver.intercept_, len(found))
        if len(solver.classes_) == 2:  # scikit-learn keeps the difference of the two alone
            found, offset = np.concatenate([-found, found]) / 2, np.concatenate([-offset, offset]) / 2
        weight[solver.classes_], bias[solver.classes_] = found, offset
        return weight, bias if layer.bias is not None else np.zeros(layer.out_features)


class _Ridge:
    """Ridge regression."""

    def __init__(self, layer: nn.Linear) -> None:
        from sklearn.linear_model import Ridge

        self.solver = Ridge(fit_intercept=layer.bias is not None)

    def solved(self, data: _Data, penalty: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Weight ``[1, width]`` and bias ``[1]``."""
        self.solver.set_params(alpha=penalty * data.weights.sum())
        self.solver.fit(data.features.astype(np.float64) / scale, data.labels, sample_weight=data.weights)
        return np.atleast_2d(self.solver.coef_) / scale, np.atleast_1d(self.solver.intercept_).astype(float)
