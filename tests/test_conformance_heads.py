"""What every method promises, on encoders with a head: BERT-, DistilBERT- and ModernBERT-like, and a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from task_rows import build_trunk
from tunesmith.base import InputError
from tunesmith.batch import Batch, Example, pack
from tunesmith.methods import Adapter, Full, HeadOnly, Ia3, Lora, Peft, Prefix, Prompt, trainable_parameters
from tunesmith.methods.adapted import merge_layers, without_adapter
from tunesmith.methods.adapter_files import load_adapter
from tunesmith.methods.bottleneck import bottlenecks
from tunesmith.methods.method import task_head_tensors
from tunesmith.models.load import Loading, load_judge
from tunesmith.models.measure import meta_model
from tunesmith.models.task_head import TaskHead
from tunesmith.objectives import Classify, Tag
from tunesmith.recipe import TrainSpec
from tunesmith.train.loop import step
from tunesmith.train.optim import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS: dict[str, Any] = {
    "full": Full(),
    "norms": Full(weights="norms"),
    "head": HeadOnly(),
    "lora": Lora(rank=4),
    "dora": Lora(rank=4, dora=True),
    "houlsby": Adapter(size=4),
    "pfeiffer": Adapter(size=4, placement="pfeiffer"),
    "ia3": Ia3(),
    "loha": Peft.model_validate({"type": "loha", "r": 4, "target_modules": "all-linear"}),
}
FAMILIES = ("bert", "distilbert", "modernbert", "llama")
LABELS = ("a", "b", "c")
OBJECTIVES = {"sequence": Classify(labels=list(LABELS)), "token": Tag(labels=list(LABELS))}


@pytest.fixture(scope="module", params=FAMILIES)
def trunk(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_trunk(tmp_path_factory.mktemp("trunks") / request.param, request.param, initializer_range=0.3)


def loaded(trunk: Path, kind: Any) -> nn.Module:
    torch.manual_seed(5)
    model, *_ = load_judge(str(trunk), TaskHead(kind, LABELS), Loading(torch.float32, torch.device("cpu")))
    return without_dropout(model)


def without_dropout(model: nn.Module) -> nn.Module:
    """Splitting a batch draws other masks; what is tested here is arithmetic."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def objective_for(model: nn.Module, kind: str) -> Any:
    from tunesmith.models.task_head import head_of

    head = head_of(model)
    assert head is not None
    return OBJECTIVES[kind].model_copy(update={"pooling": head.pooling} if kind == "sequence" else {})


def rows(kind: str) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (9, 17, 12, 30):
        weights = torch.zeros(length)
        weights[slice(length - 1, None) if kind == "sequence" else slice(1, None, 3)] = 1.0
        labels = torch.randint(3, (int(weights.sum()),), generator=generator)
        tensors = {"target_weights": weights, "labels": labels}
        ids = torch.randint(5, 60, (length,), generator=generator)
        found.append(Example(ids, tensors, {"target_weights": "token", "labels": "target"}))
    return found


def outputs(model: nn.Module, kind: str, layout: Any = "packed") -> Tensor:
    with torch.no_grad():
        return objective_for(model, kind).outputs(model, pack(rows(kind), layout))


def gradient(model: nn.Module, kind: str, batches: list[Batch]) -> Tensor:
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.0)
    step(model, objective_for(model, kind), optimizer, batches, clip=None)
    found = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("name", METHODS)
def test_every_promise_holds(name: str, kind: Any, trunk: Path, tmp_path: Path) -> None:
    method, base = METHODS[name], loaded(trunk, kind)
    of_base, model = outputs(base, kind), loaded(trunk, kind)
    planned = meta_model(base.config, str(trunk), TaskHead(kind, LABELS))  # type: ignore[arg-type]
    method.adapt(planned)
    torch.manual_seed(3)
    method.adapt(model)
    counts = [sum(p.numel() for p in trainable_parameters(some).values()) for some in (planned, model)]
    assert counts[0] == counts[1] > 0
    assert set(task_head_tensors(model)) <= set(trainable_parameters(model))
    assert torch.allclose(outputs(model, kind), of_base, atol=1e-2 if bottlenecks(model) else 2e-5)

    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, TrainSpec(), 5e-3, method.rates(model))
    losses = [step(model.train(), objective_for(model, kind), optimizer, [pack(rows(kind))]).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    model.eval()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[key]), key
    expected = outputs(model, kind)
    assert torch.allclose(outputs(model, kind, "padded"), expected, atol=3e-4)
    together = gradient(model, kind, [pack(rows(kind))])
    for layout in ("packed", "padded"):
        apart = gradient(model, kind, [pack(rows(kind)[:1], layout), pack(rows(kind)[1:], layout)])
        assert torch.allclose(apart, together, atol=1e-4 * float(together.abs().max()) + 1e-6)

    method.save(model, tmp_path, base=str(trunk))
    if method.saved_as == "model":
        found = load_judge(str(tmp_path), TaskHead(kind, LABELS), Loading(torch.float32, torch.device("cpu")))
        assert not found.is_new
        assert torch.allclose(outputs(found.model, kind), expected, atol=1e-5)
        return
    again = loaded(trunk, kind)
    load_adapter(again, tmp_path)
    assert torch.allclose(outputs(again, kind), expected, atol=3e-4)
    with without_adapter(model):  # the head is no adapter, and stays
        assert not torch.allclose(outputs(model, kind), expected, atol=1e-4)
    if bottlenecks(model):
        with pytest.raises(InputError, match="cannot be merged"):
            merge_layers(model)
        return
    assert merge_layers(model) > 0
    assert torch.allclose(outputs(model, kind), expected, atol=1e-3)


@pytest.mark.parametrize("method", [Prompt(tokens=3), Prefix(tokens=3)])
def test_methods_without_a_place_for_a_head_say_so(method: Any, trunk: Path) -> None:
    with pytest.raises(InputError, match="keeps no head"):
        method.adapt(loaded(trunk, "sequence"))
