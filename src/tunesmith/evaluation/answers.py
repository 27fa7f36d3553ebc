"""What a model answers to held-out rows, and how probable it finds their reference answers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tunesmith.base import Progress, silent
from tunesmith.batch import NO_PARENT, Batch, Example, pack
from tunesmith.data.render import TOKEN_SCOPES, Rendered
from tunesmith.engine.generate import Generation, Sampling, generate
from tunesmith.models.forward import use_attention
from tunesmith.objectives import Supervised, TrainingObjective

TOKENS_AT_ONCE = 4096
WRITING: TrainingObjective = Supervised()


@dataclass(frozen=True)
class Judged:
    """One held-out row as one model dealt with it.

    Attributes:
        source: file and line.
        prompt: the conversation before the answer, as text; empty for raw text.
        references: acceptable answers; for raw text empty.
        answer: what the model said; None for raw text.
        finish_reason: `stop` or `length`; None for raw text.
        nll: negative log-likelihood of the first reference, in nats; None when it is not finite.
        targets: tokens that `nll` is summed over.
        reward: what the answer is worth by the recipe's rewards; None without any.
        bytes: of the text in UTF-8 that `nll` is about; None of a text that was cut, and of a pair.
        margin: how much likelier a token of the better answer is than one of the worse, in nats on average; of a single
            answer its mean log-likelihood, or minus that of a bad one. None where nothing is compared.
        other_nll: negative log-likelihood of the worse answer of a pair, in nats; None without one.
        other_targets: tokens that it is summed over.
        gained: by how many nats the better answer became likelier against the base than the worse did; None where no
            base is looked at.
        confidence: probability that the model gives its own answer; None where it is not known.
        scores: what the recipe's own metrics say of the answer, by name.
    """

    source: str
    prompt: str
    references: list[str]
    answer: str | None
    finish_reason: str | None
    nll: float | None
    targets: int
    reward: float | None = None
    bytes: int | None = None
    margin: float | None = None
    other_nll: float | None = None
    other_targets: int = 0
    gained: float | None = None
    confidence: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def implicit_rewards(before: Judged, after: Judged) -> tuple[float, float] | None:
    """By how many nats the better and the worse answer of a pair became likelier; None without both likelihoods.

    log p_after - log p_before, the implicit reward at beta = 1 (Rafailov et al. 2023, section 4).
    """
    if before.nll is None or after.nll is None or before.other_nll is None or after.other_nll is None:
        return None
    return before.nll - after.nll, before.other_nll - after.other_nll


@dataclass(frozen=True)
class Judging:
    """How rows are answered: the same for base and tuned.

    Attributes:
        likelihoods: whether reference answers are looked at too.
        confident: whether the probability of the model's own answers is looked at.
    """

    max_new_tokens: int
    batch_size: int
    stop_ids: frozenset[int]
    packed: bool
    generates: bool = True
    likelihoods: bool = True
    confident: bool = False


def chosen_rows(rows: Sequence[Rendered], count: int, seed: int) -> list[Rendered]:
    """At most ``count`` rows, drawn with the seed, in their order."""
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[at] for at in chosen]


def judge(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Rendered], how: Judging, progress: Progress
) -> list[Judged]:
    """Answers every row greedily and measures the likelihood of its reference."""
    asked = [at for at, row in enumerate(rows) if row.prompt_ids and (how.generates or how.confident)]
    generations = generate(
        model,
        [rows[at].prompt_ids for at in asked],
        Sampling(how.max_new_tokens),
        stop_ids=set(how.stop_ids),
        batch_size=how.batch_size,
        progress=progress,
    )
    answers = dict(zip(asked, generations, strict=True))
    confidences = _confidences(model, rows, answers, how, progress) if how.confident else {}
    likelihoods: Sequence[Sequence[tuple[float, int]]] = [[(math.nan, 0)]] * len(rows)
    if how.likelihoods:
        likelihoods = answer_nlls(model, [row.example for row in rows], packed=how.packed, progress=progress)
    judged = []
    for at, row in enumerate(rows):
        said = answers.get(at)
        (nll, targets), *others = likelihoods[at]
        other_nll, other_targets = others[0] if others else (None, 0)
        judged.append(
            Judged(
                source=str(row.row.source),
                prompt=prompt_text(row),
                references=list(row.row.references) if row.row.messages else [],
                answer=cast(str, tokenizer.decode(said.token_ids, skip_special_tokens=True)) if said else None,
                finish_reason=said.finish_reason if said else None,
                nll=nll if math.isfinite(nll) else None,
                targets=targets,
                bytes=_bytes_of_targets(row, tokenizer),
                margin=_margin(row, likelihoods[at]),
                other_nll=other_nll if other_nll is not None and math.isfinite(other_nll) else None,
                other_targets=other_targets,
                confidence=confidences.get(at),
            )
        )
    return judged


def _confidences(
    model: nn.Module, rows: Sequence[Rendered], answers: dict[int, Generation], how: Judging, progress: Progress
) -> dict[int, float]:
    """The probability that the model gives just the answer that it gave, its end included, by number of the row."""
    examples: dict[int, Example] = {}
    for at, said in answers.items():
        ids = [*said.token_ids, *([] if said.stop_id is None else [said.stop_id])]
        if ids and not rows[at].row.rejected:  # of a pair it is the margin that counts
            weights = torch.ones(len(rows[at].prompt_ids) + len(ids))
            weights[: len(rows[at].prompt_ids)] = 0.0
            token_ids = torch.tensor([*rows[at].prompt_ids, *ids])
            examples[at] = Example(token_ids, {"target_weights": weights}, TOKEN_SCOPES)
    nlls = row_nlls(model, [*examples.values()], packed=how.packed, progress=progress)
    return {at: math.exp(-nll) for at, nll in zip(examples, nlls, strict=True) if math.isfinite(nll)}


def _bytes_of_targets(row: Rendered, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Bytes of the text that the negative log-likelihood is about; None of several texts, and of one that was cut."""
    if row.row.text:
        return None if row.cut_ids else len(row.row.text.encode())
    if row.cut_ids or row.example.segments is not None:
        return None
    ids = row.example.token_ids[row.example.tensors["target_weights"] > 0].tolist()
    return len(cast(str, tokenizer.decode(ids, skip_special_tokens=True)).encode())


