"""What a job starts from when its recipe names a run or an adapter: the model as it was left there.

An adapter is merged once into a copy of its base, which is then the base of the new job. So the reference of a job is
the model as the job began, a new adapter names a base that PEFT finds, and every other part knows plain models only.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress, TunesmithError
from tunesmith.files import file_sha256, read_json
from tunesmith.methods.bottleneck import PEFT_TYPE as BOTTLENECK
from tunesmith.methods.method import read_adapter_config
from tunesmith.methods.prefix import PEFT_TYPE as PREFIX
from tunesmith.methods.prompt import PEFT_TYPE as PROMPT
from tunesmith.models.load import read_config
from tunesmith.pages.page import size
from tunesmith.pipeline.locating import Location, locate, merged_directory
from tunesmith.plan.memory import BYTES
from tunesmith.recipe import Recipe
from tunesmith.resolved import Plan, Resolved
from tunesmith.train.parallel import is_main, wait_for_all

if TYPE_CHECKING:
    from tunesmith.pipeline.planning import Planned

NEVER_MERGED = {
    BOTTLENECK: "a bottleneck adapter",
    PREFIX: "a prefix",
    PROMPT: "a prompt",
    "P_TUNING": "a prompt",
    "MULTITASK_PROMPT_TUNING": "a prompt",
}
"""Kinds of adapters, by PEFT's names, that no weight can become a part of."""

WEIGHTS = "adapter_model.safetensors"


def start_of(recipe: Recipe, progress: Progress) -> Location:
    """What a recipe's model stands for.

    Raises:
        InputError: when it is nowhere, or an adapter that nothing can start from.
    """
    start = locate(recipe.model.path, progress)
    if (start.adapter or start.run) and recipe.model.revision is not None:
        raise InputError(
            "a revision is of a model of the hub, and this is not one", where="model.revision", fix="remove it"
        )
    if start.adapter is None:
        return start
    kind = str(read_adapter_config(start.adapter).get("peft_type"))
    if kind in NEVER_MERGED:
        raise InputError(
            f"{NEVER_MERGED[kind]} cannot be trained on top of: there is no weight that it could become a part of",
            where=f"model.path {recipe.model.path}",
            fix="start from its base, or train the earlier stage with lora",
        )
    if recipe.budget.memory is not None:
        raise InputError(
            "the adapter has to be merged into its base first, which takes the whole model in memory",
            where="budget.memory",
            fix=f"merge it beforehand, `tunesmith merge {recipe.model.path} DIRECTORY`, and name that as model.path",
        )
    return start


def merged_config(config: PreTrainedConfig, start: Location, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration that a model will have when its adapter is merged, as far as a plan must know."""
    if start.adapter is None:
        return config
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):  # merged weights are whole again
        delattr(config, "quantization_config")
    text = config.get_text_config()
    text.vocab_size = max(int(text.vocab_size), max(tokenizer.get_vocab().values()) + 1)
    return config


def with_start_told(plan: Plan, recipe: Recipe, start: Location) -> Plan:
    """The plan with what becomes of an adapter that is started from."""
    if start.adapter is None:
        return plan
    directory = merged_directory(start.adapter, plan.frozen_dtype)
    reason = f"{recipe.model.path} is an adapter: it is merged once into a copy of its base, {size(_bytes(plan))}"
    found = Resolved(name="model.path", value=str(directory), reason=reason)
    notes = list(plan.notes)
    if recipe.model.quantization is not None:
        notes.append(
            f"the adapter of {recipe.model.path} is merged before the weights are quantized, so this job starts close "
            "to where that one ended, not at it; the evaluation of the base shows where"
        )
    return plan.model_copy(update={"resolved": [*plan.resolved, found], "notes": notes})


def _bytes(plan: Plan) -> int:
    """Bytes of the merged copy."""
    return plan.parameters.total * BYTES[plan.frozen_dtype]


def with_merged_start(planned: Planned, progress: Progress) -> Planned:
    """The job with the merged copy as its base, which is made where it is not there yet.

    Raises:
        InputError: when the adapter cannot be merged, has changed since, or there is no room for the copy.
        TunesmithError: when the merged model is not the one that was trained.
    """
    start = planned.start
    if start is None or start.adapter is None:
        return planned
    merged = merged_directory(start.adapter, planned.plan.frozen_dtype)
    if is_main():
        if not merged.is_dir():
            _merge(planned, start.adapter, merged, progress)
        _refuse_changed(start.adapter, merged)
    wait_for_all()
    return replace(planned, location=str(merged), config=read_config(str(merged)))


def _merge(planned: Planned, adapter: Path, merged: Path, progress: Progress) -> None:
    from tunesmith.pipeline.merging import merge_run  # not above: it imports transformers' models
    from tunesmith.plan.hardware import DTYPES

    needed, free = _bytes(planned.plan), shutil.disk_usage(merged.parent).free
    if free < needed:
        raise InputError(
            f"the adapter and its base take {needed / 1e6:,.1f} MB when they are merged, and the disk has "
            f"{free / 1e6:,.1f} MB left",
            where=merged,
            fix="make room",
        )
    spec = planned.recipe.model
    # What is held in 4 bits there may not fit the device whole.
    device = torch.device("cpu") if spec.quantization is not None else planned.hardware.device
    try:
        merge_run(spec.path, merged, progress=progress, dtype=DTYPES[planned.plan.frozen_dtype], device=device)
    except FileExistsError as error:
        if not merged.is_dir():  # another job may have made the same copy meanwhile, which is compared like any other
            raise InputError("there is something else than a merged copy", where=merged, fix="move it away") from error
    except InputError:
        raise
    except TunesmithError as error:  # its update is too small for the dtype's steps
        raise TunesmithError(error.what, where=spec.path, fix="keep its weights in fp32: model.dtype: fp32") from error
    except PermissionError as error:
        raise InputError(
            f"the merged copy of {adapter} cannot be written: {error.strerror}",
            where=merged,
            fix=f"merge it elsewhere, `tunesmith merge {spec.path} DIRECTORY`, and name that as model.path",
        ) from error


def _refuse_changed(adapter: Path, merged: Path) -> None:
    """Raises InputError when a copy was made from another adapter than is there now."""
    try:
        made_from = read_json(merged / "merge.json").get("adapter_sha256")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            "this is not what Tunesmith merged", where=merged, fix="move it away, and it is made again"
        ) from error
    weights = adapter / WEIGHTS
    if not weights.is_file() or made_from != file_sha256(weights):
        raise InputError(
            f"the adapter in {adapter} has changed since it was merged here",
            where=merged,
            fix="copy the new adapter to a directory of its own; what was trained on the old one needs this copy",
        )
