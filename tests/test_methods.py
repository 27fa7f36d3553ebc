"""What the methods make trainable, against PEFT; adapters on disk, both ways; merging."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_rows, shake, tiny, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tunesmith.base import InputError
from tunesmith.batch import pack
from tunesmith.compose.merge import merge, merge_and_check
from tunesmith.methods import Full, Lora, trainable_parameters
from tunesmith.methods.lora import PEFT_PREFIX, load_adapter, lora_layers
from tunesmith.models.forward import next_token_logits

pytestmark = pytest.mark.filterwarnings("ignore")


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


@each_case
def test_same_logits_and_gradients_as_peft(case: Case) -> None:
    ours = adapted(case)
    theirs = get_peft_model(case.base(), LoraConfig(**{"lora_alpha": 32, **case.peft}))
    own = case.ours.trained_tensors(ours)
    twins = dict(theirs.named_parameters())
    trainable = {name for name, parameter in twins.items() if parameter.requires_grad}
    assert {peft_name(name) for name in own} == trainable
    with torch.no_grad():
        for name, tensor in own.items():
            twins[peft_name(name)].copy_(tensor)
    found, expected = logits_of(ours), peft_logits(theirs)
    assert_same(found, expected)
    with torch.no_grad():
        assert_moved(found, logits_of(case.base()))
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, tensor in own.items():
        gradient, reference = tensor.grad, twins[peft_name(name)].grad
        assert gradient is not None and reference is not None and reference.any()
        assert_same(gradient, reference)
    assert not [name for name, p in ours.named_parameters() if p.grad is not None and not p.requires_grad]


@each_case
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    ours = adapted(case)
    case.ours.save(ours, tmp_path, base="somewhere/base")
    with torch.no_grad():
        expected = logits_of(ours)
        assert_same(peft_logits(PeftModel.from_pretrained(case.base(), tmp_path)), expected)
        again = case.base()
        loaded = load_adapter(again, tmp_path)
        assert_same(logits_of(again), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    loaded.save(again, tmp_path / "second", base="somewhere/base")
    one, two = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with torch.no_grad():
        assert_same(peft_logits(PeftModel.from_pretrained(case.base(), tmp_path / "second")), expected)


@each_case
def test_what_peft_saves_we_load(case: Case, tmp_path: Path) -> None:
    theirs = get_peft_model(case.base(), LoraConfig(**{"lora_alpha": 32, **case.peft}))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = case.base()
    load_adapter(ours, tmp_path)
    with torch.no_grad():
        found = logits_of(ours)
        assert_same(found, peft_logits(theirs.eval()))
        assert_moved(found, logits_of(case.base()))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@each_case
def test_merged_equals_adapter_and_is_plain(case: Case, tmp_path: Path) -> None:
    model, base = adapted(case), case.base()
    with torch.no_grad():
        expected = logits_of(model)
        merge(model)
        assert_same(logits_of(model), expected, 1e-4)
    assert not lora_layers(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base.state_dict()[name])}
    targets = {f"{name}.weight" for name in lora_layers(adapted(case))}
    assert changed == targets
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same(logits_of(reloaded), expected, 1e-4)


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
    model = tiny(**overrides).to(dtype)
    method.adapt(model)
    shake(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.3)
    return model


@each_whole
def test_whole_modules_beside_adapters(whole: list[str], overrides: dict[str, Any], tmp_path: Path) -> None:
    method = Lora(rank=4, targets="qv", modules_to_save=whole)
    model, base = trained_whole(method, overrides), tiny(**overrides)
    with torch.no_grad():
        expected = logits_of(model)
        method.save(model, tmp_path, base="b")
        assert_same(peft_logits(PeftModel.from_pretrained(tiny(**overrides), tmp_path)), expected)
        again = tiny(**overrides)
        load_adapter(again, tmp_path)
        assert_same(logits_of(again), expected)
        merge(again)
        assert_same(logits_of(again), expected, 1e-4)
        assert again.state_dict().keys() == base.state_dict().keys()
        again.save_pretrained(tmp_path / "merged")
        assert_same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected, 1e-4)
    if overrides is TIED and "norm" not in whole[0]:
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


@pytest.mark.parametrize("tying", [False, True], ids=["copies", "ensure_weight_tying"])
@pytest.mark.parametrize("kind", ["modules_to_save", "target_modules"])
@each_whole
def test_whole_modules_from_peft(
    whole: list[str], overrides: dict[str, Any], kind: str, tying: bool, tmp_path: Path
) -> None:
    names = [name.replace(r"model\.", "model.") for name in whole]
    if kind == "target_modules" and "norm" in whole[0]:
        pytest.skip("PEFT has no LoRA of a norm")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "r": 4, "ensure_weight_tying": tying}
    settings[kind] = names if kind == "modules_to_save" else ["q_proj", *names]
    theirs = get_peft_model(tiny(**overrides), LoraConfig(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft_logits(PeftModel.from_pretrained(tiny(**overrides), tmp_path).eval())
        ours = tiny(**overrides)
        method = load_adapter(ours, tmp_path)
        assert_same(logits_of(ours), expected)
        method.save(ours, tmp_path / "again", base="b")
        second = tiny(**overrides)
        load_adapter(second, tmp_path / "again")
        assert_same(logits_of(second), expected)
        merge(second)
        assert_same(logits_of(second), expected, 1e-4)
