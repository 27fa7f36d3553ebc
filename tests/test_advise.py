"""The decision: every row of every table decides its own example, and the documents' scenarios get their answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import colour_rows, write_jsonl
from tunesmith.base import InputError
from tunesmith.cli import main
from tunesmith.plan.advise import Answers, advise, look_at, read_answers
from tunesmith.plan.advise.advice import write_recipe
from tunesmith.plan.advise.rules import RULES, Rule, deciding_rule
from tunesmith.plan.advise.situation import Situation
from tunesmith.plan.advise.training import METHODS, OBJECTIVES, Choice, method_for, objective_for
from tunesmith.plan.advise.warnings import WARNINGS, Caution, warnings_for
from tunesmith.recipe_file import check_recipe, read_recipe


def known(**given: Any) -> Situation:
    return Situation(read_answers(None, given))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_decides_its_example(rule: Rule) -> None:
    assert deciding_rule(known(**rule.example)) is rule
    assert rule.reason.endswith(".") and rule.sources and rule.would_change


@pytest.mark.parametrize("warning", [warning for warning in WARNINGS if warning.example], ids=lambda one: one.name)
def test_every_warning_holds_for_its_example(warning: Caution) -> None:
    situation = known(**warning.example)
    assert warning.text(situation) in warnings_for(situation, deciding_rule(situation).strategy)


@pytest.mark.parametrize(
    "choice", [*METHODS, *(one for one in OBJECTIVES if one.kind not in ("dpo", "kto"))], ids=lambda c: c.kind
)
def test_every_choice_is_made_for_its_example(choice: Choice) -> None:
    situation = known(**choice.example)
    assert choice in (method_for(situation), objective_for(situation, "fine_tune"))


READY: dict[str, Any] = {"examples": "10k", "tried": ["prompting"], "metric": "accuracy", "maintained": "yes"}

SCENARIOS: dict[str, tuple[dict[str, Any], str]] = {
    # Part 7, "Decision Tree"
    "no change of behaviour": ({"change": "nothing"}, "prompt"),
    "external knowledge": ({"change": "facts"}, "rag"),
    "style or format": ({**READY, "change": ["style", "format"]}, "fine_tune"),
    "domain shift": ({"change": "domain-language", "tokens": "10B"}, "continued_pretraining"),
    # Part 7, "When Fine-tuning Makes Sense"
    "medical diagnosis formatting, 10K examples": ({**READY, "change": "format"}, "fine_tune"),
    "legal contracts, a corpus": ({"change": "domain-language", "tokens": "500M"}, "continued_pretraining"),
    "legal contracts, examples": ({**READY, "change": "domain-language"}, "fine_tune"),
    "500-token prompt": ({**READY, "change": "behaviour", "prompt_tokens": 500}, "fine_tune"),
    "50 examples exceed the context": (
        {"change": "behaviour", "shots": 50, "context": 2048, "examples": 5000, "metric": "f1"},
        "fine_tune",
    ),
    "latency critical": (
        {**READY, "change": ["facts", "style"], "knowledge_changes": "never", "latency": 100},
        "fine_tune",
    ),
    # Part 7, "When Fine-tuning Doesn't Make Sense"
    "the CEO of Acme": ({**READY, "change": "facts"}, "rag"),
    "100 examples": ({**READY, "change": "behaviour", "examples": 100}, "few-shot"),
    "100 examples, nothing tried": ({"change": "behaviour", "examples": 100, "metric": "accuracy"}, "prompt"),
    "prompting not tried": ({**READY, "change": "style", "tried": "nothing"}, "prompt"),
    "prompting not said to be tried": ({"change": "style", "examples": 5000, "metric": "f1"}, "prompt"),
    "evaluation unclear": ({"change": "style", "examples": 5000, "tried": "prompting"}, "do_not"),
    "can't maintain": ({**READY, "change": "style", "maintained": "no"}, "do_not"),
    # Part 7, "Cost-Benefit Analysis", a support chatbot
    "knowledge changes weekly": ({"change": "facts", "knowledge_changes": "weekly"}, "rag"),
    "style critical, knowledge stable": ({**READY, "change": "style", "knowledge_changes": "never"}, "fine_tune"),
    # Fine-Tuning and Parameter-Efficient Training, "When to Fine-Tune vs. Use RAG"
    "new knowledge": ({"change": "facts", "knowledge_changes": "never"}, "rag"),
    "updated knowledge": ({"change": "facts", "knowledge_changes": "monthly"}, "rag"),
    "style or tone": ({**READY, "change": "style"}, "fine_tune"),
    "domain terminology": ({**READY, "change": "domain-language", "tokens": "1M"}, "fine_tune"),
    "task format": ({**READY, "change": "format", "task": "classify"}, "fine_tune"),
    "private data reasoning": ({"change": "facts", "private": "yes"}, "rag"),
    # ... and "The Combined Approach"
    "combined": ({**READY, "change": ["style", "facts"], "knowledge_changes": "daily"}, "fine_tune_rag"),
    "combined, little said": ({"change": ["format", "facts"]}, "fine_tune_rag"),
    "form over knowledge that changes": ({**READY, "change": "style", "knowledge_changes": "weekly"}, "fine_tune_rag"),
    # Fine-Tuning Strategies: From PEFT to Full Training, "The Decision Matrix"
    "company policy 2024": ({"change": "facts", "knowledge_changes": "yearly"}, "rag"),
    "JSON or SQL": ({**READY, "change": "format", "metric": "exact_match"}, "fine_tune"),
    "medical specifics": ({"change": "domain-language"}, "continued_pretraining"),
    # The summary's last two: LoRA by default, QLoRA when memory is short
    "LoRA by default": ({**READY, "change": "style", "parameters": "8B", "memory": 40}, "fine_tune"),
    "QLoRA on a consumer's GPU": ({**READY, "change": "style", "parameters": "8B", "memory": 16}, "fine_tune"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_documents_scenarios(name: str) -> None:
    given, strategy = SCENARIOS[name]
    advice = advise(read_answers(None, given))
    assert advice.strategy == strategy, advice.reasons
    assert advice.reasons and all(reason.sources for reason in advice.reasons) and advice.would_change
    trained = strategy in ("fine_tune", "fine_tune_rag", "continued_pretraining")
    assert (advice.method is not None) is (advice.objective is not None) is trained
    assert (advice.recipe is None) is (strategy == "do_not")
    if advice.recipe is not None:
        check_recipe(dict(advice.recipe), "advice")


def test_the_method_follows_from_memory() -> None:
    assert advise(read_answers(None, SCENARIOS["LoRA by default"][0])).method == "lora"
    advice = advise(read_answers(None, SCENARIOS["QLoRA on a consumer's GPU"][0]))
    assert advice.method == "qlora" and advice.recipe is not None and advice.recipe["method"] == {"kind": "qlora"}


def test_what_else_speaks_for_tuning_is_said() -> None:
    advice = advise(read_answers(None, SCENARIOS["500-token prompt"][0]))
    assert any("500 tokens becomes a short one" in reason.text for reason in advice.reasons)
    advice = advise(read_answers(None, SCENARIOS["50 examples exceed the context"][0]))
    assert any("50 examples in the prompt do not fit into 2,048" in reason.text for reason in advice.reasons)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"change": ["stile"]}, "--change: 'stile' is not an answer here; did you mean 'style'?"),
        ({"knowledge_changes": "week"}, "did you mean 'weekly'"),
        ({"tried": ["promting"]}, "did you mean 'prompting'"),
        ({"examples": "many"}, "--examples: 'many' is not a number such as 1500, 10k or 2.5M"),
        ({"examples": -3}, "--examples: should be greater than or equal to 0, found -3"),
        ({"examples": 1.5}, "--examples"),
        ({"latency": 0}, "--latency: should be greater than 0, found 0"),
        ({"maintained": "perhaps"}, "--maintained: 'perhaps' is neither yes nor no"),
        ({"task": "clasify"}, "did you mean 'classify'"),
    ],
    ids=str,
)
def test_bad_answers_are_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_answers(None, given)
    assert said in str(caught.value) and caught.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("change: [style]\nexampels: 5\n", ["answers.yaml:2 exampels: unknown answer", "did you mean 'examples'"]),
        ("# one\nchange: stile\n", ["answers.yaml:2 change", "did you mean 'style'"]),
        ("- a\n", ["answers are a mapping", "change: [style]"]),
        ("a: [", ["answers.yaml", "not YAML"]),
    ],
    ids=["unknown", "choice", "list", "no YAML"],
)
def test_bad_files_of_answers(text: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_answers(Path("answers.yaml"), {})
    for part in said:
        assert part in str(caught.value)
    with pytest.raises(InputError, match="the answers cannot be read"):
        read_answers(Path("missing.yaml"), {})


def test_files_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "answers.yaml"
    path.write_text("change: style\nknowledge-changes: never\nexamples: 2k\nmaintained: yes\n")
    answers = read_answers(path, {"examples": "1,500", "metric": None})
    assert answers == Answers(change=["style"], knowledge_changes="never", examples=1500, maintained=True)
    path.write_text("")
    assert read_answers(path, {}) == Answers()


class TestDataLook:
    def test_form_and_duplicates(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"Order {at} apples", "completion": json.dumps({"item": "apple"})} for at in range(40)]
        found = look_at(str(write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:5]])))
        assert (found.rows, found.duplicates) == (45, 5)
        assert (found.form, found.same_form) == ("JSON with the keys item", 1.0)
        assert found.new_facts == found.stale == 0.0

    def test_facts(self, tmp_path: Path) -> None:
        rows = [
            {"prompt": f"Who leads firm number {at}?", "completion": f"Since 20{at:02d} it is Anna Miller, the CEO."}
            for at in range(10, 40)
        ]
        found = look_at(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
        assert found.new_facts == found.stale == 1.0
        answers = read_answers(None, {**READY, "change": "style", "data": "rows.jsonl"})
        advice = advise(answers, found)
        assert any("go stale" in text and "100%" in text for text in advice.warnings)
        assert any("teaches it to invent" in text for text in advice.warnings)

    def test_labels_and_text(self, tmp_path: Path) -> None:
        labelled = [{"text": f"text number {at}", "label": ("red", "blue")[at % 2]} for at in range(30)]
        found = look_at(str(write_jsonl(tmp_path / "labels.jsonl", labelled)))
        assert found.format == "labelled" and found.labels == 2
        advice = advise(read_answers(None, {**READY, "change": "format"}), found)
        assert (advice.strategy, advice.objective) == ("fine_tune", "classify")
        text = look_at(str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a plain line " * 50}] * 3)))
        assert text.is_text and text.tokens == pytest.approx(3 * 150 * 1.33, abs=1)
        advice = advise(read_answers(None, {"change": "domain-language"}), text)
        assert advice.strategy != "continued_pretraining", "so little text is no domain"

    def test_preferences(self, tmp_path: Path) -> None:
        rows = [
            {"prompt": f"Name colour number {at}.", "chosen": "It is a fine red.", "rejected": "no"} for at in range(30)
        ]
        found = look_at(str(write_jsonl(tmp_path / "pairs.jsonl", rows)))
        advice = advise(read_answers(None, {**READY, "change": "style", "data": str(tmp_path / "pairs.jsonl")}), found)
        assert advice.objective == "dpo" and advice.recipe is not None
        assert check_recipe(dict(advice.recipe), "advice").objective.kind == "dpo"
        rows = [{"prompt": f"Name colour {at}.", "completion": "red", "label": at % 2 == 0} for at in range(30)]
        found = look_at(str(write_jsonl(tmp_path / "liked.jsonl", rows)))
        advice = advise(read_answers(None, {**READY, "change": "style"}), found)
        assert advice.objective == "kto" and advice.recipe is not None
        assert check_recipe(dict(advice.recipe), "advice").objective.kind == "kto"

    def test_rows_are_counted_where_nobody_said(self, tmp_path: Path) -> None:
        found = look_at(str(write_jsonl(tmp_path / "rows.jsonl", colour_rows(50))))
        advice = advise(read_answers(None, {"change": "style", "tried": "prompting", "metric": "f1"}), found)
        assert advice.strategy == "few-shot"
        assert any("there are 50 examples" in text for text in advice.warnings)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"missing\.jsonl"):
            look_at(str(tmp_path / "missing.jsonl"))


class Shell:
    def __init__(self, root: Path, captured: pytest.CaptureFixture[str]) -> None:
        self.root, self.captured = root, captured

    def run(self, *arguments: str, typed: str | None = None) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setenv("COLUMNS", "120")
            patch.setattr("sys.argv", ["tunesmith", "advise", *arguments])
            stdin = io.StringIO(typed or "")
            patch.setattr(stdin, "isatty", lambda: typed is not None)
            patch.setattr("sys.stdin", stdin)
            with pytest.raises(SystemExit) as left:
                main()
        said = self.captured.readouterr()
        return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, capsys)


KEYS = {"strategy", "method", "objective", "reasons", "would_change", "warnings", "recipe"}


def test_the_command_for_programs(shell: Shell) -> None:
    code, said, _ = shell.run("--json", "--change", "facts", "--knowledge-changes", "weekly")
    answer = json.loads(said)
    assert code == 0 and answer["strategy"] == "rag" and answer.keys() >= KEYS
    code, said, wrong = shell.run("--json", "--change", "fact")
    assert code == 2 and "did you mean 'facts'" in wrong and json.loads(said)["code"] == 2
    code, _, wrong = shell.run()
    assert code == 2 and "no terminal to ask on" in wrong


def test_the_command_for_people(shell: Shell) -> None:
    write_jsonl(shell.root / "rows.jsonl", colour_rows(60))
    flags = ["--change", "format", "--tried", "prompting", "--metric", "exact_match", "--maintained", "yes"]
    code, said, _ = shell.run(*flags, "--examples", "5000", "--data", "rows.jsonl")
    assert code == 0, said
    for part in (
        "fine_tune: Fine-tune",
        "because",
        "what would change it",
        "the data",
        "60 rows",
        "warning: ",
        "recipe",
    ):
        assert part in said


def test_a_recipe_is_written_once_and_can_be_planned(shell: Shell, tiny_model: Path) -> None:
    write_jsonl(shell.root / "rows.jsonl", colour_rows(60))
    flags = ["--change", "format", "--tried", "prompting", "--metric", "exact_match", "--maintained", "yes"]
    flags += ["--examples", "5000", "--data", "rows.jsonl", "--model", str(tiny_model)]
    code, said, wrong = shell.run(*flags, "--write", "recipe.yaml")
    assert code == 0 and "tunesmith plan recipe.yaml" in said, wrong
    recipe = read_recipe(shell.root / "recipe.yaml")
    assert recipe.method.kind == "lora" and recipe.gate == {"exact_match": 0.01, "forgetting": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shell.root)
        from tunesmith.pipeline.estimating import estimate_job

        assert estimate_job(recipe).plan.steps > 0
    before = (shell.root / "recipe.yaml").read_text()
    code, _, wrong = shell.run(*flags, "--write", "recipe.yaml")
    assert code == 2 and "not overwritten" in wrong
    assert (shell.root / "recipe.yaml").read_text() == before


def test_there_is_no_recipe_for_what_should_not_be_done(tmp_path: Path) -> None:
    advice = advise(read_answers(None, {**READY, "change": "style", "maintained": "no"}))
    with pytest.raises(InputError, match="no recipe to write: do not fine-tune"):
        write_recipe(advice, tmp_path / "recipe.yaml")
    advice = advise(read_answers(None, {**READY, "change": "style"}))
    with pytest.raises(InputError, match="cannot be written"):
        write_recipe(advice, tmp_path / "missing" / "recipe.yaml")
    write_recipe(advice, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith("# Fine-tune: ") and yaml.safe_load(text) == advice.recipe


def test_questions_are_asked_on_a_terminal(shell: Shell) -> None:
    typed = [
        "stile",
        "style",
        "never",
        "",
        "5000",
        "prompting, few-shot",
        "accuracy",
        "soon",
        "",
        "700",
        "yes",
        "",
        "",
        "",
        "no",
    ]
    code, said, wrong = shell.run(typed="\n".join(typed) + "\n")
    assert code == 0, wrong
    assert "did you mean 'style'" in said and "'soon' is not a number" in said
    assert "fine_tune: Fine-tune" in said and "tokens of raw text" not in said


def test_an_interrupted_command_says_so(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.cli.advise.read_answers", interrupt)
    code, said, wrong = shell.run("--change", "style")
    assert (code, said, wrong) == (130, "", "interrupted\n")
