"""Every kind of method by changing `method:` alone; and what cannot be, each one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import build_model
from tunesmith.cli import main

KINDS: dict[str, Any] = {
    "full": {"kind": "full"},
    "norms": {"kind": "full", "weights": "norms"},
    "head": {"kind": "head"},
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "dora": True},
    "rslora": {"kind": "lora", "rslora": True},
    "pissa": {"kind": "lora", "init": "pissa"},
    "lora+": {"kind": "lora", "plus_ratio": 16},
    "quantization-aware": {"kind": "lora", "quantization_aware": True},
    "qlora": {"kind": "qlora"},
    "adapter": {"kind": "adapter"},
    "prefix": {"kind": "prefix"},
    "prompt": {"kind": "prompt"},
    "ia3": {"kind": "ia3"},
    "peft": {"kind": "peft", "type": "loha", "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 4-bit weights need 64 in a row."""
    return build_model(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=64)


class Job:
    def __init__(self, root: Path, model: Path, rows: Path, captured: pytest.CaptureFixture[str]) -> None:
        self.root, self.captured = root, captured
        self.recipe: dict[str, Any] = {
            "model": str(model),
            "data": {"train": str(rows), "checks": False},
            "train": {"steps": 2, "batch_size": 4, "dtype": "fp32"},
            "evaluate": "off",
            "output": "run",
        }

    def tunesmith(self, *arguments: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setenv("COLUMNS", "160")
            patch.setattr("sys.argv", ["tunesmith", *arguments])
            with pytest.raises(SystemExit) as left:
                main()
        said = self.captured.readouterr()
        return int(left.value.code or 0), said.err + said.out

    def train(self, method: dict[str, Any], **changes: Any) -> tuple[int, str]:
        recipe = {**self.recipe, "method": method, **changes}
        (self.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return self.tunesmith("train", "recipe.yaml")


@pytest.fixture
def job(wide_model: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path, wide_model, rows_file, capsys)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_trains(name: str, job: Job) -> None:
    code, text = job.train(KINDS[name])
    assert code == 0, text
    assert (job.root / "run" / "report.json").is_file()


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ({"kind": "lora", "rank": 0}, {}, ["method.rank", "greater than 0"]),
        ({"kind": "lora", "targets": ["q_prj"]}, {}, ["'q_prj' matches no", "did you mean 'q_proj'"]),
        (
            {"kind": "lora", "dora": True, "targets": ["embed_tokens"]},
            {"quantize": "nf4"},
            ["DoRA cannot change quantized embeddings", "method.dora"],
        ),
        ({"kind": "lora", "alpha": -1}, {}, ["method.alpha", "greater than 0"]),
        ({"kind": "lorra"}, {}, ["unknown kind 'lorra'; did you mean 'lora'"]),
        ({"kind": "lora", "tokens": 3}, {}, ["method.tokens"]),
        ({"kind": "prefix", "tokens": 0}, {}, ["method.tokens", "greater than 0"]),
        ({"kind": "adapter", "size": 0}, {}, ["method.size"]),
        ({"kind": "full"}, {"quantize": "nf4"}, ["quantize"]),
        ({"kind": "peft", "type": "lohaa"}, {}, ["did you mean 'loha'", "method.type"]),
        ({"kind": "lora", "init": "loftq"}, {}, ["method.init", "model.quantize: nf4"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_clear_error(
    method: dict[str, Any], changes: dict[str, Any], said: list[str], job: Job
) -> None:
    model = {"path": job.recipe["model"], **changes}
    code, text = job.train(method, model=model)
    assert code == 2, text
    assert text.count("error") == 1 and "Traceback" not in text, text
    for part in said:
        assert part in text
    assert not (job.root / "run").exists()


@pytest.mark.parametrize("name", ["prefix", "prompt", "adapter"])
def test_merging_what_no_weight_can_hold(name: str, job: Job) -> None:
    assert job.train(KINDS[name])[0] == 0
    code, text = job.tunesmith("merge", "run", "merged")
    assert code == 2 and "cannot be merged" in text and text.count("error") == 1, text
    assert not (job.root / "merged").exists()


@pytest.mark.parametrize("name", ["full", "head"])
def test_merging_what_is_plain_already(name: str, job: Job) -> None:
    assert job.train(KINDS[name])[0] == 0
    code, text = job.tunesmith("merge", "run", "merged")
    assert code == 2 and "no adapter to merge" in text, text
