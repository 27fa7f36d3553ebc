"""The one place where a batch meets a model: packed through attention over segments, or padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.batch import NO_PARENT, Batch, Example, pack
from tunesmith.models.attention import SEGMENTS, UnsupportedAttention, use_attention, use_default_attention
from tunesmith.models.decoder import Decoder, decoder_of
from tunesmith.models.embeddings import vocabulary_rows
from tunesmith.models.head import has_plain_head, head_logits, largest_and_sum, target_logps
from tunesmith.models.noise import noisy_embeddings
from tunesmith.models.outcomes import LOGITS_AT_ONCE, Head, Outcomes, likeliest, outcomes_of
from tunesmith.models.projection import compute_dtype, projection_of, rounded_up
from tunesmith.models.streamed_head import FileHead


def next_token_logits(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    """Logits of the token that follows each of ``positions``.

    Args:
        model: a causal language model of transformers, adapted or not.
        batch: the rows, on the model's device.
        positions: int64 ``[n]``, indices into the batch, ascending.

    Returns:
        ``[n, vocabulary]`` in the model's dtype.
    """
    rows, head = _rows_and_head(model, batch, positions)
    return head(rows)


def next_token_outcomes(
    model: nn.Module, batch: Batch, positions: Tensor, targets: Tensor, tokens: Tensor, temperature: float
) -> Outcomes:
    """What may follow ``positions``: each of ``tokens`` ``[n, k]`` or something else, and how likely ``targets`` are.

    Arguments as above and in `models.outcomes.outcomes_of`.
    """
    rows, head = _rows_and_head(model, batch, positions)
    return outcomes_of(rows, head, tokens, targets, temperature, vocabulary_rows(model))


def hidden_outcomes(model: nn.Module, hidden: Tensor, targets: Tensor, tokens: Tensor, temperature: float) -> Outcomes:
    """The same from what the head reads before each target, ``[n, width]``."""
    return outcomes_of(hidden, partial(head_logits, model), tokens, targets, temperature, vocabulary_rows(model))


def likeliest_next(
    model: nn.Module, batch: Batch, positions: Tensor, count: int, temperature: float, student_rows: int
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens after ``positions`` with their log-probabilities, as `models.outcomes.likeliest`.

    Tables may have more rows than there are tokens, and two models of one tokenizer different numbers of them.

    Args:
        student_rows: rows of the vocabulary of the model that is to learn from this one.
    """
    rows, head = _rows_and_head(model, batch, positions)
    own = vocabulary_rows(model)
    return likeliest(rows, head, count, temperature, min(own, student_rows), spare=own < student_rows)


