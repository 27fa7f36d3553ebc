"""The result of training, written as a whole or not at all, after a last look at the weights."""

from __future__ import annotations

from dataclasses import replace

from safetensors import SafetensorError
from safetensors.torch import save_file

from tunesmith.base import TrainingError, TunesmithError
from tunesmith.data.render_labelled import LabelRenderer
from tunesmith.files import committed_directory
from tunesmith.methods.low_rank import lora_layers
from tunesmith.methods.token_rows import trained_token_ids
from tunesmith.models.streamed import parts_in_memory
from tunesmith.models.task_head import head_modules
from tunesmith.models.value_head import take_value_head
from tunesmith.pipeline.work import Work
from tunesmith.train.health import refuse_dead_weights

VALUE_HEAD, HEAD_FILE = "value_head", "head.safetensors"
"""Where a run keeps the value head of PPO."""


def commit_result(work: Work) -> None:
    """Writes `adapter/` or `model/` with the tokenizer that belongs to it, after a last look at the weights.

    Raises:
        TrainingError: when the weights are not finite or beyond all measure, or an adapter changes nothing.
        TunesmithError: when there is no room for it.
    """
    method, model = work.planned.recipe.method, work.model
    if (head := take_value_head(model)) is not None:  # what judged the answers is no part of what writes them
        with committed_directory(work.run.path / VALUE_HEAD) as directory:
            save_file(
                {name: weight.detach().cpu() for name, weight in head.state_dict().items()}, directory / HEAD_FILE
            )
    trained = method.trained_tensors(model)
    refuse_dead_weights(trained, starting_at_zero=method.saved_as == "adapter")
    _refuse_unseen_update(work)
    tokenizer, renderer, prepared = work.planned.tokenizer, work.planned.renderer, work.planned.prepared
    assert tokenizer is not None and renderer is not None and prepared is not None
    if getattr(model, "generation_config", None) is not None and prepared.stop_ids:
        model.generation_config.eos_token_id = sorted(prepared.stop_ids)
    final = work.run.path / method.saved_as
    try:
        with committed_directory(final) as directory:
            method.save(model, directory, base=work.planned.location)
            writer = renderer.conversation if isinstance(renderer, LabelRenderer) else renderer
            if writer is not None and writer.template.jinja is not None:
                tokenizer.chat_template = writer.template.jinja
            tokenizer.save_pretrained(directory)
            if work.planned.judges is not None:
                asks = "text" if writer is None else "conversation"
                replace(work.planned.judges.task_head(), asks=asks).write(directory)
    except SafetensorError as error:  # what safetensors raises for a disk that is full
        raise TunesmithError(
            f"the result cannot be written: {error}; the checkpoints are whole",
            where=final,
            fix="make room, then continue with --resume",
        ) from error


def _refuse_unseen_update(work: Work) -> None:
    """Raises TrainingError when every update of an adapter is too small to change the weights it is added to."""
    whole = getattr(work.planned.recipe.method, "modules_to_save", []) or head_modules(work.model)
    whole = whole or trained_token_ids(work.model)
    with parts_in_memory(work.model) as parts:
        found = (layer for part in parts for layer in lora_layers(part).values())
        seen = next((True for layer in found if layer.is_seen()), False)
    if lora_layers(work.model) and not whole and not seen:
        raise TrainingError(
            "the adapter is dead: its updates are smaller than what the base's weights can hold",
            fix="raise train.learning_rate or train.steps",
        )
