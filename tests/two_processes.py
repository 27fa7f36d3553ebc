"""Run under torchrun by test_step.py: trains tiny models on this process's share, and leaves what came of it.

Run by hand as one process it does the same, so that both ways go through the same lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD

from policy_rows import random_example
from tiny import random_rows, shake, tiny
from tunesmith.base import Interrupted, silent
from tunesmith.evaluation.answers import mean_nll
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.methods.adapted import without_adapter
from tunesmith.models.sharding import is_sharded, shard, whole
from tunesmith.models.value_head import add_value_head, value_head
from tunesmith.objectives import Grpo, Kto, Policy, Ppo, Supervised
from tunesmith.objectives.kto import DESIRABLE
from tunesmith.objectives.preference import REFERENCE
from tunesmith.recipe import TrainSpec
from tunesmith.train.average import Average
from tunesmith.train.batches import StepBatches
from tunesmith.train.checkpoint import Checkpoints, Saved
from tunesmith.train.loop import Job, Progress, step, train
from tunesmith.train.optim import build_optimizer
from tunesmith.train.parallel import (
    from_main,
    gathered_tensors,
    is_main,
    join_processes,
    leave_processes,
    rank,
    wait_for_all,
)
from tunesmith.train.precision import Precision
from tunesmith.train.rollouts import Drawing, Rollouts

METHODS: dict[str, Any] = {
    "full": Full(),
    "lora": Lora(rank=4),
    "whole": Lora(rank=4, targets="qv", modules_to_save=["embed_tokens"]),
}
LENGTHS = [9, 4, 14, 6, 3, 11, 7]
BATCH_SIZE, MICRO_BATCH = 5, 2  # five rows are three micro-batches, and the two of the last step are one


class Straight:
    """Rows in their order."""

    def rows(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))


class Rows(list[Any]):
    lengths = LENGTHS


def step_batches(packed: bool, even: bool = False, rows: Any = None) -> StepBatches:
    given = random_rows(LENGTHS, weights=(0.5, 1.0, 2.0)) if rows is None else rows
    rows = Rows(SimpleNamespace(example=row) for row in given)
    plan: Any = SimpleNamespace(micro_batch=MICRO_BATCH, packing=packed, streamed_tokens=None)
    order: Any = Straight()
    return StepBatches(rows, order, batch_size=BATCH_SIZE, total_rows=len(LENGTHS), plan=plan, even=even)


class Unreached(nn.Module):
    """A weight that no row reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))


def steps_of(name: str, packed: bool, directory: Path) -> None:
    """Two optimizer steps, the second with rows for one process only."""
    model = tiny(tie_word_embeddings=True)
    METHODS[name].adapt(model)
    shake(model)
    if name == "full":
        model.add_module("unreached", Unreached())
    # Not Adam: it blows up the rounding of gradients near zero to whole steps.
    optimizer = SGD(trainable_parameters(model).values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    batches = step_batches(packed)
    results = [asdict(step(model, Supervised(), optimizer, batches(at), clip=0.5)) for at in (1, 2)]
    stem = f"{name}-{packed}-{rank()}"
    save_file(
        {key: tensor.detach().clone() for key, tensor in METHODS[name].trained_tensors(model).items()},
        directory / f"{stem}.safetensors",
    )
    (directory / f"{stem}.json").write_text(json.dumps(results))


def sharded_steps_of(name: str, packed: bool, directory: Path) -> None:
    """The same two steps with weights spread over the processes, the second after a restart from a checkpoint."""

    def begun() -> Saved:
        model = tiny(tie_word_embeddings=True)
        METHODS[name].adapt(model)
        shake(model)
        if dist.is_initialized():
            shard(model)
            assert is_sharded(model)
        parameters = trainable_parameters(model).values()
        optimizer = SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)
        return Saved(model, METHODS[name], optimizer, Precision(), Average(model, 0.9))

    def taken(saved: Saved, number: int) -> dict[str, Any]:
        batches = step_batches(packed, even=dist.is_initialized())(number)
        found = asdict(step(saved.model, Supervised(), saved.optimizer, batches, clip=0.5))
        average(saved).update()
        return found

    def average(saved: Saved) -> Average:
        assert saved.average is not None
        return saved.average

    first, stem = begun(), f"sharded-{name}-{packed}"
    results = [taken(first, 1)]
    checkpoints, snapshot = Checkpoints(directory / stem, keep=1), first.snapshot()
    if is_main():
        checkpoints.save(Progress(step=1), snapshot, {"cpu": torch.get_rng_state()})
    wait_for_all()
    second = begun()
    checkpoints.restore(1, second)
    results.append(taken(second, 2))
    with average(second).in_place(), whole(second.model):
        logps = mean_nll(second.model, random_rows([5, 8]), packed=packed, progress=silent) if is_main() else None
    results.append({"nll": from_main(logps or 0.0, torch.device("cpu"))})
    snapshot = second.snapshot()
    averaged = {f"average of {key}": tensor for key, tensor in (snapshot.averaged or {}).items()}
    save_file({**snapshot.trained, **averaged}, directory / f"{stem}-{rank()}.safetensors")
    (directory / f"{stem}-{rank()}.json").write_text(json.dumps(results))


