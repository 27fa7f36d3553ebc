"""The same adapters in our words and in PEFT's, and how two models are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny import random_rows, shake, tiny
from tunesmith.batch import pack
from tunesmith.methods import Lora, trainable_parameters
from tunesmith.models.forward import next_token_logits


@dataclass(frozen=True)
class Case:
    """The same adapter in our words and in PEFT's."""

    name: str
    ours: Lora
    peft: dict[str, Any]
    model_type: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        return tiny(self.model_type, **self.model)


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

PATTERNS = {
    "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.v_proj": 3, "mlp.*": 5},
    "alpha_pattern": {"q_proj": 3.0, r"model\.layers\.0\..*": 5.0},
}

CASES = [
    Case("llama", Lora(rank=4, alpha=8), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    Case("qv", Lora(rank=4, targets="qv"), {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    Case("mlp", Lora(rank=4, targets="mlp"), {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    Case(
        "one layer",
        Lora(rank=4, targets=[r"layers\.1\.self_attn\.[qk]_proj"]),
        {"r": 4, "target_modules": r".*layers\.1\.self_attn\.[qk]_proj"},
    ),
    Case(
        "patterns",
        Lora(rank=4, alpha=8, targets="all-linear", **PATTERNS),
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **PATTERNS},
    ),
    Case(
        "rslora",
        Lora(rank=4, rslora=True, rank_pattern={"k_proj": 2}),
        {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 2}},
    ),
    Case("gpt2", Lora(rank=4), {"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True}, "gpt2"),
    Case(
        "gpt2 attention",
        Lora(rank=4, targets="attention"),
        {"r": 4, "target_modules": r".*attn\.(c_attn|c_proj)", "fan_in_fan_out": True},
        "gpt2",
    ),
    Case(
        "gpt2 and its head",
        Lora(rank=4, targets=["c_attn", "lm_head"]),
        {"r": 4, "target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True},
        "gpt2",
    ),
    Case(
        "phi3 fused",
        Lora(rank=4, targets="attention"),
        {"r": 4, "target_modules": ["qkv_proj", "o_proj"]},
        "phi3",
    ),
    Case("gemma3", Lora(rank=4), {"r": 4, "target_modules": "all-linear"}, "gemma3_text"),
    Case("mixtral", Lora(rank=4, targets="attention"), {"r": 4, "target_modules": r".*self_attn\..*_proj"}, "mixtral"),
    Case(
        "embedding",
        Lora(rank=4, targets=["embed_tokens", "q_proj"]),
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        model=UNTIED,
    ),
    Case(
        "embedding, tied",
        Lora(rank=4, targets=["embed_tokens", "q_proj"]),
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        model=TIED,
    ),
    Case(
        "scaled embedding",
        Lora(rank=4, targets=["embed_tokens"]),
        {"r": 4, "target_modules": ["embed_tokens"]},
        "gemma3_text",
    ),
    Case(
        "head",
        Lora(rank=4, targets=["lm_head", "q_proj"]),
        {"r": 4, "target_modules": ["lm_head", "q_proj"]},
        model=UNTIED,
    ),
    Case(
        "head, tied",
        Lora(rank=4, targets=["lm_head", "q_proj"]),
        {"r": 4, "target_modules": ["lm_head", "q_proj"]},
        model=TIED,
    ),
    Case(
        "both ends, tied",
        Lora(rank=4, targets=["lm_head", "embed_tokens"]),
        {"r": 4, "target_modules": ["lm_head", "embed_tokens"]},
        model=TIED,
    ),
]

BATCH = pack(random_rows([11, 6]))

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def logits_of(model: nn.Module) -> Tensor:
    """Of our own model, packed."""
    return next_token_logits(model, BATCH, torch.arange(BATCH.tokens))


def peft_logits(model: Any) -> Tensor:
    """Of PEFT's model, each row alone."""
    rows = [BATCH.token_ids[start : start + length] for start, length, _ in BATCH.segments.tolist()]
    return torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def assert_moved(found: Tensor, base: Tensor) -> None:
    """Guards against comparing two models that both ignored the adapter."""
    assert float((found - base).abs().max()) > 1e-2 * float(base.abs().max())


def peft_name(name: str) -> str:
    """The name of a saved tensor inside PEFT's model, where adapters have names."""
    for suffix in ("lora_A.weight", "lora_B.weight"):
        if name.endswith(suffix):
            return name.removesuffix("weight") + "default.weight"
    return f"{name}.default"


def adapted(case: Case, method: Lora | None = None) -> nn.Module:
    model = case.base()
    (method or case.ours).adapt(model)
    return shake(model)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


WHOLE = [
    ("embedding, tied", ["embed_tokens"], TIED),
    ("head, tied", ["lm_head"], TIED),
    ("both, tied", ["embed_tokens", "lm_head"], TIED),
    ("both, untied", ["embed_tokens", "lm_head"], UNTIED),
    ("head, untied", ["lm_head"], UNTIED),
    ("norm", [r"model\.norm"], UNTIED),
]

each_whole = pytest.mark.parametrize(("whole", "overrides"), [w[1:] for w in WHOLE], ids=[w[0] for w in WHOLE])


def trained_whole(method: Lora, overrides: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny(dtype=dtype, **overrides)
    method.adapt(model)
    shake(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    return model
