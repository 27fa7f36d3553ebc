"""Prefix tuning (Li & Liang 2021, section 4.2): trained keys and values before every row, at every layer.

They are one ancestor that all rows of a batch attend to. While answers are generated, they are tokens behind the
vocabulary for the fused blocks, whose keys and values these are; for other models they are what the cache begins with.
Saved as PEFT saves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.method import AdaptationMethod, freeze, refuse_adapted, refuse_task_head
from tunesmith.methods.prompt import NAME, PromptedEmbedding, prompted, text_ids
from tunesmith.models.attention import as_transformers_runs_it

PEFT_TYPE = "PREFIX_TUNING"
TEXT = (
    "Read what follows with care. Think about what is asked, and in which form it is wanted. Then answer it exactly in "
    "that form, completely and correctly, without anything that was not asked for."
)
"""What a prefix starts from when no text is given: random numbers are far worse (Li & Liang 2021, section 7.4)."""


class Reparameterization(nn.Module):
    """What is added to the start of a prefix: ``[tokens, width]`` from a trained table by an MLP.

    Its last layer starts at zero, so that training begins with the start itself.
    """

    def __init__(self, tokens: int, inner: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, inner, device=device))
        self.first = nn.Linear(inner, inner, device=device)
        self.second = nn.Linear(inner, width, device=device)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self) -> Tensor:
        # fp32 under autocast too: it is added to numbers that are kept in fp32.
        with torch.autocast(self.table.device.type, enabled=False):
            return self.second(torch.tanh(self.first(self.table)))


class PrefixedEmbedding(PromptedEmbedding):
    """An embedding table that knows the keys and values of a prefix.

    Attributes:
        prompt: fp32 ``[tokens, layers * 2 * key_heads * head_dim]``: keys and values of each layer in turn, the keys
            with their positions rotated in; where they are reparameterised, what they started from.
    """

    def __init__(self, base: nn.Embedding, prompt: Tensor, heads: tuple[int, int], inner: int | None) -> None:
        super().__init__(base, prompt)
        self.heads, self.network = heads, None
        if inner is not None:
            self.prompt.requires_grad_(False)
            self.network = Reparameterization(len(prompt), inner, prompt.shape[1], prompt.device)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.base(token_ids.masked_fill(token_ids >= self.base.num_embeddings, 0))

    def folded(self) -> Tensor:
        """The keys and values as plain numbers, ``[tokens, layers * 2 * key_heads * head_dim]``."""
        return self.prompt if self.network is None else self.prompt + self.network()

    def ancestors(self) -> Sequence[tuple[Tensor, Tensor]] | None:
        """Keys and values ``[tokens, key_heads, head_dim]`` of every layer; None while there is no prefix."""
        if not self.prompt_ids:
            return None
        layers = self.folded().view(len(self.prompt), -1, 2, *self.heads).permute(1, 2, 0, 3, 4)
        return [(key, value) for key, value in (layer.unbind(0) for layer in layers.unbind(0))]

    def before_attention(self, token_ids: Tensor) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """What puts the prefix in the place of keys and values ``[tokens, key_heads, head_dim]`` of a layer; None
        where no token is the prefix's."""
        own = (token_ids >= self.base.num_embeddings)[:, None, None]
        if not bool(own.any()):
            return None
        chosen = F.embedding((token_ids - self.base.num_embeddings).clamp(min=0), self.folded())
        layers = chosen.view(len(token_ids), -1, 2, *self.heads)

        def put(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            trained = layers[:, layer].to(key.dtype)
            return torch.where(own, trained[:, 0], key), torch.where(own, trained[:, 1], value)

        return put


class Prefix(AdaptationMethod):
    """Trained keys and values before every row."""

    kind: Literal["prefix"] = "prefix"
    """Train keys and values that stand before every row, at every layer."""
    tokens: PositiveInt = 20
    """How many; Li & Liang 2021 (section 7.2) use 10 for tables and 200 for summaries."""
    text: str | None = None
    """What they start from: the keys and values of this text, cut or repeated to fit; else of a general request."""
    init: Literal["text", "random"] = "text"
    """`random` starts from small random numbers, which is far worse with few rows."""
    reparameterize: PositiveInt | None = None
    """Train an MLP of this inner width whose output is added to the start, instead of the numbers themselves (Li &
    Liang 2021, section 4.3, who find training steadier so). It is folded away when the prefix is saved."""

    saved_as: ClassVar[str] = "adapter"
    must_pack: ClassVar[bool] = True
    default_learning_rate: ClassVar[float] = 1e-3
    """Not tuned; 0.01 moved a start from text too far on the demo."""

    def adapt(self, model: nn.Module) -> list[str]:
        refuse_adapted(model)
        refuse_task_head(model, "prefix")
        layers, heads = _sizes(model)
        freeze(model)
        table = cast(Any, model).get_input_embeddings()
        start = torch.randn(self.tokens, layers * 2 * heads[0] * heads[1]) * 0.02
        if table.weight.is_meta:
            start = start.to("meta")
        elif self.init == "text":
            start = _past_of(model, text_ids(model, self.text or TEXT, self.tokens), tuple(start.shape))
        embedding = PrefixedEmbedding(table, start.to(table.weight.device), heads, self.reparameterize)
        cast(Any, model).set_input_embeddings(embedding)
        return []

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        embedding = prompted(model)
        if not isinstance(embedding, PrefixedEmbedding):
            return {}
        return {NAME: embedding.prompt} if embedding.network is None else dict(embedding.network.named_parameters())

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        embedding = cast(PrefixedEmbedding, prompted(model))
        prompt = embedding.folded().detach().cpu().contiguous()
        save_file({NAME: prompt}, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "num_virtual_tokens": len(prompt),
            "token_dim": embedding.heads[0] * embedding.heads[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": embedding.heads[0],
            "num_layers": int(cast(Any, model).config.get_text_config().num_hidden_layers),
            "encoder_hidden_size": embedding.heads[0] * embedding.heads[1],
            "prefix_projection": False,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sizes(model: nn.Module) -> tuple[int, tuple[int, int]]:
    """Layers, and key heads and features of each, as the configuration has them."""
    config: Any = cast(Any, model).config.get_text_config()

    def declared(name: str) -> int | None:
        # A stray key in config.json is an attribute too; one that the architecture reads is declared by its class.
        return getattr(config, name, None) if hasattr(type(config), name) else None

    heads = int(config.num_attention_heads)
    head_dim = declared("head_dim") or int(config.hidden_size) // heads
    return int(config.num_hidden_layers), (declared("num_key_value_heads") or heads, head_dim)


def _past_of(model: nn.Module, token_ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Keys and values that the base has for a text, fp32 ``[tokens, layers * 2 * key_heads * head_dim]``.

    Raises:
        InputError: when the model keeps something else of its past, or less.
    """
    device = next(model.parameters()).device
    with as_transformers_runs_it(model), torch.no_grad():
        past = cast(Any, model)(input_ids=token_ids[None].to(device), use_cache=True).past_key_values
    layers = [getattr(layer, name, None) for layer in getattr(past, "layers", ()) for name in ("keys", "values")]
    whole = [tensor for tensor in layers if tensor is not None]
    found = torch.cat([tensor[0].transpose(0, 1).flatten(1) for tensor in whole], dim=1) if whole else torch.empty(0)
    if tuple(found.shape) != shape or len(whole) != len(layers):
        raise InputError(
            "the layers of this model do not all keep the keys and values of a whole text",
            where="method.kind",
            fix="lower method.tokens below its attention window, or use prompt, adapter or lora",
        )
    return found.float()


def load_prefix(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> Prefix:
    """Adapts ``model`` by a prefix that PEFT or Tunesmith saved, and returns its method.

    Raises:
        InputError: when the file belongs to another model, or needs PEFT's projection.
    """
    found = tensors.get(NAME)
    if found is None or found.dim() != 2:
        raise InputError("the file holds no prefix", where=where, fix="save it with PEFT once more")
    method = Prefix(tokens=len(found), init="random")
    method.adapt(model)
    method.load_trained(model, {NAME: found}, where=where)
    return method.model_copy(update={"init": "text"})
