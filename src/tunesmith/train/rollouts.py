"""Answers of the model as a source of batches: drawn, scored and compared at every step, or every few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import TrainingError
from tunesmith.batch import NO_PARENT, Batch, Example, Scope, pack
from tunesmith.data.mix import RowOrder
from tunesmith.data.render import Rendered
from tunesmith.data.row import Row
from tunesmith.data.stored import RenderedRows
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.objectives import Policy
from tunesmith.objectives.logps import token_logps
from tunesmith.objectives.policy import OLD, Rollout
from tunesmith.objectives.ppo import logps_and_values
from tunesmith.objectives.preference import REFERENCE
from tunesmith.resolved import Plan
from tunesmith.train.loop import Emit
from tunesmith.train.parallel import is_main, rank, summed, world_size
from tunesmith.train.precision import Precision
from tunesmith.train.rollout_health import RolloutHealth, Seen
from tunesmith.train.rollout_server import Question, ServedAnswers
from tunesmith.train.rollout_state import examples_of, of_all_processes, stored_examples
from tunesmith.train.trouble import StepAbandoned

Score = Callable[[Sequence[Row], Sequence[str]], list[float]]
"""What answers to rows are worth: finite numbers."""

SHOWN = 300
"""Characters of an answer that an event shows."""


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn and scored.

    Attributes:
        reference: gives the model as this stage began, for as long as it is entered.
        seed: with a rollout's number, a row's and an answer's, of the answer's random numbers.
        batch_size: prompts of a rollout, over all processes.
        total_rows: where the stream of prompts ends, so that the last rollout may be smaller.
        stop: whether somebody asked the run to end.
        server: what draws the answers in this process's place.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    score: Score
    reference: Callable[[], AbstractContextManager[nn.Module]]
    precision: Precision
    seed: int
    batch_size: int
    total_rows: int
    stop: Callable[[], bool]
    emit: Emit
    server: ServedAnswers | None = None


@dataclass
class Rollouts:
    """The micro-batches of each optimizer step for this process, made of answers to the step's prompts.

    The answers of a rollout serve `objective.passes` steps. They are kept in checkpoints, so that a run that is killed
    between two of these goes on with the same ones; and when memory runs out, the same ones come in smaller parts.
    """

    model: nn.Module
    objective: Policy
    rows: RenderedRows
    order: RowOrder
    plan: Plan
    how: Drawing
    kl: float = field(init=False)
    health: RolloutHealth = field(init=False)

    def __post_init__(self) -> None:
        self.kl = self.objective.kl_weight
        self.health = RolloutHealth()
        self._number, self._examples = -1, list[Example]()

    def __call__(self, step: int, micro_batch: int | None = None) -> list[Batch]:
        """Draws answers when those at hand have had their passes.

        Raises:
            StepAbandoned: when the run was asked to end meanwhile; nothing has changed then.
            TrainingError: when a reward is no finite number, or no answer was ever better than another.
        """
        number = (step - 1) // self.objective.passes
        if number != self._number:
            self._examples = self._drawn(number, step)
            self._number = number
        size = micro_batch or self.plan.micro_batch
        layout = "packed" if self.plan.packing else "padded"
        groups = [self._examples[at : at + size] for at in range(0, len(self._examples), size)]
        return [pack(group, layout) for group in groups[rank() :: world_size()]]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        numbers = torch.tensor([self._number], dtype=torch.int64)
        kl = torch.tensor([self.kl], dtype=torch.float64)
        return {"number": numbers, "kl": kl, "health": self.health.tensor(), **stored_examples(self._examples)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._number, self.kl = int(tensors["number"]), float(tensors["kl"])
        self.health = RolloutHealth.of(tensors["health"])
        self._examples = examples_of(tensors)

    def prompts(self, number: int) -> list[int]:
        """Indices of the rows that a rollout asks this process, those of like length beside each other."""
        start = number * self.how.batch_size
        stop = max(start + 1, min(start + self.how.batch_size, self.how.total_rows))
        chosen = self.order.rows(start, stop)
        chosen.sort(key=lambda at: (int(self.rows.lengths[at]), at))
        return chosen[rank() :: world_size()]

    def _drawn(self, number: int, step: int) -> list[Example]:
        asked = self.prompts(number)
        items = [self.rows[at] for at in asked]
        training = self.model.training
        self.model.eval()
        try:
            answers = self._answers(number, asked, items)
            texts = [self._text(answer) for answer in answers]
            rewards = self._rewards(items, answers, texts)
            group = self.objective.group_size
            examples = [
                _example(item, answers[at * group : (at + 1) * group], self.how.stop_ids)
                for at, item in enumerate(items)
            ]
            rollout = self._looked_at(examples, rewards)
        finally:
            self.model.train(training)
        seen = self._seen(rollout, answers, texts)
        if is_main():
            self._tell(step, seen, items, texts, rollout)
        # Of all processes, because advantages may depend on one another, and the one that writes checkpoints has them.
        examples, rollout = of_all_processes(examples, rollout, next(self.model.parameters()).device)
        signals = {OLD: rollout.logps, **self.objective.signals(rollout)}
        if rollout.reference is not None:
            signals[REFERENCE] = rollout.reference
        self.kl = self.objective.next_kl_weight(self.kl, seen.kl or 0.0)
        last = step + self.objective.passes > self.plan.steps
        for message in self.health.observe(seen, last=last):
            self.how.emit({"event": "warning", "step": step, "message": message})
        return _with_signals(examples, signals)

    def _answers(self, number: int, asked: Sequence[int], items: Sequence[Rendered]) -> list[Generation]:
        group = self.objective.group_size
        prompts = [item.prompt_ids for item in items for _ in range(group)]
        seeds = [_seed(self.how.seed, number, row, answer) for row in asked for answer in range(group)]

        def watched(label: str, done: int, total: int | None) -> None:
            if self.how.stop():
                raise StepAbandoned

        if self.how.server is not None:
            return self.how.server(self.model, list(map(Question, prompts, seeds)), watched)
        return generate(
            self.model,
            prompts,
            Sampling(self.objective.max_new_tokens, temperature=1.0),
            stop_ids=set(self.how.stop_ids),
            batch_size=self.objective.sample_batch,
            progress=watched,
            seeds=seeds,
        )

    def _text(self, answer: Generation) -> str:
        return cast(str, self.how.tokenizer.decode(answer.token_ids, skip_special_tokens=True))

    def _rewards(self, items: Sequence[Rendered], answers: Sequence[Generation], texts: Sequence[str]) -> Tensor:
        group = self.objective.group_size
        scores = self.how.score([item.row for item in items for _ in range(group)], texts)
        rewards = torch.tensor(scores, dtype=torch.float64)
        if not bool(torch.isfinite(rewards).all()):
            at = int((~torch.isfinite(rewards)).nonzero()[0])
            source = items[at // group].row.source
            raise TrainingError(
                f"the reward of an answer to {source} is {scores[at]}, which is no finite number",
                fix="look at objective.reward: every answer must have a number",
            )
        cut = torch.tensor([answer.finish_reason == "length" for answer in answers], dtype=torch.float64)
        return rewards - self.objective.cut_penalty * cut

    def _looked_at(self, examples: Sequence[Example], rewards: Tensor) -> Rollout:
        """What policy, reference and value head say of the answers, on the CPU."""
        found: dict[str, list[Tensor]] = {"logps": [], "reference": [], "values": []}
        device = next(self.model.parameters()).device
        layout, size = "packed" if self.plan.packing else "padded", self.plan.micro_batch
        with torch.no_grad(), self.how.precision.arithmetic():
            for at in range(0, len(examples), size):
                if self.how.stop():
                    raise StepAbandoned
                batch = pack(examples[at : at + size], layout).to(device)
                if self.objective.has_values:
                    logps, values = logps_and_values(self.model, batch)
                    found["values"].append(values.cpu())
                else:
                    logps = token_logps(self.model, batch).logps
                found["logps"].append(logps.cpu())
                if self.objective.kl_weight:
                    with self.how.reference() as reference:
                        found["reference"].append(token_logps(reference, batch).logps.cpu())
        # A process that was left without a prompt has tensors too, which are empty.
        joined = {name: torch.cat([torch.zeros(0), *parts]) for name, parts in found.items()}
        lengths = torch.cat([torch.zeros(0, dtype=torch.int64), *(one.own_segments()[1:, 1] for one in examples)])
        return Rollout(
            rewards,
            self.objective.group_size,
            lengths,
            joined["logps"],
            joined["reference"] if self.objective.kl_weight else None,
            joined["values"] if self.objective.has_values else None,
            self.kl,
        )

    def _seen(self, rollout: Rollout, answers: Sequence[Generation], texts: Sequence[str]) -> Seen:
        """Means over the answers of all processes."""
        groups = rollout.rewards.view(len(answers) // rollout.group, rollout.group)
        flat = (groups.amax(1) - groups.amin(1) <= 1e-9).sum() if rollout.group > 1 else torch.zeros(())
        together = rollout.group if rollout.group > 1 else max(1, len(texts))
        alike = [len(set(texts[at : at + together])) == 1 < together for at in range(0, len(texts), together)]
        parts = [
            float(len(answers)),
            float(len(groups)),
            float(len(rollout.logps)),
            float(rollout.rewards.sum()),
            float(rollout.rewards.square().sum()),
            float(rollout.distances().double().sum()),
            float(rollout.logps.double().sum()),
            float(sum(answer.finish_reason == "length" for answer in answers)),
            float(flat),
            sum(alike) / max(1, len(alike)) * len(groups),
            _gap(rollout, answers),
        ]
        device = next(self.model.parameters()).device
        count, prompts, tokens, total, squares, apart, logps, cut, still, same, gap = summed(
            torch.tensor(parts, dtype=torch.float64, device=device)
        ).tolist()
        mean = total / count
        compares = self.objective.kl_weight > 0
        return Seen(
            reward=mean,
            reward_std=max(0.0, squares / count - mean * mean) ** 0.5,
            kl=apart / count if compares else None,
            kl_of_token=apart / tokens if compares else None,
            entropy=-logps / tokens,
            length=tokens / count,
            cut=cut / count,
            flat=still / prompts if rollout.group > 1 else None,
            alike=same / prompts,
            server_gap=None if self.how.server is None else gap / tokens,
        )

    def _tell(self, step: int, seen: Seen, items: Sequence[Rendered], texts: Sequence[str], rollout: Rollout) -> None:
        best = int(rollout.rewards.argmax())
        source = str(items[best // rollout.group].row.source)
        event = {"event": "rollout", "step": step, **seen.as_json()}
        if self.objective.kl_weight:
            event["kl_weight"] = rollout.kl
        shown = {"source": source, "answer": texts[best][:SHOWN], "reward": float(rollout.rewards[best])}
        self.how.emit({**event, "best": shown})


def _gap(rollout: Rollout, answers: Sequence[Generation]) -> float:
    """Sum over tokens of how far their log-probability is from what the engine that drew them found, in nats."""
    theirs = [value for answer in answers for value in answer.logps or ()]
    return float((rollout.logps.double() - torch.tensor(theirs, dtype=torch.float64)).abs().sum()) if theirs else 0.0


def _seed(seed: int, number: int, row: int, answer: int) -> int:
    """A seed of 63 bits that depends on all four."""
    digest = blake2b(f"{seed} {number} {row} {answer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _example(item: Rendered, answers: Sequence[Generation], stop_ids: frozenset[int]) -> Example:
    """A prompt once, and the answers behind it, each with the token that ended it."""
    prompt = torch.tensor(item.prompt_ids)
    parts = [
        torch.tensor([*answer.token_ids, *([] if answer.stop_id is None else [answer.stop_id])]) for answer in answers
    ]
    segments, start = [[0, len(prompt), NO_PARENT]], len(prompt)
    for part in parts:
        segments.append([start, len(part), 0])
        start += len(part)
    weights = torch.ones(start)
    weights[: len(prompt)] = 0.0
    scopes: dict[str, Scope] = {"target_weights": "token"}
    return Example(
        torch.cat([prompt, *parts]), {"target_weights": weights}, scopes, item.row.source, torch.tensor(segments)
    )


def _with_signals(examples: Sequence[Example], signals: dict[str, Tensor]) -> list[Example]:
    """The examples with their part of tensors ``[tokens]`` over all of them."""
    found, start = [], 0
    for example in examples:
        end = start + example.targets
        tensors = {**example.tensors, **{name: tensor[start:end] for name, tensor in signals.items()}}
        scopes: dict[str, Scope] = {**example.scopes, **dict.fromkeys(signals, "target")}
        found.append(replace(example, tensors=tensors, scopes=scopes))
        start = end
    return found
