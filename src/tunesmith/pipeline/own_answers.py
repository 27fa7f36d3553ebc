"""Self-generated replay: the base answers general prompts once, before training, and its answers are replayed.

What a model says itself is where it is, so that training on it holds it there (Huang et al. 2024, Self-Synthesized
Rehearsal; Yang et al. 2024, Self-Distillation).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.base import InputError, Progress
from tunesmith.data.cache import cached, entry_of
from tunesmith.data.general_prompts import general_prompts
from tunesmith.data.read import Reading, content_hash
from tunesmith.data.record import RowErrors
from tunesmith.data.render import Renderer
from tunesmith.data.rows import open_rows
from tunesmith.data.spec import SELF, DataSpec, ReplaySpec
from tunesmith.engine.generate import Sampling, generate
from tunesmith.files import file_sha256, read_json, write_json, write_lines
from tunesmith.models.load import load_model, stop_token_ids, weights_directory
from tunesmith.models.templates import PLAIN, resolve_template
from tunesmith.objectives import NextToken, Pretrain
from tunesmith.pipeline.locating import Location
from tunesmith.plan.hardware import DTYPES, detect_hardware, native_dtypes
from tunesmith.recipe import Recipe

ROWS, COUNTS = "self.jsonl", "counts.json"
BATCH = 16

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Base:
    """The model that answers.

    Attributes:
        location: directory or hub id.
        adapted: whether an adapter belongs on it, which is not merged yet.
    """

    location: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapted: bool = False

    @classmethod
    def of(cls, start: Location, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Base:
        return cls(start.base, config, tokenizer, start.adapter is not None)


def replays_itself(spec: DataSpec) -> bool:
    return spec.replay is not None and spec.replay.path == SELF


def with_own_answers(recipe: Recipe, base: Base, progress: Progress) -> tuple[DataSpec, list[str]]:
    """The recipe's `data` section with the base's answers as a file to replay, made now unless they are on disk.

    They are answers that the base has ended itself: one that was cut off would teach to stop in the middle.

    Returns:
        The section, and what a user should know.

    Raises:
        InputError: when no answer is left, the prompts cannot be read, or the model is not to be in memory whole.
    """
    spec = recipe.data
    if spec.replay is None or not replays_itself(spec):
        return spec, []
    asked = _asked(recipe, base)
    directory = cached(asked.made_from(), lambda directory: asked.answer(directory, progress))
    counts = read_json(directory / COUNTS)
    if not counts["kept"]:
        raise InputError(
            f"none of the base's {counts['asked']} answers ended within {spec.replay.max_new_tokens} tokens",
            where="data.replay.max_new_tokens",
            fix="raise it, or replay a file of general rows",
        )
    note = f"replay: the base itself answered {counts['asked']} prompts; {counts['kept']} of its answers are used"
    if counts["kept"] < counts["asked"]:
        note += ", the others are empty or did not end within data.replay.max_new_tokens"
    file = directory / ROWS
    replay = spec.replay.model_copy(update={"path": str(file), "format": "auto", "columns": {}})
    return spec.model_copy(update={"replay": replay}), [note]


def are_made(recipe: Recipe, base: Base) -> bool:
    """Whether the answers that a recipe needs are on disk."""
    return not replays_itself(recipe.data) or entry_of(_asked(recipe, base).made_from()).is_dir()


@dataclass(frozen=True)
class _Asked:
    recipe: Recipe
    replay: ReplaySpec
    base: Base
    renderer: Renderer
    prompts: list[Turns]

    @property
    def dtype(self) -> str:
        """That in which the base is held for training, as far as the recipe says."""
        asked = [name for name in (self.recipe.model.dtype, self.recipe.train.dtype) if name != "auto"]
        native = "bf16" if "bf16" in native_dtypes(detect_hardware().device) else "fp32"
        return asked[0] if asked else native

    def made_from(self) -> dict[str, Any]:
        """JSON values that determine the answers."""
        model, replay = self.recipe.model, self.replay
        directory = weights_directory(self.base.location, model.revision)
        files = sorted([*directory.glob("*.safetensors"), *directory.glob("config.json")])
        return {
            "own answers": self.prompts,
            "model": {path.name: file_sha256(path) for path in files},
            "held": [self.dtype, model.quantize, model.double_quantization, str(detect_hardware().device)],
            "text": self.renderer.identity(),
            "as documents": isinstance(self.recipe.objective, Pretrain),
            "sampling": [replay.max_new_tokens, replay.temperature, self.recipe.seed],
        }

    def answer(self, directory: Path, progress: Progress) -> None:
        """Writes the answers as rows: conversations, or texts where documents are trained on."""
        model, spec = self.recipe.model, self.replay
        progress("loading the model to answer for replay", 0, None)
        hardware = detect_hardware()
        loaded = load_model(
            self.base.location,
            dtype=DTYPES[self.dtype],
            device=hardware.device,
            revision=model.revision,
            quantized=model.quantization,
        ).eval()
        prompts = [self.renderer.prompt_ids(turns) for turns in self.prompts]
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.seed)
            found = generate(
                loaded,
                prompts,
                Sampling(spec.max_new_tokens, spec.temperature),
                stop_ids=self.renderer.stop_ids,
                batch_size=BATCH,
                progress=lambda label, done, total: progress("answering for replay", done, total),
            )
        texts = [
            str(self.base.tokenizer.decode(answer.token_ids, skip_special_tokens=True))
            if answer.finish_reason == "stop"
            else ""
            for answer in found
        ]
        kept = [(turns, text) for turns, text in zip(self.prompts, texts, strict=True) if text.strip()]
        write_lines(directory / ROWS, [json.dumps(self._row(*row), ensure_ascii=False) + "\n" for row in kept])
        write_json(directory / COUNTS, {"asked": len(prompts), "kept": len(kept)})

    def _row(self, turns: Turns, text: str) -> dict[str, Any]:
        if isinstance(self.recipe.objective, Pretrain):
            template = self.renderer.template
            return {"text": template.text(turns, generation_prompt=True).removeprefix(template.bos) + text}
        return {"messages": [*turns, {"role": "assistant", "content": text}]}


def _asked(recipe: Recipe, base: Base) -> _Asked:
    replay = recipe.data.replay
    assert replay is not None
    if recipe.budget.memory is not None:
        raise InputError(
            "the base answers with the whole model in memory",
            where="data.replay.path",
            fix="replay a file of general rows, or leave budget.memory out",
        )
    if not isinstance(recipe.objective, NextToken):
        raise InputError(
            f"the base's own answers are no rows for objective.kind: {recipe.objective.kind}",
            where="data.replay.path",
            fix="name a file; self is for sft and pretrain",
        )
    if base.adapted:
        raise InputError(
            "the base that would answer is an adapter over another model",
            where="data.replay.path",
            fix="merge it first (tunesmith merge), or replay a file of general rows",
        )
    documents = isinstance(recipe.objective, Pretrain)
    template = resolve_template(PLAIN if documents else recipe.data.template, base.tokenizer)
    stop_ids = stop_token_ids(base.tokenizer, base.config, base.location)
    renderer = Renderer(template, base.tokenizer, "answers", stop_ids)
    renderer.learn_stop_ids()
    prompts = _prompts(replay)
    chosen = random.Random(recipe.seed).sample(range(len(prompts)), min(replay.answers, len(prompts)))
    return _Asked(recipe, replay, base, renderer, [prompts[at] for at in sorted(chosen)])


def _prompts(replay: ReplaySpec) -> list[Turns]:
    """Conversations up to where the model answers, each once."""
    if replay.prompts == "auto":
        return [[{"role": "user", "content": text}] for text in general_prompts()]
    errors = RowErrors()
    reading = Reading(replay.prompts, format=replay.format, columns=replay.columns)
    content_hash(reading)  # raises when there is no such file
    found = [_before_the_answer(row.messages, row.text) for row in open_rows(reading, errors)]
    errors.raise_any()
    return list({json.dumps(turns, sort_keys=True): turns for turns in found if turns}.values())


def _before_the_answer(messages: Sequence[dict[str, Any]], text: str) -> Turns:
    return list(messages[:-1]) if messages else [{"role": "user", "content": text}] if text.strip() else []
