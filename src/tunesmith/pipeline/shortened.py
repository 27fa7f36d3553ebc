"""Copies of a job's model with few of its blocks and made-up weights, and what a job does with them again and again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.base import silent
from tunesmith.batch import Batch
from tunesmith.engine.generate import Sampling, generate
from tunesmith.methods import trainable_parameters
from tunesmith.models.task_head import model_class
from tunesmith.objectives import Supervised, TaskObjective
from tunesmith.pipeline.planning import Planned
from tunesmith.plan.hardware import DTYPES
from tunesmith.train.optim import build_optimizer
from tunesmith.train.parallel import clip_gradients
from tunesmith.train.precision import Precision

LARGE = 2**25
"""Numbers of a large table that are drawn; they come again and again in the rest of it."""


class Shortened:
    """A copy that learns, reads and answers as the job does.

    Attributes:
        rows_answered: rows that are answered at a time; 0 where the job writes no answers.

    Args:
        blocks: how many the copy has.
        batches: micro-batches of the job.
    """

    def __init__(self, planned: Planned, blocks: int, batches: Sequence[Batch]) -> None:
        recipe, plan = planned.recipe, planned.plan
        self.batches = batches
        self.model = copy_of(planned, blocks)
        recipe.method.adapt(self.model)
        if plan.gradient_checkpointing:
            language_model = cast(Any, self.model)
            language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        casts = recipe.method.needs_autocast or plan.dtype != plan.frozen_dtype
        self.precision = Precision(DTYPES[plan.dtype], planned.hardware.device, autocast=casts)
        self.optimizer = build_optimizer(self.model, recipe.train.model_copy(update={"groups": []}), plan.learning_rate)
        self.objective = planned.objective if isinstance(planned.objective, TaskObjective) else Supervised()
        self.parameters = list(trainable_parameters(self.model).values())
        self.accumulates = plan.micro_batch * planned.hardware.processes < recipe.train.batch_size
        self.rows_answered = _rows_answered(planned)
        length = max(1, plan.workload.tokens // max(1, plan.workload.rows))
        ids = batches[0].token_ids.repeat(-(-length * self.rows_answered // max(1, batches[0].tokens)) + 1)
        self.prompts = [ids[at * length : (at + 1) * length].tolist() for at in range(self.rows_answered)]

    def learn(self, batches: Sequence[Batch] | None = None) -> None:
        """A forward and a backward pass over each micro-batch."""
        for batch in batches or self.batches:
            if not self.accumulates:  # then every pass makes its gradients anew, in memory that is new to the process
                self.optimizer.zero_grad(set_to_none=True)
            with self.precision.arithmetic():
                loss = torch.stack(list(self.objective.loss(self.model, batch).values())).sum()
            self.precision.backward(loss)

    def update(self) -> None:
        clip_gradients(self.parameters, 1.0)
        self.optimizer.step()

    def read(self, rows: Batch) -> None:
        with torch.no_grad():
            self.objective.target_logps(self.model, rows)

    def write(self, tokens: int) -> None:
        """Answers of so many tokens to a batch of prompts."""
        sampling = Sampling(tokens, 1.0)  # drawn at random: no guess of the next tokens comes true
        rows = self.rows_answered
        generate(self.model, self.prompts, sampling, stop_ids={-1}, batch_size=rows, progress=silent)


def _rows_answered(planned: Planned) -> int:
    recipe, judged = planned.recipe, None if planned.given is None else planned.given.judged
    if recipe.evaluate == "off" or judged is None or planned.judges is not None or not judged.generates:
        return 0
    return min(recipe.evaluate.batch_size, judged.rows)


def copy_of(planned: Planned, blocks: int | None) -> nn.Module:
    """The model with so many blocks and made-up weights; None is the whole of it, without any."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(planned.config)
    head = None if planned.judges is None else planned.judges.task_head()
    if head is not None:
        config.update(head.settings())
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    text = config.get_text_config()
    if blocks is not None:
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:blocks]
    device = torch.device("meta") if blocks is None else planned.hardware.device
    with torch.device(device), no_init_weights():
        model = model_class(head).from_config(config, dtype=DTYPES[planned.plan.frozen_dtype])
    cast(Any, model).tie_weights()  # which transformers leaves out together with the first values
    if blocks is None:
        return model
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        for weight in model.parameters():
            _fill(weight, generator)
    return model.eval()


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Small numbers, the same again and again in a large table: neither their value nor their kind costs time."""
    if weight.dim() < 2:
        weight.fill_(1.0)
        return
    flat = weight.view(-1)
    first = flat[:LARGE]
    first.uniform_(-0.03, 0.03, generator=generator)
    for at in range(LARGE, len(flat), LARGE):
        piece = flat[at : at + LARGE]
        piece.copy_(first[: len(piece)])
