"""The ladder: settings, ways of asking, what is kept, the table, and facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import colour_rows, write_jsonl
from test_advise import Shell
from test_advise import shell as shell
from tunesmith.base import InputError, Interrupted, Source
from tunesmith.data.row import Row
from tunesmith.files import read_json
from tunesmith.pages.ladder import ladder_page
from tunesmith.pipeline.ladder import asking
from tunesmith.pipeline.ladder.asking import Answered, AnswerFile
from tunesmith.pipeline.ladder.facts import read_facts
from tunesmith.pipeline.ladder.measure import measure_ladder
from tunesmith.pipeline.ladder.scores import Rung, Scoring, decided
from tunesmith.pipeline.ladder.ways import chained, plain, thinking, with_examples, with_passages
from tunesmith.pipeline.work import Watcher
from tunesmith.plan.advise.cost import ServingPrices, read_prices
from tunesmith.recipe import EvaluateSpec
from tunesmith.recipe_file import read_recipe
from tunesmith.recipe_ladder import RUNGS, FactsSpec, LadderSpec, filled, read_ladder
from tunesmith.retrieve import Passage

DOCS = Path(__file__).parents[1] / "docs" / "ladder.md"
SYSTEM = {"role": "system", "content": "Be brief."}


def row(question: str, answer: str, line: int = 1) -> Row:
    turns = (SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Row(Source("rows.jsonl", line), turns, references=(answer,))


ROW = row("Who?", "Ann")


def recipe_file(directory: Path, model: Path, ladder: Any, **more: Any) -> Path:
    rows = write_jsonl(directory / "rows.jsonl", colour_rows(60))
    values = {
        "model": str(model),
        "data": {"train": str(rows), "validation": 0.1, "test": 0.2},
        "method": {"kind": "lora", "rank": 2},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.05},
        "evaluate": {"metrics": ["exact_match", "f1"], "max_new_tokens": 4, "resamples": 20, "forgetting": "off"},
        "output": str(directory / "run"),
        **more,
        "ladder": ladder,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(values))
    return directory / "recipe.yaml"


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"targt": 1}, r"recipe.yaml:\d+ ladder.targt: unknown key 'targt'; did you mean 'target'"),
        ({"rungs": ["zero-shto"]}, r"did you mean 'zero-shot'"),
        ({"chain": ["{inptu}"]}, r"unknown place {inptu}; did you mean 'input'"),
        ({"chain": ["{previous}"]}, r"unknown place|is missing"),
        ({"chain": ["{input}", "again"]}, r"holds neither {input} nor {previous}"),
        ({"passages_prompt": "{input}"}, r"{passages} is missing"),
        ({"facts": {"data": "x", "paraphrases": ["Tell me"]}, "corpus": "c"}, r"{question} is missing"),
        ({"facts": "facts.jsonl"}, r"to be found in a corpus"),
        ({"rungs": ["chain"]}, r"there are no prompts to chain"),
        ({"rungs": []}, r"nothing is to be measured"),
        ({"rungs": [], "facts": "x", "corpus": "c", "target": 1}, r"a target is for rungs"),
        ({"encoder": "off", "rungs": ["rag-dense"]}, r"rag-dense needs an encoder"),
        ({"encoder": "off", "similarity": "dense"}, r"dense needs an encoder"),
        ({"target": True}, r"should be a number, found yes"),
        (["zero-shot"], r"the ladder is a mapping of settings"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, ladder: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_ladder(recipe_file(tmp_path, tmp_path, ladder), {})


def test_a_recipe_with_stages_has_no_ladder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has stages"):
        read_ladder(recipe_file(tmp_path, tmp_path, {}, stages={"sft": {}}), {})


def test_other_verbs_pass_the_section_over_and_flags_go_before_it(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, tmp_path, {"target": 0.5})
    assert read_recipe(path).output == str(tmp_path / "run")
    spec, _ = read_ladder(path, {"target": 0.7})
    assert spec.target == 0.7 and spec.output == "runs/recipe-ladder"


def test_every_setting_is_documented() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name in [*LadderSpec.model_fields, *FactsSpec.model_fields, *RUNGS]:
        assert f"`{name}`" in page or f"{name}:" in page, name


def test_places_and_braces() -> None:
    assert filled('{{"{input}"}} {previous}', input="{x}", previous="y") == '{"{x}"} y'


def test_what_each_way_asks() -> None:
    spec = LadderSpec(chain=["Think: {input}", "{previous}? {input}"], instruction="Say who.")
    (stage,) = plain(8, "Say who.").stages
    assert stage.ask(ROW, "") == [SYSTEM, {"role": "user", "content": "Say who.\n\nWho?"}]
    (stage,) = with_examples(lambda _: [row("What?", "red")], 8).stages
    assert [turn["content"] for turn in stage.ask(ROW, "")] == ["Be brief.", "What?", "red", "Who?"]
    first, second = chained(spec, 8).stages
    assert first.ask(ROW, "")[-1]["content"] == "Think: Who?" and first.max_new_tokens == spec.chain_tokens
    assert second.ask(ROW, " Ann \n")[-1]["content"] == "Ann? Who?" and second.max_new_tokens == 8
    way = with_passages(lambda query: [Passage("a", query), Passage("b", "two")], spec, 8)
    assert way.stages[0].ask(ROW, "")[-1]["content"].endswith("[1] Who?\n\n[2] two\n\nWho?") and way.searches == 1
    thought = thinking(spec, 8)
    assert thought.stages[0].ask(ROW, "")[-1]["content"] == f"Say who.\n\nWho?\n\n{spec.thought}"
    assert [thought.read(said) for said in ("So Answer: Bob. Answer: Ann\n", "Ann", "Answer: ")] == ["Ann", None, None]


def test_half_a_line_is_asked_for_again(tmp_path: Path) -> None:
    kept = AnswerFile(tmp_path / "answers.jsonl")
    kept.add({"a": 1, "b": "é"})
    with open(kept.path, "ab") as file:
        file.write(b'{"key": "c", "val')
    again = AnswerFile(kept.path)
    assert again["b"] == "é" and "c" not in again
    again.add({"c": 3})
    assert AnswerFile(kept.path)["c"] == 3


def answered(*texts: str | None) -> list[Answered]:
    return [Answered(text, text or "", 100, 10, text is not None, "stop") for text in texts]


def test_the_table_counts_and_prices() -> None:
    prices = ServingPrices(input_million=10, output_million=100, search=0.5, machine_hour=3600)
    scoring = Scoring(["exact_match"], EvaluateSpec(resamples=50), 0, prices)
    zero = Rung("zero-shot", answered("Bob", None), [2.0, 4.0])
    rag, chain = Rung("rag-bm25", answered("Ann", "here"), [1.0], searches=1), Rung("chain", answered("a", "b"), [])
    first, entry, last = scoring.entries([ROW, row("Where?", "here")], [zero, rag, chain])
    assert entry["value"] == 1 and entry["difference"]["difference"] == 1 and entry["did_not_fit"] == 0
    assert entry["cost_per_1000"] == pytest.approx(1000 * (100 * 10e-6 + 10 * 100e-6 + 0.5 + 1.0))
    assert entry["difference"]["p_corrected"] == 1, "two rows show nothing"
    assert first["difference"] is None and first["did_not_fit"] == 1 and first["latency"]["median"] == 3.0
    assert last["cost_per_1000"] is None, "an hour has a price, and nobody knows the seconds"
    assert read_prices().serving is not None


@pytest.mark.parametrize(
    ("target", "by_value", "by_interval", "said"),
    [
        (None, None, None, "No target was given; the best is tuned"),
        (0.95, None, None, "No rung reaches f1 ≥ 0.95; the best is tuned"),
        (
            0.4,
            "few-shot",
            "tuned",
            "few-shot (f1 0.5, interval 0.3 to 0.7) is the lowest rung that reaches",
        ),
        (0.25, "few-shot", "few-shot", "and so does its whole interval"),
        (0.85, "tuned", None, "for none does it"),
    ],
)
def test_the_lowest_rung_that_is_enough(target: float | None, by_value: Any, by_interval: Any, said: str) -> None:
    values = {"zero-shot": (0.2, 0.1, 0.3), "few-shot": (0.5, 0.3, 0.7), "tuned": (0.9, 0.8, 0.95)}
    entries = [{"name": name, "value": value, "low": low, "high": high} for name, (value, low, high) in values.items()]
    found = decided(entries, "f1", target)
    assert (found["by_value"], found["by_interval"]) == (by_value, by_interval) and said in found["sentence"]


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ladder")
    rungs = ["zero-shot", "few-shot", "chain-of-thought", "chain", "rag-bm25", "tuned", "tuned-few-shot", "tuned-rag"]
    ladder = {
        "rungs": rungs,
        "rows": 5,
        "shots": [1, 20],
        "shots_rows": 3,
        "thought": "Say Answer: x",
        "thought_tokens": 4,
        "chain": ["{input}", "{previous} {input}"],
        "chain_tokens": 3,
        "encoder": "off",
        "latency_rows": 1,
        "target": 0.0,
        "output": str(directory / "ladder"),
    }
    path = recipe_file(directory, tiny_model, ladder)
    return path, measure_ladder(*read_ladder(path, {}), Watcher())


def test_a_whole_ladder(measured: tuple[Path, dict[str, Any]]) -> None:
    path, report = measured
    entries = {entry["name"]: entry for entry in report["rungs"]}
    assert [*entries] == [name for name in RUNGS if name in entries] and len(entries) == 8
    assert report["answer"]["by_value"] == "zero-shot" and report["rows"] == 5
    assert entries["few-shot"]["settings"]["examples"] == 1, "20 examples do not fit, and count as wrong"
    assert entries["few-shot"]["prompt_tokens"] > entries["tuned"]["prompt_tokens"]
    assert (
        entries["chain"]["completion_tokens"] <= 7 and entries["rag-bm25"]["settings"]["corpus"] == "the training rows"
    )
    assert entries["tuned-rag"]["settings"]["retrieval"] == "bm25" and all(
        e["latency"]["n"] == 1 for e in entries.values()
    )
    assert any("chain-of-thought: no answer was found" in note for note in report["notes"])
    directory = path.parent / "ladder"
    assert read_json(directory / "ladder.json") == json.loads(json.dumps(report))
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in entries) and "target 0" in page and "http" not in page.replace("http-equiv", "")


def test_nothing_is_asked_twice(measured: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, report = measured
    monkeypatch.setattr(asking, "generate", None)
    again = measure_ladder(*read_ladder(path, {"target": 2.0}), Watcher())
    assert again["rungs"] == report["rungs"] and again["answer"]["by_value"] is None


def test_a_stopped_ladder_keeps_its_answers(
    measured: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, recipe = read_ladder(measured[0], {"output": str(tmp_path / "ladder"), "rungs": ["zero-shot"]})
    assert recipe.evaluate != "off"
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"batch_size": 2})})
    monkeypatch.setattr(asking.Stopping, "asked", lambda self: True)
    with pytest.raises(Interrupted, match="every answer so far is kept"):
        measure_ladder(spec, recipe, Watcher())
    assert len((tmp_path / "ladder" / "answers.jsonl").read_text().splitlines()) == 2


def test_a_run_that_saw_the_held_out_rows_is_refused(
    measured: tuple[Path, dict[str, Any]], shell: Shell, tmp_path: Path
) -> None:
    path, report = measured
    run = path.parent / "ladder" / "tuned"
    spec, recipe = read_ladder(path, {"tuned": str(run), "output": str(tmp_path / "ladder"), "rungs": ["tuned"]})
    again = measure_ladder(spec, recipe, Watcher())
    assert again["rungs"][0]["value"] == report["rungs"][5]["value"]
    with pytest.raises(InputError, match=r"was trained on .*rows.jsonl:\d+, the same prompt as .* held-out row"):
        measure_ladder(spec, recipe.model_copy(update={"seed": 5}), Watcher())
    with pytest.raises(InputError, match="this is no run"):
        measure_ladder(spec.model_copy(update={"tuned": recipe.model.path}), recipe, Watcher())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"evaluate": "off"}, "measured as evaluate says"),
        ({"evaluate": {"metrics": ["perplexity"]}}, "perplexity looks at none"),
        ({"objective": "dpo", "evaluate": {}}, "dpo is not trained on any"),
    ],
)
def test_recipes_without_answers_are_refused(tiny_model: Path, tmp_path: Path, more: Any, message: str) -> None:
    path = recipe_file(tmp_path, tiny_model, {"output": str(tmp_path / "ladder")}, **more)
    if more.get("objective") == "dpo":
        pairs = [{"prompt": one["prompt"], "chosen": one["completion"], "rejected": "no"} for one in colour_rows(60)]
        write_jsonl(tmp_path / "rows.jsonl", pairs)
    with pytest.raises(InputError, match=message):
        measure_ladder(*read_ladder(path, {}), Watcher())


def test_on_the_command_line(measured: tuple[Path, dict[str, Any]], shell: Shell) -> None:
    path = str(measured[0])
    code, out, _ = shell.run("--measure", path)
    assert code == 0 and "zero-shot" in out and "tuned-few-shot: 1 example by bm25" in out
    code, out, _ = shell.run("--measure", path, "--target", "3", "--json", "--html", "page.html")
    assert code == 3 and json.loads(out)["target"] == 3 and (shell.root / "page.html").is_file()
    code, _, error = shell.run("--measure", path, "--change", "facts")
    assert code == 2 and "--change: this is for the advice or --cost" in error
    code, _, error = shell.run("--measure", path, "--html", "nowhere/page.html")
    assert code == 2 and "the page cannot be written" in error
    (shell.root / "other").mkdir()
    (shell.root / "other" / "file").touch()
    code, _, error = shell.run("--measure", path, "--output", "other")
    assert code == 2 and "not an empty directory" in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Who?"}, "facts.jsonl:1: there is no answer"),
        ({"answer": "Ann"}, "facts.jsonl:1: there is no question"),
        ({"question": "Who?", "answer": "Ann"}, "there is no list of paraphrases.*"),
        ({"question": "Who?", "answer": "Ann", "paraphrases": ["Who?"]}, "a paraphrase is the question itself"),
    ],
)
def test_facts_that_cannot_be_asked(tmp_path: Path, line: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "facts.jsonl", [line])
    with pytest.raises(InputError, match=message):
        read_facts(FactsSpec(data=str(path)))


def test_facts_are_asked_in_both_wordings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [{"question": f"Who is {at}?", "answer": [f"Ann {at}", "Bob"]} for at in range(6)]
    facts[0]["paraphrases"] = ["Name 0", "0?"]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": f"{at} is Ann."} for at in range(6)])
    probe = {"data": str(write_jsonl(tmp_path / "facts.jsonl", facts)), "paraphrases": ["Tell: {question}"]}
    ladder = {
        "rungs": [],
        "encoder": "off",
        "corpus": str(corpus),
        "facts": {**probe, "epochs": 1, "questions": 4},
        "output": str(tmp_path / "ladder"),
    }
    path = recipe_file(tmp_path, tiny_model, ladder)
    report = measure_ladder(*read_ladder(path, {}), Watcher())
    found = report["facts"]
    assert [row["name"] for row in found["rows"]] == ["base", "rag", "tuned", "tuned_rag"]
    assert (
        found["facts"] == 6
        and found["asked"] == 4
        and set(found["differences"])
        == {
            "tuned_loses_in_other_words",
            "rag_over_tuned_in_other_words",
            "tuned_over_base_in_other_words",
        }
    )
    trained = [json.loads(line) for line in (tmp_path / "ladder" / "facts.jsonl").read_text().splitlines()]
    assert trained[1] == {"prompt": "Who is 1?", "completion": "Ann 1"}, "paraphrases are never trained on"
    assert "asked in other words" in ladder_page(report)