def _margin(row: Rendered, answers: Sequence[tuple[float, int]]) -> float | None:
    """How far a token of the better answer is likelier than one of the worse; of a single answer as `Judged` says."""
    means = [-nll / max(1, targets) for nll, targets in answers]
    if len(means) > 1:
        found = means[0] - means[1]
    elif row.row.desirable is not None:
        found = means[0] if row.row.desirable else -means[0]
    else:
        return None
    return found if math.isfinite(found) else None


def prompt_text(row: Rendered) -> str:
    """The conversation before the last answer, as people read it."""
    if row.row.words:
        return " ".join(row.row.words)
    return turns_text(row.row.messages[:-1])


def turns_text(turns: Sequence[dict[str, Any]]) -> str:
    """Turns as one text; a single one by itself, without who says it."""
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def row_nlls(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    packed: bool,
    progress: Progress,
    objective: TrainingObjective = WRITING,
) -> list[float]:
    """Negative log-likelihood of each row's targets, in nats, in the order given."""
    found = answer_nlls(model, examples, packed=packed, progress=progress, objective=objective)
    return [sum(nll for nll, _ in answers) for answers in found]


def answer_nlls(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    packed: bool,
    progress: Progress,
    objective: TrainingObjective = WRITING,
) -> list[list[tuple[float, int]]]:
    """For every row, and each answer that it holds, the negative log-likelihood of its targets and their number."""
    pieces = [_pieces(example) for example in examples]
    flat = [piece for row in pieces for piece in row]
    found: list[list[tuple[float, int]]] = [[] for _ in flat]
    for chosen, batch in batches_to_score(model, flat, packed=packed, progress=progress):
        logps, targets = objective.target_logps(model, batch)
        weighted = (logps * batch.tensors["target_weights"][targets]).double().cpu()
        counts = [_targets_of_answers(flat[at]) for at in chosen]
        parts = iter(weighted.split([count for row in counts for count in row]))
        for at, row in zip(chosen, counts, strict=True):
            found[at] = [(-float(next(parts).sum()), count) for count in row]
    of_pieces = iter(found)
    return [_joined([next(of_pieces) for _ in row]) for row in pieces]


