"""The one place where a batch meets a model: packed through attention over segments, or padded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.batch import Batch, Example, pack
from tunesmith.models.attention import SEGMENTS, UnsupportedAttention


def next_token_logits(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    """Logits of the token that follows each of ``positions``.

    Args:
        model: a causal language model of transformers, adapted or not.
        batch: the rows, on the model's device.
        positions: int64 ``[n]``, indices into the batch, ascending.

    Returns:
        ``[n, vocabulary]`` in the model's dtype.
    """
    return (_packed if batch.layout == "packed" else _padded)(model, batch, positions)


def _packed(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    use_attention(model, SEGMENTS)
    selects = _selects_logits(model)
    logits = model(
        input_ids=batch.token_ids[None],
        position_ids=batch.positions[None],
        segments=batch.segments,
        use_cache=False,
        **({"logits_to_keep": positions} if selects else {}),
    ).logits[0]
    return logits if selects else logits[positions]


def _padded(model: nn.Module, batch: Batch, positions: Tensor) -> Tensor:
    if batch.rows != len(batch.segments):
        raise ValueError("segments with parents share their tokens and cannot be padded")
    use_default_attention(model)
    starts, lengths = batch.segments[:, 0].contiguous(), batch.segments[:, 1]
    rows = [batch.token_ids[start : start + length] for start, length, _ in batch.segments.tolist()]
    token_ids = pad_sequence(rows, batch_first=True)  # [rows, longest]
    mask = torch.arange(token_ids.shape[1])[None] < lengths[:, None]
    row = torch.searchsorted(starts, positions.cpu(), right=True) - 1
    column = positions.cpu() - starts[row]
    kept, place = torch.unique(column, return_inverse=True)
    selects = _selects_logits(model)
    logits = model(
        input_ids=token_ids,
        attention_mask=mask.to(token_ids),
        use_cache=False,
        **({"logits_to_keep": kept.to(token_ids.device)} if selects else {}),
    ).logits
    return logits[row, place if selects else column]


def _selects_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def use_attention(model: nn.Module, name: str) -> None:
    language_model = cast(Any, model)
    if language_model.config._attn_implementation != name:
        language_model.set_attn_implementation(name)


def use_default_attention(model: nn.Module) -> None:
    """Puts back transformers' own attention, which generation and padded batches need."""
    use_attention(model, default_attention(model))


def default_attention(model: nn.Module) -> str:
    """The attention that transformers would choose by itself: `sdpa` where the architecture has it."""
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def packing_obstacle(model: nn.Module) -> str | None:
    """Why rows must not be laid end to end for this model, or None when they may.

    A short row is run alone and behind two different neighbours. A model whose layers mix tokens in another way than
    attention (a convolution, a recurrent state) gives different logits, or gradients of them by the neighbours, and
    would learn from the neighbours.
    """
    device = next(model.parameters()).device
    vocabulary = int(cast(Any, model).get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    row, one, other = (Example(torch.randint(vocabulary, (length,), generator=generator)) for length in (9, 13, 13))

    def logits_of_row(batch: Batch) -> Tensor:
        last = torch.arange(batch.tokens - len(row), batch.tokens, device=device)
        return next_token_logits(model, batch.to(device), last).float()

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
