"""`tunesmith merge`: from a run to a plain model that any tool loads, with the proof that it is the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.base import InputError, Progress, TunesmithError, silent
from tunesmith.compose.merge import MergeCheck, merge_and_check
from tunesmith.data.render import Renderer
from tunesmith.files import new_directory, write_json
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.quantized_lora import Base, base_read
from tunesmith.models.load import Loading, load_model, load_tokenizer
from tunesmith.models.quantized import in_full
from tunesmith.models.templates import resolve_template
from tunesmith.pipeline.loaded import default_dtype, renderer_for
from tunesmith.pipeline.locating import Location, locate
from tunesmith.pipeline.merging_labels import merge_labels
from tunesmith.plan.hardware import detect_hardware
from tunesmith.run import BASE_EVALUATION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = 8
SPARE_PROMPTS = (
    "Hello, who are you?",
    "List three colours.",
    "Explain what a function is.",
    "Write one short sentence.",
)


def merge_run(
    path: str,
    out: Path,
    *,
    progress: Progress = silent,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Merged:
    """Merges the adapter of a run (or an adapter's directory) into its base and writes a plain model.

    An adapter that was trained over a quantized base is merged into the base in full precision, except where it makes
    up for the rounding (LoftQ): then into the rounded weights. The merged model is compared with the adapter on
    held-out prompts and must differ from the base. What was done stands in `merge.json` beside the weights.

    Args:
        dtype: of the merged weights (those of a model that judges are merged in fp32); by default what the device
            computes natively.
        device: where they are merged; by default the machine's best.

    Raises:
        InputError: when there is no adapter, or the target exists.
        FileExistsError: when somebody else has made the target meanwhile.
        TunesmithError: when the merged model is not the trained one; nothing is written then.
    """
    location = locate(path, progress)
    if location.adapter is None:
        raise InputError("there is no adapter to merge", where=path, fix="a fully tuned run's model/ is plain already")
    if out.exists():
        raise InputError("this exists already; it is not overwritten", where=out, fix="name a new directory")
    progress("loading the model", 0, None)
    trained_over = _trained_over(location)
    head = location.head
    if head is not None:
        check = merge_labels(location, head, _held_out_prompts(location), out)
        return Merged(check, merging_note(trained_over), "answers")
    how = Loading(
        dtype or default_dtype(),
        device or detect_hardware().device,
        location.revision,
        trained_over.quantized if trained_over.bound else None,
    )
    model, renderer = _adapted(location, how)
    prompts = [renderer.prompt_ids([{"role": "user", "content": text}]) for text in _held_out_prompts(location)]
    progress("merging and comparing", 0, None)
    check = merge_and_check(model, prompts, renderer.stop_ids)
    if not check.passed:
        raise TunesmithError(
            f"the merged model is not the trained one: mean KL {check.mean_kl:.2g} nats to the adapter, "
            f"{check.differs_from_base:.2g} to the base; nothing was written",
            where=path,
            fix="serve the adapter unmerged",
        )
    if model.generation_config is not None:
        model.generation_config.eos_token_id = sorted(renderer.stop_ids)
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        renderer.tokenizer.save_pretrained(directory)
        write_json(directory / "merge.json", {**check.as_json(), **location.merged_from(), **_said_of(trained_over)})
    return Merged(check, merging_note(trained_over))


def _adapted(location: Location, how: Loading) -> tuple[PreTrainedModel, Renderer]:
    """The model with its adapter beside weights that are whole, and the renderer of its prompts."""
    assert location.adapter is not None
    model = in_full(
        load_model(location.base, dtype=how.dtype, device=how.device, revision=how.revision, quantized=how.quantized)
    )
    load_adapter(model, location.adapter)
    tokenizer = load_tokenizer(location.tokenizer)
    plain = location.recipe is not None and location.recipe.data.template == "plain"
    template = resolve_template("plain" if plain else "auto", tokenizer)
    return model, renderer_for(location.base, model, tokenizer, template)


@dataclass(frozen=True)
class Merged:
    """What came of merging.

    Attributes:
        note: what the reader must know when the base was quantized while the adapter was trained.
        compared: what `same_tokens` counts.
    """

    check: MergeCheck
    note: str | None
    compared: str = "greedy tokens"

    def as_json(self) -> dict[str, Any]:
        return {**self.check.as_json(), "note": self.note}


def _trained_over(location: Location) -> Base:
    """What the run, or else the adapter's file, says of the base."""
    assert location.adapter is not None
    said = base_read(location.adapter)
    if said.quantized is None and location.recipe is not None:  # PEFT's layers write no such thing
        return Base(location.recipe.model.quantization)
    return said


def _said_of(trained_over: Base) -> dict[str, Any]:
    quantized = trained_over.quantized
    return {} if quantized is None else {"trained_over": quantized.name, "merged_into_rounded": trained_over.bound}


def merging_note(trained_over: Base) -> str | None:
    if trained_over.quantized is None:
        return None
    name = trained_over.quantized.name
    if trained_over.bound:
        return f"merged into the weights as {name} rounds them, which this adapter was started from"
    return (
        f"trained over a base in {name}, merged into the base in full precision: close to what was trained, not equal; "
        "evaluate the merged model before you rely on it"
    )


def _held_out_prompts(location: Location) -> list[str]:
    """Prompts that the run was judged on; a few plain ones for adapters without a run."""
    run = location.run
    if run is not None and (run.path / BASE_EVALUATION).is_file():
        rows = run.read(BASE_EVALUATION)["rows"]
        prompts = [row["prompt"] for row in rows if row["prompt"]][:PROMPTS]
        if prompts:
            return prompts
    return list(SPARE_PROMPTS)
