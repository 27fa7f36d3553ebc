"""Decoder blocks of the Llama shape, run from transformers' own modules with few passes over memory.

The blocks of Llama, Mistral, Qwen2, Qwen3 and Gemma are the same chain: norm, three projections, rotary positions,
attention, a projection, norm, two projections, a gate, a projection. `Decoder` runs that chain on packed tokens with
gradients written by hand, so that little is kept and nothing is passed over twice. It owns no weights: modules stay
where transformers and the methods put them, and are looked up at every pass. Training and generation differ only in
the attention that they hand in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.batch import NO_PARENT
from tunesmith.models import kernels
from tunesmith.models.attention import as_transformers_runs_it, attend
from tunesmith.models.head import head_logits
from tunesmith.models.projection import Gating, Run, compute_dtype, kept_projection, project, project_gated
from tunesmith.models.row_attention import Ancestor, forget_layouts

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Number of the layer, query ``[tokens, heads, head_dim]``, key and value ``[tokens, key_heads, head_dim]`` with their
positions rotated in; returns ``[tokens, heads * head_dim]``."""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
_SWIGLU = Gating(kernels.swiglu, kernels.swiglu_backward)
_GEGLU = Gating(kernels.geglu, kernels.geglu_backward)
GATES = {"silu": _SWIGLU, "swish": _SWIGLU, "gelu_pytorch_tanh": _GEGLU, "gelu_new": _GEGLU}


class _Norm(NamedTuple):
    """An RMS norm, or any module in its place.

    Attributes:
        other: what must run itself: a method trains it in a dtype of its own, or has put a layer around it.
    """

    other: nn.Module | None
    weight: Tensor
    offset: float
    eps: float

    @classmethod
    def of(cls, norm: Any) -> _Norm:
        plain = type(norm).__name__.endswith("RMSNorm") and not (norm._forward_hooks or norm._forward_pre_hooks)
        return cls(None if plain else norm, norm.weight, norm_offset(norm), _eps(norm))


class _Parts(NamedTuple):
    """What a block does, in this order."""

    norm: _Norm
    query_key_value: Run
    query_norm: _Norm | None
    key_norm: _Norm | None
    out: Run
    second_norm: _Norm
    gate_up: Run
    down: Callable[[Tensor, Tensor], Tensor]


def _projection(modules: Sequence[nn.Module]) -> Run:
    return partial(project, modules=modules)


