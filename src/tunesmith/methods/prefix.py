"""Prefix tuning (Li & Liang 2021, section 4.2): trained keys and values before every row, at every layer.

As in prompt tuning the prefix is tokens behind the vocabulary; their keys and values are trained, and what flows
through the layers at their places is read by nobody. Saved as PEFT saves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from tunesmith.models.decoder import Decoder, decoder_of, shape_obstacle

PEFT_TYPE = "PREFIX_TUNING"
TEXT = (
    "Read what follows with care. Think about what is asked, and in which form it is wanted. Then answer it exactly in "
    "that form, completely and correctly, without anything that was not asked for."
)
"""What a prefix starts from when no text is given: random numbers are far worse (Li & Liang 2021, section 7.4)."""


class PrefixedEmbedding(PromptedEmbedding):
    """An embedding table for the tokens of a prefix too, and their keys and values.

    Attributes:
        prompt: fp32 ``[tokens, layers * 2 * key_heads * head_dim]``: keys and values of each layer in turn, the keys
            with their positions rotated in.
    """

    def __init__(self, base: nn.Embedding, prompt: Tensor, heads: tuple[int, int]) -> None:
        super().__init__(base, prompt)
        self.heads = heads

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.base(token_ids.masked_fill(token_ids >= self.base.num_embeddings, 0))

    def before_attention(self, token_ids: Tensor) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What puts the prefix in the place of keys and values ``[tokens, key_heads, head_dim]`` of a layer."""
        own = (token_ids >= self.base.num_embeddings)[:, None, None]
        chosen = F.embedding((token_ids - self.base.num_embeddings).clamp(min=0), self.prompt)
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

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 1e-3
    """Not tuned; 0.01 moved a start from text too far on the demo."""

    def adapt(self, model: nn.Module) -> list[str]:
        refuse_adapted(model)
        refuse_task_head(model, "prefix")
        obstacle = shape_obstacle(model)
        if obstacle is not None:
            raise InputError(
                f"prefix tuning needs blocks of the Llama shape, and {obstacle}",
                where="method.kind",
                fix="use prompt, adapter or lora",
            )
        freeze(model)
        table = cast(Any, model).get_input_embeddings()
        sizes = Decoder(model)
        heads = (sizes.key_heads, sizes.head_dim)
        width = sizes.layers * 2 * heads[0] * heads[1]
        start = torch.randn(self.tokens, width) * 0.02
        if table.weight.is_meta:
            start = start.to("meta")
        elif self.init == "text":
            start = self._of_text(model)
        cast(Any, model).set_input_embeddings(PrefixedEmbedding(table, start.to(table.weight.device), heads))
        return []

    def _of_text(self, model: nn.Module) -> Tensor:
        """Keys and values that the base has for a text, fp32 ``[tokens, layers * 2 * key_heads * head_dim]``."""
        decoder = decoder_of(model)
        if isinstance(decoder, str):
            raise InputError(f"prefix tuning needs the fused blocks, and {decoder}", where="method.kind")
        token_ids = text_ids(model, self.text or TEXT, self.tokens)
        seen: list[Tensor] = []
        segments = torch.tensor([[0, self.tokens, -1]])

        def recording(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen.append(torch.stack([key, value], dim=1).detach().float().flatten(1))
            return decoder.within(segments)(layer, query, key, value)

        device = next(model.parameters()).device
        with torch.no_grad():
            decoder.hidden(token_ids.to(device), torch.arange(self.tokens, device=device), recording)
        return torch.cat(seen, dim=1)

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        embedding = prompted(model)
        return {} if embedding is None else {NAME: embedding.prompt}

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        embedding = cast(PrefixedEmbedding, prompted(model))
        prompt = embedding.prompt.detach().cpu().contiguous()
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