def next_token_logps(
    model: nn.Module, batch: Batch, positions: Tensor, targets: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Log-probabilities, fp32 ``[n]`` in nats, of ``targets`` after ``positions``; arguments as above.

    Where the model's head is a plain product of the last hidden states, logits exist for a few positions at a time.

    Args:
        smoothing: this share of each target is spread evenly over the vocabulary (Szegedy et al. 2016, section 7), and
            what is returned is the expected log-probability of such a target.
    """
    rows, head = _rows_and_head(model, batch, positions)
    if head is not _themselves:
        return hidden_logps(model, rows, targets, smoothing)
    return -F.cross_entropy(rows.float(), targets, reduction="none", label_smoothing=smoothing)


def next_token_ranks(model: nn.Module, batch: Batch, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How likely tokens are, and whether none is likelier; several may be asked about at one position.

    Args:
        positions: int64 ``[n]``, in any order, repeated where several targets follow one token.
        targets: int64 ``[n]``.

    Returns:
        fp32 ``[n]`` in nats and bool ``[n]``; of equally likely tokens the first is the likeliest.
    """
    places, which = torch.unique(positions, return_inverse=True)
    rows, head = _rows_and_head(model, batch, places)
    order = torch.argsort(which)
    size = max(1, LOGITS_AT_ONCE // vocabulary_rows(model))
    logps = torch.empty(len(targets), device=rows.device)
    first = torch.empty(len(targets), dtype=torch.bool, device=rows.device)
    ends = torch.searchsorted(which[order], torch.arange(0, len(places) + size, size, device=which.device)).tolist()
    for number, own in enumerate(rows.split(size)):
        logits = head(own)
        chosen = order[ends[number] : ends[number + 1]]
        row, token = which[chosen] - number * size, targets[chosen]
        asked = logits[row, token].float()
        top, total = largest_and_sum(logits)
        logps[chosen] = asked - top[row] - total.log()[row]
        likeliest = asked == top[row]
        tied = row[likeliest]  # looking for the place of the largest is slow, and mostly there is no need
        likeliest[likeliest.clone()] = logits[tied].argmax(1) == token[likeliest]
        first[chosen] = likeliest
    return logps, first


def _rows_and_head(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[Tensor, Head]:
    """What logits at ``positions`` are made of, ``[n, …]``, and how: the logits where the model must be asked."""
    batch, positions = _prompted(model, batch, positions)
    batch = _filled_up(model, batch)
    reads_hidden = _reads_hidden(model, batch)  # looked at outside, for it may run the model
    with noisy_embeddings(model, batch):
        if reads_hidden:
            return _states(model, batch, positions), partial(head_logits, model)
        return (_packed if _goes_packed(model, batch) else _padded)(model, batch, positions), _themselves


def _themselves(logits: Tensor) -> Tensor:
    return logits


def hidden_logps(model: nn.Module, hidden: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The same from what the head reads before each target, ``[n, width]``."""
    layer = cast(Any, model).get_output_embeddings()
    if isinstance(layer, FileHead):
        return layer.target_logps(hidden, targets)
    head = projection_of(layer)
    if head is not None and isinstance(head.weight, Tensor) and head.bias is None and head.update is None:
        logps = target_logps(hidden, head.weight, targets)
        return _smoothed(logps, hidden, head.weight, targets, smoothing) if smoothing else logps
    logits = head_logits(model, hidden)
    return -F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)


def _smoothed(logps: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Expected log-probabilities without the logits: their mean over the vocabulary is hidden · mean(weight) - lse."""
    beside_mean = weight[targets].float() - weight.float().mean(0)  # [n, width]
    return logps - smoothing * (hidden.float() * beside_mean).sum(1)


def hidden_at(model: nn.Module, batch: Batch, positions: Tensor, layer: int | None = None) -> Tensor:
    """Hidden states of the trunk at ``positions``, ``[n, width]``: the last ones, or those behind ``layer`` blocks.

    Args:
        model: any model of transformers with a trunk, adapted or not.
        batch: the rows, on the model's device.
        positions: int64 ``[n]``, indices into the batch, ascending.
    """
    batch, positions = _prompted(model, batch, positions)
    batch = _filled_up(model, batch)
    decoder_of(model)  # which may run the model when it is asked for the first time
    with noisy_embeddings(model, batch):
        return _states(model, batch, positions, layer)


def prompt_ids(model: nn.Module) -> list[int]:
    """Tokens that a method puts before every row; mostly none."""
    return list(getattr(cast(Any, model).get_input_embeddings(), "prompt_ids", ()))


def prefix_of(model: nn.Module) -> Any | None:
    """The embedding table of a method that puts keys and values of its own before every row, in every layer."""
    table = cast(Any, model).get_input_embeddings()
    return table if getattr(table, "prompt_ids", ()) and hasattr(table, "ancestors") else None


def _prompted(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[Batch, Tensor]:
    """Rows behind the tokens that a method puts before each, and where ``positions`` are then."""
    ids = prompt_ids(model)
    if not ids:
        return batch, positions
    if prefix_of(model) is not None:  # attention has it, and only the places of tokens change
        return replace(batch, positions=batch.positions + len(ids)), positions
    device, more = batch.token_ids.device, len(ids)
    roots = batch.segments[:, 2] == NO_PARENT
    before = roots.cumsum(0) * more  # prompt tokens up to the beginning of each segment's own tokens
    pieces, places = [], []
    for (start, length, _), root in zip(batch.segments.tolist(), roots.tolist(), strict=True):
        own = slice(start, start + length)
        pieces += [torch.tensor(ids, device=device)] * root + [batch.token_ids[own]]
        places += [torch.arange(more, device=device)] * root + [batch.positions[own] + more]
    segments = batch.segments.clone()
    segments[:, 0] += before - roots * more
    segments[:, 1] += roots * more
    segment = torch.searchsorted(batch.segments[:, 0].contiguous(), positions.cpu(), right=True) - 1
    moved = positions + before[segment].to(positions.device)
    return replace(batch, token_ids=torch.cat(pieces), positions=torch.cat(places), segments=segments), moved


def _filled_up(model: nn.Module, batch: Batch) -> Batch:
    """Packed tokens, followed by some that belong to no row, up to a number that comes up again and again.

    On a CPU each number of tokens that was not met before makes the library of products in narrow dtypes write some
    thirty kernels anew, and keep them.
    """
    embeddings = cast(Any, model).get_input_embeddings().weight
    if batch.layout == "padded" or embeddings.device.type != "cpu" or compute_dtype(embeddings) == torch.float32:
        return batch
    step = getattr(model, "tokens_at_once", None)
    tokens = rounded_up(batch.tokens) if step is None else -(-batch.tokens // step) * step
    filler = (0, tokens - batch.tokens)
    return replace(batch, token_ids=F.pad(batch.token_ids, filler), positions=F.pad(batch.positions, filler))


def _reads_hidden(model: nn.Module, batch: Batch) -> bool:
    """Whether the head can be asked apart from the trunk; else the model must be asked for logits."""
    return _runs_fused(model, batch) or has_plain_head(model)


def _runs_fused(model: nn.Module, batch: Batch) -> bool:
    decoder = decoder_of(model)
    return isinstance(decoder, Decoder) and _goes_packed(model, batch)


def _states(model: nn.Module, batch: Batch, positions: Tensor, layer: int | None = None) -> Tensor:
    """Last hidden states, or those behind ``layer`` blocks, ``[n, width]``."""
    decoder = decoder_of(model)
    if isinstance(decoder, Decoder) and _runs_fused(model, batch) and layer is None:
        return decoder.hidden_of_rows(batch.token_ids, batch.positions, batch.segments)[positions]
    arguments, places = (_packed_call if _goes_packed(model, batch) else _padded_call)(model, batch, positions)
    trunk = cast(Any, model).base_model
    if "use_cache" not in inspect.signature(trunk.forward).parameters:  # encoders have none
        del arguments["use_cache"]
    if layer is None:
        return trunk(**arguments).last_hidden_state[places]
    return trunk(**arguments, output_hidden_states=True).hidden_states[layer][places]


def _goes_packed(model: nn.Module, batch: Batch) -> bool:
    """Whether rows run end to end: padded ones too behind a prefix, which attention over segments alone knows."""
    return batch.layout == "packed" or prefix_of(model) is not None


def _packed(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    arguments, _ = _packed_call(model, batch, positions)
    selects = _selects_logits(model)
    logits = model(**arguments, **({"logits_to_keep": positions} if selects else {})).logits[0]
    return logits if selects else logits[positions]


def _packed_call(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[dict[str, Any], Any]:
    """Arguments for the model, and where in its output the positions stand."""
    use_attention(model, SEGMENTS)
    arguments = {
        "input_ids": batch.token_ids[None],
        "position_ids": batch.positions[None],
        "segments": batch.segments,
        "use_cache": False,
    }
    prefix = prefix_of(model)
    if prefix is not None:
        arguments["ancestors"] = prefix.ancestors()
    return arguments, (0, positions)


def _padded(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    arguments, (row, column) = _padded_call(model, batch, positions)
    kept, place = torch.unique(column, return_inverse=True)
    selects = _selects_logits(model)
    logits = model(**arguments, **({"logits_to_keep": kept.to(batch.token_ids.device)} if selects else {})).logits
    return logits[row, place if selects else column]


def _padded_call(model: nn.Module, batch: Batch, positions: Tensor) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    if batch.rows != len(batch.segments):
        raise ValueError("segments with parents share their tokens and cannot be padded")
    use_default_attention(model)
    starts, lengths = batch.segments[:, 0].contiguous(), batch.segments[:, 1]
    rows = [batch.token_ids[start : start + length] for start, length, _ in batch.segments.tolist()]
    token_ids = pad_sequence(rows, batch_first=True)  # [rows, longest]
    mask = torch.arange(token_ids.shape[1])[None] < lengths[:, None]
    row = torch.searchsorted(starts, positions.cpu(), right=True) - 1
    arguments = {"input_ids": token_ids, "attention_mask": mask.to(token_ids), "use_cache": False}
    return arguments, (row, positions.cpu() - starts[row])


def _selects_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def packing_obstacle(model: nn.Module) -> str | None:
    """Why rows must not be laid end to end for this model, or None when they may.

    A short row is run alone and behind two different neighbours. A model whose layers mix tokens in another way than
    attention (a convolution, a recurrent state) gives different logits, or gradients of them by the neighbours, and
    would learn from the neighbours. A decoder's own attention knows no other tokens than those of the row, and what it
    makes of two packed rows is compared with each of them alone when it is built.
    """
    if isinstance(decoder_of(model), Decoder):
        return None
    device = next(model.parameters()).device
    vocabulary = int(cast(Any, model).get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    row, one, other = (Example(torch.randint(vocabulary, (length,), generator=generator)) for length in (9, 13, 13))

    writes = cast(Any, model).get_output_embeddings() is not None
    read = next_token_logits if writes else hidden_at

    def logits_of_row(batch: Batch) -> Tensor:
        last = torch.arange(batch.tokens - len(row), batch.tokens, device=device)
        return read(model, batch.to(device), last).float()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = logits_of_row(pack([row], layout="padded"))
            behind_other = logits_of_row(pack([other, row]))
        with torch.enable_grad(), _embeddings_kept(model) as embeddings:
            behind_one = logits_of_row(pack([one, row]))
            (gradient,) = torch.autograd.grad(behind_one.square().sum(), embeddings)
    except UnsupportedAttention as error:
        return str(error)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        return f"the architecture does not take packed rows ({detail})"
    finally:
        model.train(was_training)
        use_default_attention(model)
    leak = _relative_difference(behind_one.detach(), behind_other)
    change = _relative_difference(behind_one.detach(), alone)
    exact = next(model.parameters()).dtype == torch.float32
    if bool(gradient[..., : len(one), :].any()) or leak > (1e-5 if exact else 1e-2):
        return f"packed rows change each other (logits differ by {leak:.2%})"
    if change > (1e-3 if exact else 5e-2):
        return f"packed rows give other logits than single ones (by {change:.2%})"
    return None


@contextmanager
def _embeddings_kept(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the embedding layer returns, cut off from its weights, so that one can differentiate by it.

    A gradient is exactly zero where nothing flows, whatever the dtype; logits in bf16 hide a small leak in rounding.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()

    handle = cast(Any, model).get_input_embeddings().register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