class Decoder:
    """The stack of blocks of a causal language model.

    Attributes:
        layers, heads, key_heads, head_dim: its sizes.
        scaling: of the attention's scores.
        windows: for each layer how many tokens a query sees, itself among them; None for all.

    Args:
        model: a model for which `shape_obstacle` finds nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # modules are looked up at every pass: a method may have put others there
        blocks = cast(Any, model).model.layers
        attention = blocks[0].self_attn
        config = attention.config
        self.layers, self.heads = len(blocks), int(config.num_attention_heads)
        self.key_heads = int(config.num_key_value_heads)
        self.head_dim, self.scaling = int(attention.head_dim), float(attention.scaling)
        self.windows = [_window(block.self_attn) for block in blocks]
        self._gating = GATES[config.hidden_act]
        self._keeps = False
        self._kept: list[_Parts] | None = None

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """What the last norm returns, ``[tokens, width]``, for int64 ``[tokens]`` token ids and positions."""
        backbone = cast(Any, self._model()).model
        hidden = backbone.embed_tokens(token_ids)
        dtype = compute_dtype(hidden)
        if self._keeps and self._kept is None:
            self._kept = [self._parts(block, partial(kept_projection, dtype=dtype)) for block in backbone.layers]
        cos, sin = (turn[0, :, None].to(dtype) for turn in backbone.rotary_emb(hidden[None], positions[None]))
        rotary = cos, kernels.signed(sin)
        put = getattr(backbone.embed_tokens, "before_attention", lambda ids: None)(token_ids)
        if put is not None:
            attend = _with_own(attend, put)
        delta: Tensor | None = None
        resident = getattr(backbone, "resident", None)  # blocks that come into memory one at a time
        if resident is not None:
            forget_layouts()
        for number, block in enumerate(backbone.layers):
            parts = self._kept[number] if self._kept else self._parts(block)

            def run(hidden: Tensor, delta: Tensor | None, number: int = number, parts: _Parts = parts) -> Any:
                return self._block(number, parts, hidden, delta, rotary, attend)

            if resident is not None:
                hidden, delta = resident.run(number, run, hidden if delta is None else hidden + delta)
            elif getattr(block, "gradient_checkpointing", False) and block.training and torch.is_grad_enabled():
                hidden, delta = cast(Any, checkpoint(run, hidden, delta, use_reentrant=False))
            else:
                hidden, delta = run(hidden, delta)
        return self._add_norm(hidden, delta, _Norm.of(backbone.norm))[1]

    def dtype_of_products(self, device: torch.device) -> torch.dtype:
        """The dtype that `hidden` computes in."""
        embed: Any = cast(Any, self._model()).model.embed_tokens
        return compute_dtype(embed(torch.zeros(1, dtype=torch.long, device=device)))

    @contextmanager
    def keeping_weights(self) -> Iterator[None]:
        """Nothing is looked up or cast anew inside, where weights do not change and nothing is trained.

        A pass over one token otherwise spends as long on finding its weights as on reading them.
        """
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._kept = False, None

    def _parts(self, block: Any, projection: Callable[[Sequence[nn.Module]], Run] = _projection) -> _Parts:
        attention, mlp = block.self_attn, block.mlp
        gated_down = partial(project_gated, gating=self._gating, module=mlp.down_proj)
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return _Parts(
            norm=_Norm.of(block.input_layernorm),
            query_key_value=projection((attention.q_proj, attention.k_proj, attention.v_proj)),
            query_norm=None if norms[0] is None else _Norm.of(norms[0]),
            key_norm=None if norms[1] is None else _Norm.of(norms[1]),
            out=projection((attention.o_proj,)),
            second_norm=_Norm.of(block.post_attention_layernorm),
            gate_up=projection((mlp.gate_proj, mlp.up_proj)),
            down=gated_down if projection is _projection else partial(self._gated, projection((mlp.down_proj,))),
        )

    def hidden_of_rows(self, token_ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
        """`hidden` of packed rows, which attend within ``segments`` as a `Batch` has them."""
        table: Any = cast(Any, self._model()).model.embed_tokens
        ancestors = table.ancestors() if hasattr(table, "ancestors") else None  # a method's own keys and values
        return self.hidden(token_ids, positions, self.within(segments, ancestors))

    def within(self, segments: Tensor, ancestors: Sequence[tuple[Tensor, Tensor]] | None = None) -> Attend:
        """Attention of packed rows, which all attend to the ``ancestors`` of a layer too, if there are some."""

        def within(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            own = (None, None) if ancestors is None else tuple(part.to(key.dtype) for part in ancestors[layer])
            return attend(query, key, value, segments, self.scaling, self.windows[layer], cast(Ancestor, own))

        def wide(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return within(layer, query.float(), key.float(), value.float()).to(query.dtype)

        # Products in narrow dtypes keep some megabytes for every new length of a row.
        return wide if getattr(cast(Any, self._model()).model, "resident", None) is not None else within

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, vocabulary]`` from ``[n, width]``."""
        return head_logits(cast(nn.Module, self._model()), hidden)

    def _gated(self, run: Run, gate: Tensor, up: Tensor) -> Tensor:
        return run(self._gating.forward(gate, up))[0]

    def _block(
        self,
        number: int,
        parts: _Parts,
        hidden: Tensor,
        delta: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream before the last addition of a block, and what is still to be added."""
        hidden, normed = self._add_norm(hidden, delta, parts.norm)
        query, key, value = (part.reshape(len(part), -1, self.head_dim) for part in parts.query_key_value(normed))
        query = self._rotated(query, parts.query_norm, rotary)
        key = self._rotated(key, parts.key_norm, rotary)
        (delta,) = parts.out(attend(number, query, key, value))
        hidden, normed = self._add_norm(hidden, delta, parts.second_norm)
        gate, up = parts.gate_up(normed)
        return hidden, parts.down(gate, up)

    def _add_norm(self, hidden: Tensor, delta: Tensor | None, norm: _Norm) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        if norm.other is not None:
            hidden = hidden if delta is None else hidden + delta
            return hidden, norm.other(hidden).to(dtype)
        settings = _NormSettings(norm.offset, norm.eps, dtype)
        if torch.is_grad_enabled():
            return cast(tuple[Tensor, Tensor], _AddNorm.apply(hidden, delta, norm.weight, settings))
        hidden = hidden if delta is None else hidden + delta
        return hidden, kernels.rms_norm(hidden, norm.weight, *settings)

    def _rotated(self, x: Tensor, norm: _Norm | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if norm is not None:
            x = self._add_norm(x, None, norm)[1]
        return cast(Tensor, _Rotated.apply(x, *rotary)) if torch.is_grad_enabled() else kernels.rotate(x, *rotary)


def _with_own(attend: Attend, put: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Attend:
    """Attention in which a method's own keys and values stand in the place of those of its tokens."""
    return lambda layer, query, key, value: attend(layer, query, *put(layer, key, value))


_DECODERS: WeakKeyDictionary[nn.Module, Decoder | str] = WeakKeyDictionary()


def decoder_of(model: nn.Module) -> Decoder | str:
    """The decoder of a model, compared once with what transformers computes; or the reason why there is none."""
    if model not in _DECODERS:
        found = shape_obstacle(model) or Decoder(model)
        _DECODERS[model] = found if isinstance(found, str) else _difference(model, found) or found
    return _DECODERS[model]


def decoder_without_comparison(model: nn.Module) -> Decoder:
    """The decoder of modules that are laid out like transformers' and cannot run by themselves."""
    _DECODERS[model] = decoder = Decoder(model)
    return decoder


def forget_decoder(model: nn.Module) -> None:
    """Lets `decoder_of` look at a model anew, whose blocks have become others."""
    _DECODERS.pop(model, None)


def _difference(model: nn.Module, decoder: Decoder) -> str | None:
    """What is wrong with a decoder that does not give the hidden states that transformers' own forward pass gives."""
    lengths = (9, 13)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(cast(Any, model).get_input_embeddings().weight.shape[0])
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in lengths]
    segments = torch.tensor([[0, lengths[0], NO_PARENT], [lengths[0], lengths[1], NO_PARENT]])

    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    with as_transformers_runs_it(model):
        with torch.no_grad():
            backbone = cast(Any, model).model
            expected = [backbone(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
        with torch.enable_grad():  # as in training
            found = decoder.hidden(torch.cat(rows), positions, decoder.within(segments)).detach()
    wanted = torch.cat(expected).float()
    difference = float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-12))
    bound = 1e-3 if found.dtype == torch.float32 else 5e-2
    return None if difference < bound else f"its fused form gives other hidden states (by {difference:.2%})"


