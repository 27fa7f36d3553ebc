"""What every method promises: one table, one row a method; PEFT is the oracle where it knows the method."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tiny import random_rows, tiny
from tunesmith.base import InputError
from tunesmith.batch import Batch, pack
from tunesmith.methods import Adapter, Full, Ia3, Lora, Peft, Prefix, Prompt, QLora, trainable_parameters
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.bottleneck import bottlenecks
from tunesmith.methods.low_rank import lora_layers
from tunesmith.models.forward import next_token_logits
from tunesmith.models.load import load_model
from tunesmith.models.quantized import quantization
from tunesmith.objectives import Supervised
from tunesmith.recipe import GroupSpec, TrainSpec
from tunesmith.train.checkpoint import Checkpoints, Saved
from tunesmith.train.loop import Progress, step
from tunesmith.train.optim import build_optimizer, optimizer_tensors, restore_optimizer, set_learning_rate
from tunesmith.train.precision import Precision
from tunesmith.train.randomness import random_states_of_all

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {"target_modules": "all-linear"}


def peft(kind: str, **settings: Any) -> Peft:
    return Peft.model_validate({"type": kind, **settings})


METHODS: dict[str, Any] = {
    "full": Full(),
    "norms": Full(weights="norms"),
    "block": Full(weights=[r"layers\.1\..*"], layer_decay=0.8),
    "lora": Lora(rank=4),
    "lora-plus": Lora(rank=4, plus_ratio=4.0),
    "qlora": QLora(rank=4),
    "loftq": QLora(rank=4, init="loftq"),
    "aware": Lora(rank=4, quantization_aware="q4_0"),
    "houlsby": Adapter(size=4),
    "pfeiffer": Adapter(reduction=8, placement="pfeiffer", activation="relu"),
    "parallel": Adapter(size=4, placement="parallel", activation="silu"),
    "prompt": Prompt(tokens=5),
    "prefix": Prefix(tokens=5, init="random"),
    "prefix-mlp": Prefix(tokens=5, init="random", reparameterize=16),
    "ia3": Ia3(),
    "dora": Lora(rank=4, dora=True),
    "pissa": Lora(rank=4, init="pissa"),
    "olora": Lora(rank=4, init="olora"),
    "gaussian": Lora(rank=4, init="gaussian"),
    "loha": peft("loha", r=4, **ALL),
    "lokr": peft("lokr", r=4, **ALL),
    "oft": peft("oft", oft_block_size=4, **ALL),
    "hra": peft("hra", r=4, **ALL),
    "miss": peft("miss", r=4, **ALL),
    "ln_tuning": peft("ln_tuning", target_modules=["input_layernorm"]),
    "fourierft": peft("fourierft", n_frequency=16, init_weights=True, **ALL),
}
WHOLE = {"full", "norms", "block"}
"""They change the model itself, and leave nothing to read, merge or take off."""
BOTTLENECKS = {"houlsby", "pfeiffer", "parallel"}
BEFORE = {"prompt", "prefix", "prefix-mlp"}
"""They add tokens, so that the model never is its base."""
OVER_4_BITS = {"qlora", "loftq"}
"""Their base is quantized, and takes no update."""
STARTS_ELSEWHERE = BEFORE | {"loftq", "aware"}
"""LoftQ starts between the quantized base and the one before; a rounded base is not the base."""
every_method = pytest.mark.parametrize("name", METHODS)
every_adapter = pytest.mark.parametrize("name", [name for name in METHODS if name not in WHOLE])
ROWS = random_rows((9, 17, 12, 30))


@functools.cache
def saved(overrides: tuple[tuple[str, Any], ...]) -> str:
    path = tempfile.mkdtemp(prefix="conformance-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    tiny(**dict(overrides)).save_pretrained(path)
    return path


def base_of(name: str, **overrides: Any) -> Any:
    """What a method is put into."""
    if name not in OVER_4_BITS or torch.get_default_device().type == "meta":
        return tiny(**overrides)
    pytest.importorskip("bitsandbytes")
    dtype = overrides.get("dtype", torch.float32)
    device = torch.device("cpu")
    return load_model(saved(tuple(overrides.items())), dtype=dtype, device=device, quantized=quantization("nf4"))


def adapted(name: str, **overrides: Any) -> nn.Module:
    model = base_of(name, **overrides)
    torch.manual_seed(3)
    METHODS[name].adapt(model)
    return model


def logits(model: nn.Module, batch: Batch | None = None) -> Tensor:
    batch = batch or pack(ROWS)
    with torch.no_grad():
        return next_token_logits(model.eval(), batch, torch.arange(batch.tokens)).float()


def trained(name: str, steps: int = 3, **overrides: Any) -> nn.Module:
    model = adapted(name, **overrides).train()
    method = METHODS[name]
    optimizer = build_optimizer(model, TrainSpec(), 2e-2, method.rates(model))
    for _ in range(steps):
        assert step(model, Supervised(), optimizer, [pack(ROWS)]).applied
    return model.eval()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in STARTS_ELSEWHERE])
def test_it_starts_where_the_base_is(name: str) -> None:
    expected = logits(base_of(name))
    # Bottlenecks: near identity, as their paper has it. The others to rounding, which grows with the logits: what an
    # initialisation takes off the base and adds again is several times the base, and processors add in their own order.
    near = 1e-2 if name in BOTTLENECKS else 2e-5 * float(expected.abs().max())
    assert torch.allclose(logits(adapted(name)), expected, rtol=0.0, atol=near)


@every_method
def test_only_the_adapter_learns(name: str) -> None:
    model = adapted(name)
    before = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    wanted = {id(parameter) for parameter in trainable_parameters(model).values()}
    saved = METHODS[name].trained_tensors(model)
    parameters = {parameter.data_ptr() for parameter in trainable_parameters(model).values()}
    assert {tensor.data_ptr() for tensor in saved.values()} >= parameters and wanted
    optimizer = build_optimizer(model.train(), TrainSpec(), 2e-2)
    step(model, Supervised(), optimizer, [pack(ROWS)])
    for key, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[key])
        assert moved <= parameter.requires_grad, key
    assert any(not torch.equal(p, before[key]) for key, p in model.named_parameters())


@every_method
def test_the_plan_counts_what_is_trained(name: str) -> None:
    with torch.device("meta"):
        planned = base_of(name)
    planned.is_quantized = name in OVER_4_BITS
    METHODS[name].adapt(planned)
    counts = [sum(p.numel() for p in trainable_parameters(m).values()) for m in (planned, adapted(name))]
    assert counts[0] == counts[1] > 0


@every_method
def test_packed_is_padded_and_splitting_changes_nothing(name: str) -> None:
    model = trained(name)
    packed, padded = logits(model), logits(model, pack(ROWS, "padded"))
    assert torch.allclose(packed, padded, atol=2e-4)

    def gradient(batches: list[Batch]) -> Tensor:
        again = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(trainable_parameters(again).values(), lr=0.0)
        step(again, Supervised(), optimizer, batches, clip=None)
        return torch.cat([p.grad.reshape(-1) for p in trainable_parameters(again).values() if p.grad is not None])

    whole, parts = gradient([pack(ROWS)]), gradient([pack(ROWS[:1]), pack(ROWS[1:])])
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


@every_adapter
def test_peft_reads_what_is_written_and_it_is_read_back(name: str, tmp_path: Path) -> None:
    model = trained(name)
    METHODS[name].save(model, tmp_path, base="base")
    for layer in lora_layers(model).values():
        layer.grid = None  # what is written is the adapter, and not the rounding that it was trained through
    expected = logits(model)
    assert not torch.allclose(expected, logits(base_of(name)), atol=1e-3)
    if name not in BOTTLENECKS:
        theirs = PeftModel.from_pretrained(base_of(name), str(tmp_path)).eval()
        with torch.no_grad():
            logits_of = [theirs(input_ids=row.token_ids[None]).logits[0, -len(row) :] for row in ROWS]
            found = torch.cat(logits_of)
        assert torch.allclose(found, expected, atol=3e-4)
    again = base_of(name)
    method = load_adapter(again, tmp_path)
    assert torch.allclose(logits(again), expected, atol=3e-4)
    optimizer = build_optimizer(again.train(), TrainSpec(), 1e-2, method.rates(again))
    assert step(again, Supervised(), optimizer, [pack(ROWS)]).applied


@every_adapter
def test_merged_is_the_adapter(name: str) -> None:
    model = trained(name)
    for layer in lora_layers(model).values():
        layer.grid = None
    expected, base = logits(model), logits(base_of(name))
    with without_adapter(model):
        if name not in ("pissa", "olora"):  # whose base is what is left of it
            assert torch.allclose(logits(model), base, atol=2e-5)
    if name in BOTTLENECKS or name in BEFORE:
        with pytest.raises(InputError, match="cannot be merged"):
            merge_layers(model)
        return
    if name in OVER_4_BITS:
        with pytest.raises(InputError, match="is quantized"):
            merge_layers(model)
        return
    assert merge_layers(model) > 0
    assert torch.allclose(logits(model), expected, atol=5e-4)
    assert model.state_dict().keys() == tiny().state_dict().keys()


FAMILIES = ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt2"]
IN_FAMILIES = ["full", "lora", "houlsby", "pfeiffer", "parallel", "prompt", "prefix", "ia3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IN_FAMILIES)
def test_it_holds_in_other_families(name: str, family: str, tmp_path: Path) -> None:
    """One trained model for everything, so that the table stays quick."""
    method, base = METHODS[name], tiny(family)
    of_base, start = logits(base), adapted(name, model_type=family)
    with torch.device("meta"):
        planned = tiny(family)
    method.adapt(planned)
    counts = [sum(p.numel() for p in trainable_parameters(some).values()) for some in (planned, start)]
    assert counts[0] == counts[1] > 0
    if name not in BEFORE:
        assert torch.allclose(logits(start), of_base, atol=1e-2 if name in BOTTLENECKS else 2e-5)

    before = {key: parameter.detach().clone() for key, parameter in start.named_parameters()}
    model = trained(name, model_type=family)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[key]), key
    expected = logits(model)
    assert not torch.allclose(expected, of_base, atol=1e-3)
    assert torch.allclose(logits(model, pack(ROWS, "padded")), expected, atol=3e-4)

    method.save(model, tmp_path, base="base")
    if name in WHOLE:
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-5)
        return
    again = tiny(family)
    load_adapter(again, tmp_path)
    assert torch.allclose(logits(again), expected, atol=3e-4)
    if name not in BOTTLENECKS:
        theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
        with torch.no_grad():
            found = torch.cat([theirs(input_ids=row.token_ids[None]).logits[0, -len(row) :] for row in ROWS])
        assert torch.allclose(found, expected, atol=5e-4)
    with without_adapter(model):
        assert torch.allclose(logits(model), of_base, atol=2e-5)
    if name in BOTTLENECKS or name in BEFORE:
        with pytest.raises(InputError, match="cannot be merged"):
            merge_layers(model)
        return
    assert merge_layers(model) > 0
    assert torch.allclose(logits(model), expected, atol=1e-3)
    assert model.state_dict().keys() == base.state_dict().keys()


def saved_after(name: str, steps: int, from_checkpoint: Checkpoints | None = None) -> Saved:
    model, method = adapted(name).train(), METHODS[name]
    optimizer = build_optimizer(model, TrainSpec(), 1e-2, method.rates(model))
    saved = Saved(model, method, optimizer, Precision())
    if from_checkpoint is not None:
        from_checkpoint.restore(2, saved)
    for _ in range(steps):
        step(model, Supervised(), optimizer, [pack(ROWS)])
    return saved


@every_method
def test_a_resumed_run_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    expected = saved_after(name, 4).snapshot()
    checkpoints = Checkpoints(tmp_path, keep=1)
    states = random_states_of_all(torch.device("cpu"))
    checkpoints.save(Progress(step=2), saved_after(name, 2).snapshot(), states)
    found = saved_after(name, 2, checkpoints).snapshot()
    assert found.trained.keys() == expected.trained.keys()
    assert all(torch.equal(found.trained[key], expected.trained[key]) for key in expected.trained)
    assert all(torch.equal(found.optimizer[key], expected.optimizer[key]) for key in expected.optimizer)


@every_method
def test_recomputing_blocks_changes_nothing(name: str) -> None:
    def gradient(recomputes: bool) -> Tensor:
        model = adapted(name).train()
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.0)
        step(model, Supervised(), optimizer, [pack(ROWS)], clip=None)
        return torch.cat([p.grad.reshape(-1) for p in trainable_parameters(model).values() if p.grad is not None])

    plain = gradient(False)
    assert torch.allclose(plain, gradient(True), rtol=1e-4, atol=1e-6 * float(plain.abs().max()))


@every_method
def test_it_trains_in_bf16(name: str) -> None:
    if name in ("pissa", "olora"):
        pytest.skip("its decomposition needs a base in fp32")
    model = adapted(name, dtype=torch.bfloat16, initializer_range=0.06).train()
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    optimizer = build_optimizer(model, TrainSpec(), 2e-2, METHODS[name].rates(model))
    precision = Precision(torch.bfloat16, torch.device("cpu"), autocast=METHODS[name].needs_autocast)
    losses = [step(model, Supervised(), optimizer, [pack(ROWS)], precision=precision).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert logits(model).isfinite().all()  # outside of training there is no autocast


@pytest.mark.parametrize("model_type", ["qwen2", "mistral", "phi3", "gemma", "gpt2"])
def test_ia3_finds_its_layers_in_other_families(model_type: str) -> None:
    model = tiny(model_type)
    Ia3().adapt(model)
    layers = {name.partition(".ia3_l")[0].rsplit(".", 1)[-1] for name in trainable_parameters(model)}
    assert len(layers) >= 2


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (peft("lohaa", **ALL), "did you mean 'loha'"),
        (peft("loha", rank=4, **ALL), "has no setting 'rank'"),
        (peft("loha", r=0, **ALL), "r"),
        (peft("loha", target_modules=["nowhere"]), "nowhere"),
        (peft("prompt_tuning", num_virtual_tokens=4), "adds tokens"),
        (peft("adalora", **ALL), "a loop of its own"),
        (peft("lora"), "a method of its own"),
        (Ia3(targets=["nowhere"]), "nowhere"),
        (Full(weights="nowhere"), "matches no weight"),
        (Full(weights="biases"), "no biases"),
        (Lora(dora=True, targets=["nowhere"]), "nowhere"),
    ],
)
def test_what_cannot_be_is_one_clear_error(method: Any, said: str) -> None:
    model = tiny()
    with pytest.raises(InputError, match=said):
        method.adapt(model)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt2"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_bottlenecks_find_their_places_in_other_families(model_type: str, placement: Any) -> None:
    model = tiny(model_type)
    Adapter(size=4, placement=placement).adapt(model)
    assert len(bottlenecks(model)) == 2 * (2 if placement == "houlsby" else 1)
    optimizer = build_optimizer(model.train(), TrainSpec(), 1e-2)
    losses = [step(model, Supervised(), optimizer, [pack(ROWS)]).loss for _ in range(4)]
    assert losses[-1] < losses[0]


def test_lower_blocks_learn_more_slowly() -> None:
    model = tiny("gpt2")
    method = Full(layer_decay=0.5)
    method.adapt(model)
    rates = method.rates(model)
    assert rates["transformer.wte.weight"] == 0.25
    assert {name: rates[f"transformer.h.{name}.mlp.c_fc.weight"] for name in (0, 1)} == {0: 0.5, 1: 1.0}
    assert rates["transformer.ln_f.weight"] == 1.0
    optimizer = build_optimizer(model, TrainSpec(groups=[GroupSpec(match=r"h\.0\.", rate=2.0)]), 1.0, rates)
    set_learning_rate(optimizer, 0.1)
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found[id(model.get_parameter("transformer.h.0.mlp.c_fc.weight"))] == pytest.approx(0.1)
    assert found[id(model.get_parameter("transformer.wte.weight"))] == pytest.approx(0.025)


def test_states_of_the_optimizer_find_their_weights_in_other_groups() -> None:
    model = adapted("lora").train()
    one = build_optimizer(model, TrainSpec(), 1e-2)
    step(model, Supervised(), one, [pack(ROWS)])
    other = build_optimizer(model, TrainSpec(groups=[GroupSpec(match="lora_B", rate=2.0)]), 1e-2)
    restore_optimizer(other, *optimizer_tensors(one))
    for parameter in trainable_parameters(model).values():
        assert torch.equal(other.state[parameter]["exp_avg"], one.state[parameter]["exp_avg"])


def test_a_group_that_matches_nothing_is_refused() -> None:
    model = adapted("lora")
    with pytest.raises(InputError, match="nowhere"):
        build_optimizer(model, TrainSpec(groups=[GroupSpec(match="nowhere")]), 1e-3)


def test_a_second_adapter_is_refused() -> None:
    for first in ("loha", "lora", "houlsby", "prompt"):
        model = adapted(first)
        for method in (Ia3(), Lora(), Adapter(), Prompt()):
            with pytest.raises(InputError, match="already"):
                method.adapt(model)
