"""Prompt tuning (Lester et al. 2021, section 2): a few trained embeddings before every row, and nothing else.

They are tokens of their own behind the vocabulary, so that packing, generation and its cache treat them as tokens.
Saved as PEFT saves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.method import AdaptationMethod, freeze, refuse_adapted, refuse_task_head
from tunesmith.models.load import load_tokenizer

PEFT_TYPE = "PROMPT_TUNING"
NAME = "prompt_embeddings"
COMMON = 5000
"""Tokens from which a start is sampled: those with the smallest ids, which are the most common ones of a vocabulary."""


class PromptedEmbedding(nn.Module):
    """An embedding table with rows for tokens that only this adapter has.

    Attributes:
        base: the frozen table.
        prompt: fp32 ``[tokens, width]``.
        prompt_ids: ids of those tokens, which every row begins with.
    """

    is_adapter: ClassVar[bool] = True

    def __init__(self, base: nn.Embedding, prompt: Tensor) -> None:
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(prompt)
        self.prompt_ids = self._all_ids()

    def _all_ids(self) -> list[int]:
        return list(range(self.base.num_embeddings, self.base.num_embeddings + len(self.prompt)))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        own = token_ids >= self.base.num_embeddings
        hidden = self.base(token_ids.masked_fill(own, 0))
        prompt = F.embedding((token_ids - self.base.num_embeddings).clamp(min=0), self.prompt)
        return torch.where(own[..., None], prompt.to(hidden.dtype), hidden)

    @contextmanager
    def without_prompt(self) -> Iterator[None]:
        self.prompt_ids = []
        try:
            yield
        finally:
            self.prompt_ids = self._all_ids()


class Prompt(AdaptationMethod):
    """Trained embeddings before every row."""

    kind: Literal["prompt"] = "prompt"
    """Train a few embeddings that stand before every row."""
    tokens: PositiveInt = 20
    """How many; Lester et al. 2021 (section 3.2) find little gain beyond 20."""
    text: str | None = None
    """What they start from: the embeddings of this text, cut or repeated to fit, such as what the model should do."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Without `text`: embeddings of common tokens, or small random numbers, which Lester et al. find worse."""

    saved_as: ClassVar[str] = "adapter"
    default_learning_rate: ClassVar[float] = 3e-3
    """Not tuned for long runs. Of 1e-3, 3e-3 and 1e-2 the loss of the demo fell further the higher the rate, in runs
    of 16 steps (`bench/prompt_rates.py`); the 0.3 of Lester et al. and the 0.03 of PEFT's guide moved a start from
    text too far there."""

    def adapt(self, model: nn.Module) -> list[str]:
        refuse_adapted(model)
        refuse_task_head(model, "prompt")
        freeze(model)
        table = cast(Any, model).get_input_embeddings()
        cast(Any, model).set_input_embeddings(PromptedEmbedding(table, self._start(model, table)))
        return []

    def _start(self, model: nn.Module, table: nn.Embedding) -> Tensor:
        weight = table.weight.detach()
        if self.text is None and self.init == "random":
            drawn = torch.randn(self.tokens, weight.shape[1]) * 0.02
            return drawn.to(weight.device, torch.float32)
        ids = torch.randint(min(COMMON, len(weight)), (self.tokens,))
        if self.text is not None and not weight.is_meta:
            ids = text_ids(model, self.text, self.tokens)
        return weight[ids.to(weight.device)].float().clone()

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        embedding = prompted(model)
        return {} if embedding is None else {NAME: embedding.prompt}

    def save(self, model: nn.Module, directory: Path, *, base: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        prompt = self.trained_tensors(model)[NAME].detach().cpu().contiguous()
        save_file({NAME: prompt}, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        text = cast(Any, model).config.get_text_config()
        config = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "num_virtual_tokens": len(prompt),
            "token_dim": int(prompt.shape[1]),
            "num_transformer_submodules": 1,
            "num_attention_heads": int(text.num_attention_heads),
            "num_layers": int(text.num_hidden_layers),
            "prompt_tuning_init": "RANDOM",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def text_ids(model: nn.Module, text: str, count: int) -> Tensor:
    """The first ``count`` token ids of a text for a model, int64; a shorter text is repeated."""
    said = load_tokenizer(cast(Any, model).name_or_path).encode(text, add_special_tokens=False)
    if not said:
        raise InputError("the text has no tokens", where="method.text", fix="write what the model should do")
    return torch.tensor([said[at % len(said)] for at in range(count)])


def prompted(model: nn.Module) -> PromptedEmbedding | None:
    found = cast(Any, model).get_input_embeddings()
    return found if isinstance(found, PromptedEmbedding) else None


@contextmanager
def without_prompt(model: nn.Module) -> Iterator[None]:
    """Runs the model as if it had no prompt."""
    embedding = prompted(model)
    if embedding is None:
        yield
        return
    with embedding.without_prompt():
        yield


def load_prompt(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], where: Path) -> Prompt:
    """Adapts ``model`` by a prompt that PEFT or Tunesmith saved, and returns its method.

    Raises:
        InputError: when the file belongs to another model.
    """
    found = tensors.get(NAME)
    width = cast(Any, model).get_input_embeddings().weight.shape[1]
    if found is None or found.dim() != 2 or found.shape[1] != width:
        raise InputError(
            f"the prompt does not fit: {None if found is None else list(found.shape)} for a width of {width}",
            where=where,
            fix=f"load it on the model it was trained on: {config.get('base_model_name_or_path')}",
        )
    method = Prompt(tokens=len(found))
    method.adapt(model)
    method.load_trained(model, {NAME: found}, where=where)
    return method
