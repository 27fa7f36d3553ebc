"""The workers of `train_speed.py`: the same rows, adapter and settings for Tunesmith and for TRL.

    python bench/train_sides.py prepare|tunesmith|trl|gemm WORK.json

`prepare` writes what both sides get: the rows in the order of training, as messages and as token ids with their
targets, and the adapter's weights before the first update.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from turns import Turns

IGNORED = -100


def read_work(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(work: dict[str, Any]) -> None:
    """Writes ``rows.json``, ``shape.json`` (tokens and targets there are those of an average step) and ``adapter/``."""
    import torch

    from gemm_rate import layers_of
    from tunesmith.models.load import load_model
    from tunesmith.models.measure import meta_model, shape_of
    from tunesmith.pipeline.planning import plan_job
    from tunesmith.plan.hardware import DTYPES
    from tunesmith.recipe_file import read_recipe

    directory = Path(work["directory"])
    recipe = read_recipe(work["recipe"], work["set"])
    planned = plan_job(recipe)
    assert planned.prepared is not None
    prepared = planned.prepared
    rows = []
    for at in prepared.order.rows(0, recipe.train.batch_size * planned.plan.steps):
        rendered = prepared.train[at]
        targets = (rendered.example.tensors["target_weights"] > 0).int().tolist()
        messages = [dict(message) for message in rendered.row.messages]
        ids = rendered.example.token_ids.tolist()
        rows.append({"prompt": messages[:-1], "completion": messages[-1:], "input_ids": ids, "targets": targets})
    (directory / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shape = shape_of(meta_model(planned.config, planned.location))
    trainable = planned.plan.parameters.trainable
    tokens = sum(len(row["input_ids"]) for row in rows) // planned.plan.steps
    targets = sum(sum(row["targets"]) for row in rows) // planned.plan.steps
    layers = [vars(layer) for layer in layers_of(planned.location, tokens, targets)]
    found = {"location": planned.location, **vars(shape), "trainable": trainable}
    found |= {"tokens": tokens, "targets": targets, "layers": layers}
    (directory / "shape.json").write_text(json.dumps(found), encoding="utf-8")
    if recipe.method.kind == "lora":
        model = load_model(planned.location, dtype=DTYPES[planned.plan.frozen_dtype], device=torch.device("cpu"))
        torch.manual_seed(recipe.seed)  # as the pipeline does before it adapts the model
        recipe.method.adapt(model)
        recipe.method.save(model, directory / "adapter", base=planned.location)


def tunesmith(work: dict[str, Any], turns: Turns) -> None:
    """The whole pipeline, which decides everything by its plan; it is held where it tells of a step."""
    from tunesmith.cli.display import quiet_libraries
    from tunesmith.pipeline.finetune import Watcher, finetune
    from tunesmith.recipe_file import read_recipe
    from tunesmith.resolved import Plan

    quiet_libraries()

    def planned(plan: Plan) -> None:
        chosen = plan.model_dump(mode="json", exclude={"workload", "memory", "time", "notes"})
        turns.ready(plan=chosen, predicted_bytes=plan.memory.peak_bytes)

    def happened(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            turns.took({name: event[name] for name in ("loss", "targets", "tokens")})
        else:
            print(event, file=sys.stderr)

    finetune(read_recipe(work["recipe"], work["set"]), watcher=Watcher(event=happened, plan=planned))


def trl(work: dict[str, Any], turns: Turns) -> None:
    """`SFTTrainer.train()` as it is; it is held in a callback at the end of a step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    directory = Path(work["directory"])
    rows = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
    recorded: dict[str, Any] = {}

    class Recording(SFTTrainer):
        """Notes what a step was about; the training step itself is TRL's."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            targets = int((inputs["labels"] != IGNORED).sum())
            mask = inputs.get("attention_mask")
            tokens = int(inputs["input_ids"].numel() if mask is None else mask.sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            recorded.update(loss=float(loss), targets=targets, tokens=tokens)
            return loss

    class Held(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.ready(**facts)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.took(dict(recorded))

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    machine = {"use_cpu": not torch.cuda.is_available(), "save_strategy": "no", "report_to": "none"}
    config = SFTConfig(output_dir=str(directory / "trl"), **machine, **work["settings"])
    lora = work["lora"] and LoraConfig(r=work["lora"]["rank"], lora_alpha=work["lora"]["alpha"], **LORA)
    trainer = Recording(
        model=work["model"],
        args=config,
        train_dataset=Dataset.from_list([_labelled(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=lora or None,
        callbacks=[Held()],
    )
    model: Any = trainer.model
    if lora:
        loaded = set_peft_model_state_dict(model, load_file(directory / "adapter" / "adapter_model.safetensors"))
        if loaded.unexpected_keys or any("lora_" in name for name in loaded.missing_keys):
            raise SystemExit("the adapter does not fit TRL's model")
    facts = {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "settings": {key: value for key, value in config.to_dict().items() if not key.endswith("_dir")},
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "attention": model.config._attn_implementation,
        "own_rendering": _difference(trainer, tokenizer, rows) if work["compare"] else None,
    }
    trainer.train()


LORA = {"lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    labels = [token if target else IGNORED for token, target in zip(row["input_ids"], row["targets"], strict=True)]
    return {"input_ids": row["input_ids"], "labels": labels}


def _difference(trainer: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where TRL's own rendering of the same conversations differs from the ids that both sides are given."""
    from datasets import Dataset

    said = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    own = trainer._prepare_dataset(said, tokenizer, trainer.args, False, None, "comparison")
    same_ids, differing = 0, Counter[str]()
    for given, theirs in zip(map(_labelled, rows), own, strict=True):
        ids, labels = theirs["input_ids"], theirs["labels"]
        if ids != given["input_ids"]:
            differing["other token ids"] += 1
            continue
        same_ids += 1
        pairs = enumerate(zip(labels, given["labels"], strict=True))
        apart = [at for at, (one, other) in pairs if one != other]
        tokens = {"TRL": [ids[at] for at in apart if labels[at] != IGNORED]}
        tokens["Tunesmith"] = [ids[at] for at in apart if labels[at] == IGNORED]
        for side, trained in tokens.items():
            if trained:
                where = " at the very end" if apart[-1] == len(ids) - 1 else ""
                differing[f"{side} alone trains on {tokenizer.decode(trained)!r}{where}"] += 1
    return {"rows": len(rows), "same_ids": same_ids, "differences": dict(differing)}


def gemm(work: dict[str, Any], turns: Turns) -> None:
    """The best rate of matrix products at the model's shapes, measured anew in every turn."""
    from gemm_rate import DTYPES, Layer, measure, table

    layers = [Layer(**layer) for layer in work["layers"]]
    turns.ready()
    while True:
        rates = [measure(layer, DTYPES[work["dtype"]], 0.15) for layer in layers]
        best = max(rates, key=lambda rate: rate.best)
        turns.took({"best": best.best, "layer": best.layer.name, "table": table(rates)})


def main() -> None:
    kind, work = sys.argv[1], read_work(Path(sys.argv[2]))
    if kind == "prepare":
        prepare(work)
        return
    {"tunesmith": tunesmith, "trl": trl, "gemm": gemm}[kind](work, Turns())


if __name__ == "__main__":
    main()
