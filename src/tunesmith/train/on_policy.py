"""Steps on the student's own answers, as its teacher finds them (Agarwal et al. 2023, algorithm 1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor, nn

from tunesmith.base import silent
from tunesmith.batch import Batch, Example, pack
from tunesmith.data.render import TOKEN_SCOPES, Rendered
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.objectives.distill import WRITTEN
from tunesmith.train.batches import StepBatches
from tunesmith.train.parallel import rank, world_size
from tunesmith.train.randomness import seeded


@dataclass(frozen=True)
class Answering:
    """How a student answers in training.

    Attributes:
        share: of the steps.
        stop_ids: tokens that end an answer.
        at_once: answers at a time.
    """

    share: float
    sampling: Sampling
    stop_ids: frozenset[int]
    seed: int
    at_once: int = 16


Says = Callable[[Sequence[Example]], dict[str, Tensor]]
"""What the teacher finds likely at the targets of some rows, in their order."""


class OnPolicyBatches:
    """The micro-batches of each step: of written answers, or of answers that the student gives now.

    Which it is, and what is sampled, follows from the seed, the step and the student's weights: a resumed run samples
    what the run that was not stopped did.

    Args:
        written: the batches of written answers, and which rows a step sees.
        says: asks the teacher.
        prompt: the row's prompt as the teacher reads it.
    """

    def __init__(
        self,
        written: StepBatches,
        student: nn.Module,
        how: Answering,
        *,
        says: Says,
        prompt: Callable[[Rendered], Sequence[int]],
    ) -> None:
        self.written, self.student, self.how, self.says, self.prompt = written, student, how, says, prompt

    def __call__(self, step: int, micro_batch: int | None = None) -> list[Batch]:
        if not self.is_own(step):
            return self.written(step, micro_batch)
        groups = self.written.groups(step, micro_batch)[rank() :: world_size()]
        rows = {at: self.written.rows[at] for group in groups for at in group}
        answers = dict(zip(rows, self._answers(step, list(rows.values())), strict=True))
        return [self._batch([(rows[at], answers[at]) for at in group]) for group in groups]

    def is_own(self, step: int) -> bool:
        """Whether the student answers in this step."""
        return random.Random(f"{self.how.seed} {step}").random() < self.how.share

    def _answers(self, step: int, rows: Sequence[Rendered]) -> list[Generation]:
        named = f"{self.how.seed} {step} {rank()}".encode()
        with seeded(int.from_bytes(sha256(named).digest()[:7], "little")):
            return generate(
                self.student,
                [row.prompt_ids for row in rows],
                self.how.sampling,
                stop_ids=set(self.how.stop_ids),
                batch_size=self.how.at_once,
                progress=silent,
            )

    def _batch(self, pairs: Sequence[tuple[Rendered, Generation]]) -> Batch:
        answers = [_tokens(row, answer, self.how.stop_ids) for row, answer in pairs]
        own = [_example(row.prompt_ids, ids) for (row, _), ids in zip(pairs, answers, strict=True)]
        read = [_example(self.prompt(row), ids) for (row, _), ids in zip(pairs, answers, strict=True)]
        batch = pack(own, "packed" if self.written.plan.packing else "padded")
        said = {name: tensor.cpu() for name, tensor in self.says(read).items()}
        nobody = torch.zeros_like(batch.tensors["target_weights"])
        return replace(
            batch,
            tensors={**batch.tensors, **said, WRITTEN: nobody},
            scopes={**batch.scopes, WRITTEN: "token", **dict.fromkeys(said, "target")},
        )


def _tokens(row: Rendered, answer: Generation, stop_ids: frozenset[int]) -> list[int]:
    """An answer with the token that ended it, which is the one that closes the row's own."""
    trained = row.example.token_ids[row.example.tensors["target_weights"] > 0]
    closing = int(trained[-1])
    ended = answer.finish_reason == "stop" and closing in stop_ids
    return [*answer.token_ids, closing] if ended else list(answer.token_ids)


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    weights = torch.cat([torch.zeros(len(prompt)), torch.ones(len(answer))])
    return Example(torch.tensor([*prompt, *answer]), {"target_weights": weights}, TOKEN_SCOPES)
