"""The section `ladder` of a recipe: what `tunesmith advise --measure` asks and how; other verbs pass it over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from tunesmith.base import InputError, Spec, nearest
from tunesmith.recipe import Auto, Off, Recipe
from tunesmith.recipe_file import (
    LADDER,
    Refuse,
    check_recipe,
    explained,
    named_after,
    place_of,
    read_values,
    refuse_odd_numbers,
)

RungName = Literal[
    "zero-shot",
    "few-shot",
    "chain-of-thought",
    "chain",
    "rag-bm25",
    "rag-dense",
    "rag-hybrid",
    "tuned",
    "tuned-few-shot",
    "tuned-rag",
]
RUNGS: tuple[RungName, ...] = get_args(RungName)
"""From the cheapest to set up to the dearest; "lowest" is meant in this order."""
RankerName = Literal["bm25", "dense", "hybrid"]

_PLACE = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def filled(template: str, **values: str) -> str:
    """A template with its places filled; `{{` and `}}` are braces themselves."""
    braces = {"{{": "{", "}}": "}"}
    return _PLACE.sub(lambda found: braces.get(found[0]) or values[found[1]], template)


def _places(template: str, known: tuple[str, ...], needed: tuple[str, ...]) -> str:
    named = [found[1] for found in _PLACE.finditer(template) if found[1]]
    for name in named:
        if name not in known:
            hint = nearest(name, known)
            raise ValueError(f"unknown place {{{name}}}{hint} (known: {', '.join(known)}; {{{{ writes a brace)")
    for name in needed:
        if name not in named:
            raise ValueError(f"{{{name}}} is missing in {template!r:.60}")
    return template


def _from_path(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


class FactsSpec(Spec):
    """Questions with answers that stand in the corpus: does tuning make them stick, and is retrieval better?"""

    data: str
    """Rows with `question`, `answer` and, where there are any, `paraphrases`, a list of the same question in other
    words. What is trained on is the question as it stands; paraphrases are only asked."""
    paraphrases: list[str] = Field(default_factory=list)
    """For rows without paraphrases of their own: templates with `{question}`, such as `I would like to know:
    {question}`, each of which is asked of every row."""
    epochs: PositiveFloat = 10.0
    """Passes over the facts; the rest is trained as the recipe says, without its steps."""
    questions: PositiveInt = 64
    """At most this many of the facts are asked, drawn with the recipe's seed; all of them are trained on."""

    @field_validator("paraphrases")
    @classmethod
    def _ask_the_question(cls, paraphrases: list[str]) -> list[str]:
        return [_places(template, ("question",), ("question",)) for template in paraphrases]


Facts = Annotated[FactsSpec, BeforeValidator(_from_path, json_schema_input_type=FactsSpec | str)]


class LadderSpec(Spec):
    """What is measured on the same held-out rows, from the cheapest way to the dearest."""

    rungs: list[RungName] | Auto = "auto"
    """Which ways are measured; `auto` is all but `rag-hybrid`, as far as what they need is there. An empty list
    measures the facts alone."""
    target: float | None = None
    """What the first metric of `evaluate.metrics` must reach."""
    rows: PositiveInt | None = None
    """At most this many held-out rows; as many as `evaluate.rows` when nothing is said."""
    instruction: str | None = None
    """A text put before every question to a model that is not tuned: the prompt that a person would write. The tuned
    model is asked as it was trained."""
    shots: list[PositiveInt] = Field(default=[1, 4], min_length=1)
    """Numbers of examples that `few-shot` tries on validation rows; the best one is measured on the held-out rows. The
    examples are the training rows most like the question (Liu et al. 2022, KATE), the most alike last."""
    shots_rows: PositiveInt = 32
    """Validation rows that the number is chosen on; where the recipe has none, so many training rows, which are then no
    examples."""
    similarity: RankerName = "bm25"
    """What finds the examples: shared words, a sentence encoder, or the ranks of both."""
    thought: str = (
        "Think step by step. When you are done, write a line that begins with “Answer:”, with nothing but the answer "
        "behind it."
    )
    """What `chain-of-thought` adds to the question (Wei et al. 2022; without examples: Kojima et al. 2022)."""
    marker: str = Field(default="Answer:", min_length=1)
    """The answer is what stands behind its last occurrence. Without it there is none, which is counted."""
    thought_tokens: PositiveInt = 256
    """Longest chain of thought, beside the answer's own limit."""
    chain: list[str] = Field(default_factory=list)
    """Prompts one after the other, each a conversation of its own: templates with `{input}`, the question, and
    `{previous}`, the answer to the prompt before. The last answer counts. Without any there is no such rung."""
    chain_tokens: PositiveInt = 128
    """Longest answer to each of those prompts but the last."""
    corpus: str | None = None
    """What is searched: a file or a directory of texts (.txt, .md, .rst, cut into passages) or of rows in any format
    that training reads. Without one the training rows are searched, questions with their answers."""
    passages: PositiveInt = 3
    """Passages put before the question."""
    passage_tokens: PositiveInt = 200
    """Tokens of the model that a passage of a corpus has at most; it ends with a paragraph where it can."""
    passages_prompt: str = "Use these texts where they help.\n\n{passages}\n\n{input}"
    """How passages and question are put together."""
    encoder: str | Off = "minilm"
    """Who reads texts for `dense` and `hybrid`: a directory or hub id of a model of sentence-transformers, or `minilm`,
    all-MiniLM-L6-v2, which is fetched once (80 MB); `off` leaves those out."""
    tuned: str = "train"
    """A run to measure, or `train`: the recipe is trained, into `output/tuned`."""
    tuned_retrieval: RankerName = "hybrid"
    """What `tuned-rag` searches with; `bm25` where the encoder is off."""
    latency_rows: NonNegativeInt = 8
    """Rows that are asked one at a time to measure how long an answer takes."""
    prices: str | None = None
    """A file of prices, like the one that `tunesmith advise --cost` documents."""
    facts: Facts | None = None
    """A file of facts to probe, or `{data, paraphrases, questions}`."""
    output: str = "runs/{name}-ladder"
    """Directory of answers, runs and page. `{name}` becomes the recipe's file name."""

    @field_validator("chain")
    @classmethod
    def _lead_on(cls, chain: list[str]) -> list[str]:
        for at, template in enumerate(chain):
            _places(template, ("input", "previous"), ())
            if at == 0:
                _places(template, ("input",), ("input",))
            elif "{input}" not in template and "{previous}" not in template:
                raise ValueError(f"{template!r:.60} holds neither {{input}} nor {{previous}}")
        return chain

    @field_validator("passages_prompt")
    @classmethod
    def _holds_both(cls, template: str) -> str:
        return _places(template, ("passages", "input"), ("passages", "input"))

    def runs(self, name: RungName) -> bool:
        """Whether a rung is asked for, and what it needs is there."""
        if self.rungs != "auto":
            return name in self.rungs
        if name == "chain":
            return bool(self.chain)
        return name != "rag-hybrid" and (name != "rag-dense" or self.encoder != "off")

    @property
    def reads_with_encoder(self) -> bool:
        """Whether anything that is asked for needs the sentence encoder."""
        if self.encoder == "off":
            return False
        shots = self.similarity != "bm25" and (self.runs("few-shot") or self.runs("tuned-few-shot"))
        tuned = self.tuned_retrieval != "bm25" and self.runs("tuned-rag")
        return shots or tuned or self.runs("rag-dense") or self.runs("rag-hybrid") or self.facts is not None