def preference_steps(directory: Path) -> None:
    """Two steps of KTO, whose baseline is measured over all rows of a step."""
    model = tiny(tie_word_embeddings=True)
    METHODS["lora"].adapt(model)
    shake(model.train())
    optimizer = SGD(trainable_parameters(model).values(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(2)
    rows = []
    for at, length in enumerate(LENGTHS):
        row = random_example(3, (length, 4), generator)
        reference = torch.randn(length + 4, generator=generator) - 5
        tensors = {REFERENCE: reference, DESIRABLE: torch.tensor([float(at % 3 > 0)])}
        scopes: dict[str, Any] = {**row.scopes, REFERENCE: "target", DESIRABLE: "row"}
        rows.append(replace(row, tensors={**row.tensors, **tensors}, scopes=scopes))
    batches = step_batches(True, rows=rows)
    results = [asdict(step(model, Kto(), optimizer, batches(at), clip=None)) for at in (1, 2)]
    keep(directory / f"kto-{rank()}", METHODS["lora"].trained_tensors(model), results)


def keep(stem: Path, tensors: dict[str, torch.Tensor], results: list[dict[str, Any]]) -> None:
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(results))


POLICIES: dict[str, Any] = {
    "grpo": Grpo.model_validate({"reward": "exact", "group_size": 3, "max_new_tokens": 5, "passes": 2}),
    "ppo": Ppo.model_validate({"reward": "exact", "group_size": 2, "max_new_tokens": 5, "passes": 2, "kl_target": 1}),
}


def policy_steps(name: str, directory: Path) -> None:
    """Three steps on own answers, the second after a restart between two steps that share theirs.

    The third rollout has one prompt only, so that a process is left without any.
    """
    objective: Policy = POLICIES[name]
    model = tiny(tie_word_embeddings=True)
    METHODS["lora"].adapt(model)
    shake(model)
    if objective.has_values:
        add_value_head(model)
    optimizer = SGD(trainable_parameters(model).values(), lr=0.05)
    events: list[dict[str, Any]] = []

    def begun() -> Rollouts:
        items = [
            SimpleNamespace(prompt_ids=[5 + at, 6, 7][: 1 + at % 3], row=SimpleNamespace(source=at)) for at in range(4)
        ]
        rows: Any = PromptRows(items)
        plan: Any = SimpleNamespace(micro_batch=1, packing=True, steps=4)
        tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))
        how = Drawing(
            tokenizer=tokenizer,
            stop_ids=frozenset({2}),
            score=lambda rows, answers: [float(len(answer) % 5) for answer in answers],
            reference=lambda: as_base(model),
            precision=Precision(),
            seed=0,
            batch_size=3,
            total_rows=4,
            stop=lambda: False,
            emit=events.append,
        )
        return Rollouts(model, objective, rows, Straight(), plan, how)  # pyright: ignore

    first = begun()
    results = [asdict(step(model, objective, optimizer, first(1), clip=None))]
    kept = first.tensors() if is_main() else None
    [sent] = [part for part in gathered_tensors(kept or {}, torch.device("cpu")) if part]
    second = begun()
    second.restore(sent)
    results += [asdict(step(model, objective, optimizer, second(at), clip=None)) for at in (2, 3)]
    head = {} if (found := value_head(model)) is None else dict(found.named_parameters())
    seen = [{key: value for key, value in event.items() if isinstance(value, float)} for event in events]
    keep(directory / f"{name}-{rank()}", {**METHODS["lora"].trained_tensors(model), **head}, [*results, *seen])


class PromptRows(list[Any]):
    @property
    def lengths(self) -> list[int]:
        return [len(item.prompt_ids) for item in self]


@contextmanager
def as_base(model: nn.Module) -> Iterator[nn.Module]:
    with without_adapter(model):
        yield model


def stop_on_one_process(directory: Path) -> None:
    """Only the last process is asked to stop; only the main one knows the validation loss."""
    model = tiny()
    METHODS["lora"].adapt(model)
    spec = TrainSpec()
    plan: Any = SimpleNamespace(
        steps=6,
        learning_rate=1e-3,
        warmup_steps=0,
        evaluate_every=1,
        checkpoint_every=None,
        micro_batch=2,
        packing=True,
        streamed_tokens=None,
    )
    batches, saved = step_batches(True), []

    def save(progress: Progress, best: bool) -> None:
        saved.append(progress.step)
        wait_for_all()

    def stop() -> bool:
        return not is_main() and len(saved) >= 2

    optimizer = build_optimizer(model, spec, 1e-3)
    job = Job(model, Supervised(), optimizer, Precision(), spec, plan, lambda at, micro=None: batches(1), save, stop)
    losses = iter([3.0, 2.0, 2.5])
    progress, said = Progress(), ""
    try:
        train(job, progress, evaluate=lambda at: next(losses) if is_main() else None, emit=lambda event: None)
    except Interrupted as error:
        said = error.what
    found = {"said": said, "saved": saved, "best": [progress.best_step, progress.best_loss]}
    (directory / f"stop-{rank()}.json").write_text(json.dumps(found))


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    join_processes(torch.device("cpu"))
    try:
        for name in METHODS:
            for packed in (True, False):
                steps_of(name, packed, directory)
                sharded_steps_of(name, packed, directory)
        preference_steps(directory)
        for name in POLICIES:
            policy_steps(name, directory)
        if "--stop" in sys.argv:
            stop_on_one_process(directory)
    finally:
        leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
