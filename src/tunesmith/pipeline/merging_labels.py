"""Merging the adapter of a model that judges, with the proof that it judges as before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.base import TunesmithError
from tunesmith.batch import Example, pack
from tunesmith.compose.merge import MergeCheck
from tunesmith.files import new_directory, write_json
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.models.load import Loading, load_judge, load_tokenizer
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives import TaskObjective
from tunesmith.pipeline.labeller import Labeller
from tunesmith.pipeline.locating import Location
from tunesmith.plan.hardware import detect_hardware

CLOSE = 1e-5
"""Mean difference of outputs, in nats or squared units, that fp32 leaves between an adapter and its merged form."""


def merge_labels(location: Location, head: TaskHead, texts: Sequence[str], out: Path) -> MergeCheck:
    """Merges in fp32 into the unquantized base, and writes a plain model with its head.

    Raises:
        InputError: when the method cannot be merged.
        TunesmithError: when the merged model judges otherwise than the trained one; nothing is written then.
    """
    assert location.adapter is not None
    how = Loading(torch.float32, detect_hardware().device, location.revision)
    model, settled, *_ = load_judge(location.base, head, how)
    load_adapter(model, location.adapter)
    tokenizer = load_tokenizer(location.tokenizer, writes=False)
    labeller = Labeller.of(model.eval(), settled, tokenizer)
    examples = labeller.rendered(texts)
    before = _outputs(labeller, examples)
    with without_adapter(model):
        of_base = _outputs(labeller, examples)
    layers = merge_layers(model)
    after = _outputs(labeller, examples)
    objective = labeller.objective
    apart, moved = _difference(objective, before, after), _difference(objective, of_base, after)
    same = [_same(objective, a, b) for a, b in zip(before, after, strict=True)]
    largest = float((torch.cat(list(before)) - torch.cat(list(after))).abs().max())
    passed = apart < CLOSE and moved > apart
    check = MergeCheck(layers, len(texts), apart, largest, sum(same) / len(same), moved, passed)
    if not passed:
        raise TunesmithError(
            f"the merged model does not judge as the trained one: mean difference {apart:.2g} to the adapter, "
            f"{moved:.2g} to the base; nothing was written",
            where=location.adapter,
            fix="use the adapter unmerged",
        )
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        settled.write(directory)
        write_json(directory / "merge.json", {**check.as_json(), **location.merged_from()})
    return check


def _outputs(labeller: Labeller, examples: Sequence[Example]) -> list[Tensor]:
    """The head's outputs for each text, fp32 ``[targets, labels]``."""
    device = next(labeller.model.parameters()).device
    with torch.no_grad():
        return [
            labeller.objective.outputs(labeller.model, pack([example], "padded").to(device)).cpu()
            for example in examples
        ]


def _same(objective: TaskObjective, one: Tensor, other: Tensor) -> bool:
    if objective.task_head().problem == "regression":
        return torch.allclose(one, other, atol=1e-4)
    return objective.answer(one) == objective.answer(other)


def _difference(objective: TaskObjective, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean KL divergence of the labels' distributions in nats; of numbers and several labels the mean square."""
    first, second = torch.cat(list(one)), torch.cat(list(other))
    if objective.task_head().problem != "single_label_classification":
        return float((first - second).square().mean())
    return float(F.kl_div(second.log_softmax(1), first.log_softmax(1), log_target=True, reduction="batchmean"))