class LadderSection(Spec):
    """What a recipe with a ladder has beside its own keys."""

    ladder: LadderSpec = LadderSpec()
    """What `tunesmith advise --measure` asks, and how; other verbs pass it over."""


def read_ladder(path: Path, given: Mapping[str, Any]) -> tuple[LadderSpec, Recipe]:
    """The recipe and its section `ladder`.

    Args:
        given: settings that go before those of the section.

    Raises:
        InputError: naming the file, the line and the key, and the nearest valid one.
    """
    values, lines = read_values(path)
    if "stages" in values:
        raise InputError(
            "this recipe has stages, and the ladder is measured for one job",
            where=place_of("stages", str(path), lines),
            fix="name a recipe of one job",
        )
    section = values.pop(LADDER, None) or {}
    if not isinstance(section, dict):
        raise InputError(
            "the ladder is a mapping of settings",
            where=place_of(LADDER, str(path), lines),
            fix="for example ladder: {target: 0.8}",
        )
    recipe = check_recipe(values, str(path), lines)
    try:
        asked = LadderSection.model_validate({LADDER: {**section, **given}})
    except ValidationError as error:
        raise explained(error, str(path), lines, LadderSection) from None
    refuse_odd_numbers({LADDER: {**section, **given}}, asked, "", _refuse_at(str(path), lines))
    spec = asked.ladder
    _refuse_contradictions(spec, str(path), lines)
    named = {"output": named_after(recipe.output, path)}
    return spec.model_copy(update={"output": named_after(spec.output, path)}), recipe.model_copy(update=named)


def _refuse_at(shown: str, lines: dict[str, int]) -> Refuse:
    def refuse(key: str, what: str, fix: str) -> NoReturn:
        raise InputError(what, where=place_of(key, shown, lines), fix=fix)

    return refuse


def _refuse_contradictions(spec: LadderSpec, shown: str, lines: dict[str, int]) -> None:
    refuse = _refuse_at(shown, lines)
    asked = cast(list[RungName], [] if spec.rungs == "auto" else spec.rungs)
    if "chain" in asked and not spec.chain:
        refuse("ladder.rungs", "there are no prompts to chain", "write them into ladder.chain")
    if spec.encoder == "off" and (wanting := [name for name in ("rag-dense", "rag-hybrid") if name in asked]):
        refuse("ladder.rungs", f"{wanting[0]} needs an encoder", "remove encoder: off")
    if spec.encoder == "off" and spec.similarity != "bm25":
        refuse("ladder.similarity", f"{spec.similarity} needs an encoder", "use bm25")
    if not asked and spec.rungs != "auto" and spec.facts is None:
        refuse("ladder.rungs", "nothing is to be measured", "name rungs, or ladder.facts")
    if not asked and spec.rungs != "auto" and spec.target is not None:
        refuse("ladder.target", "a target is for rungs, and none is measured", "name rungs, or remove it")
    if spec.facts is not None and spec.corpus is None:
        refuse("ladder.facts", "the facts are to be found in a corpus, and none is named", "set ladder.corpus")