def _joined(of_pieces: list[list[tuple[float, int]]]) -> list[tuple[float, int]]:
    """What is found of a row, from what is found of its pieces."""
    if len(of_pieces) == 1:
        return of_pieces[0]
    return [(sum(nll for piece in of_pieces for nll, _ in piece), sum(n for piece in of_pieces for _, n in piece))]


def _targets_of_answers(example: Example) -> list[int]:
    """Targets of each answer of a row, of which there are several where they share their prompt."""
    if example.segments is None:
        return [example.targets]
    weights = example.tensors["target_weights"]
    return [int((weights[start : start + length] > 0).sum()) for start, length, _ in example.segments[1:].tolist()]


def batches_to_score(
    model: nn.Module, examples: Sequence[Example], *, packed: bool, progress: Progress
) -> Iterator[tuple[list[int], Batch]]:
    """Numbers of the rows of each batch, and the batch on the model's device, which is in evaluation mode and keeps no
    gradient meanwhile; all is put back at the end."""
    device = next(model.parameters()).device
    was_training, attention = model.training, cast(Any, model).config._attn_implementation
    model.eval()
    done, lengths = 0, [len(example) for example in examples]
    try:
        with torch.no_grad():
            for chosen in groups_of_rows(lengths, getattr(model, "tokens_at_once", TOKENS_AT_ONCE)):
                progress("scoring", done, len(examples))
                done += len(chosen)
                yield chosen, pack([examples[at] for at in chosen], "packed" if packed else "padded").to(device)
    finally:
        use_attention(model, attention)  # attention over segments knows no call without them
        model.train(was_training)
    progress("scoring", len(examples), len(examples))


def _pieces(example: Example) -> list[Example]:
    """The pieces of a document, which see nothing of each other; other rows as they are."""
    parted = example.segments is not None and bool((example.segments[:, 2] == NO_PARENT).all())
    return example.apart() if parted else [example]


def groups_of_rows(lengths: Sequence[int], most: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """Numbers of rows, the shortest first, in groups of at most so many tokens (a longer row is a group by itself)."""
    groups: list[list[int]] = []
    tokens = 0
    for at in sorted(range(len(lengths)), key=lambda at: int(lengths[at])):
        if not groups or tokens + lengths[at] > most:
            groups.append([])
            tokens = 0
        groups[-1].append(at)
        tokens += int(lengths[at])
    return groups


def mean_nll(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    packed: bool,
    progress: Progress = silent,
    objective: TrainingObjective = WRITING,
) -> float:
    """The validation loss: for most objectives the average negative log-likelihood per target."""
    sums, divisors = dict[str, float](), dict[str, float]()
    flat = [piece for example in examples for piece in _pieces(example)]
    for _, batch in batches_to_score(model, flat, packed=packed, progress=progress):
        (prepared,) = objective.prepare(model, [batch])
        for total, found in zip((sums, divisors), objective.measured(model, prepared), strict=True):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + float(value)
    return sum(sums[name] / max(1e-12, divisors[name]) for name in sums)


Evaluation = dict[str, Any]
"""What is stored of one model's evaluation: `rows` (of `Judged`) and `general` (losses on general text)."""