def shape_obstacle(model: nn.Module) -> str | None:
    """Why a model's blocks are no chain of the Llama shape, or None when they are."""
    backbone = getattr(model, "model", None)
    if not all(hasattr(backbone, name) for name in ("embed_tokens", "layers", "norm", "rotary_emb")):
        return "the model is not laid out like Llama"
    for block in cast(Any, backbone).layers:
        family = type(block).__name__.removesuffix("DecoderLayer")
        if family not in FAMILIES:
            return f"blocks of the kind {type(block).__name__} have no fused form"
        if any(part._forward_hooks or part._forward_pre_hooks for part in (block, block.self_attn, block.mlp)):
            return "something hooks into its blocks"
        if not all(hasattr(block.mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            return "a method has put something else in the place of its feed-forward network"
        config = block.self_attn.config
        if config.hidden_act not in GATES:
            return f"its gate is {config.hidden_act}"
        if getattr(config, "attention_dropout", 0.0):
            return "it uses attention dropout"
    return None


def norm_offset(norm: nn.Module) -> float:
    """What an RMS norm adds to its weight: 1 in Gemma."""
    return 1.0 if type(norm).__name__.startswith("Gemma") else 0.0


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def _window(attention: Any) -> int | None:
    if type(attention).__name__.startswith("Mistral"):  # its layers ask the configuration anew each time
        return cast("int | None", attention.config.sliding_window)
    return cast("int | None", getattr(attention, "sliding_window", None))


class _NormSettings(NamedTuple):
    offset: float
    eps: float
    dtype: torch.dtype


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, delta: Tensor | None, weight: Tensor, settings: _NormSettings
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = hidden.view_as(hidden) if delta is None else hidden + delta.to(hidden.dtype)
        ctx.save_for_backward(total, kernels.inverse_rms(total, settings.eps), weight)
        ctx.offset, ctx.delta_dtype = settings.offset, None if delta is None else delta.dtype
        return total, kernels.rms_norm(total, weight, *settings)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> Any:
        beside, gradient = grad_outputs
        total, inverse, weight = ctx.saved_tensors
        found, d_weight = beside, None
        if gradient is not None:
            found = kernels.rms_norm_backward(gradient, beside, total, inverse, weight, ctx.offset)
            if ctx.needs_input_grad[2]:
                rows = gradient.reshape(-1, gradient.shape[-1])
                d_weight = kernels.rms_norm_weight_backward(rows, total.reshape(rows.shape), inverse.reshape(-1, 1))
                d_weight = d_weight.to(weight.dtype)
        d_delta = None if ctx.delta_dtype is None or found is None else found.to(ctx.delta_dtype)
        return found, d_delta, d_weight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return kernels.rotate(x, cos, signed_sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,) = grad_outputs
        cos, signed_sin = ctx.saved_tensors
        return kernels.rotate(gradient, cos, -signed_sin), None, None
