"""Jobs that learn from a teacher: found, compared, asked once, and kept on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build_model, colour_rows, write_jsonl
from tunesmith.base import InputError, Interrupted
from tunesmith.data.render import Renderer
from tunesmith.methods import Full
from tunesmith.models.load import load_model
from tunesmith.objectives.distill import TEACHER_LOGPS, TEACHER_TOKENS, WRITTEN
from tunesmith.pipeline import distilling
from tunesmith.pipeline.distilling import with_teacher
from tunesmith.pipeline.finetune import finetune
from tunesmith.pipeline.planning import Planned, plan_job
from tunesmith.pipeline.work import Watcher
from tunesmith.recipe_file import check_recipe
from tunesmith.run import Run
from tunesmith.train.batches import StepBatches
from tunesmith.train.on_policy import OnPolicyBatches

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT = "Answer in capitals, and with one colour only."


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("distilling")
    rows = colour_rows(40)
    return {
        "student": build_model(root / "student"),
        "teacher": build_model(root / "teacher", hidden_size=48, initializer_range=0.2),
        "rows": write_jsonl(root / "rows.jsonl", rows),
        "text": write_jsonl(root / "text.jsonl", [{"text": f"Q: {row['prompt']}"} for row in rows]),
        "root": root,
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / "cache"))


def recipe(places: dict[str, Path], objective: dict[str, Any], **sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": str(places["student"]),
        "data": {"train": str(places["rows"]), "validation": 0.2, "test": 0.2},
        "method": {"kind": "lora", "rank": 2},
        "objective": {"kind": "distill", "top_k": 8, **objective},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.02, "dtype": "fp32", "evaluate_every": 3},
        "evaluate": {"max_new_tokens": 4, "resamples": 20, "rows": 6, "forgetting": "off", "samples": 1},
        "output": "runs/none",
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return values


def plan_of(values: dict[str, Any]) -> Planned:
    return plan_job(check_recipe(values, "test"))


def job(values: dict[str, Any], output: Path, **options: Any) -> Run:
    return finetune(check_recipe({**values, "output": str(output)}, "test"), **options)


def of_teacher(places: dict[str, Path], **settings: Any) -> dict[str, Any]:
    return {"teacher": str(places["teacher"]), **settings}


def losses(run: Run, kind: str) -> list[float]:
    return [event["loss"] for event in run.events() if event["event"] == kind]


def test_what_the_teacher_says_is_read_back_as_it_was(places: dict[str, Path]) -> None:
    planned = plan_of(recipe(places, of_teacher(places, temperature=2.0)))
    found = with_teacher(planned, lambda *_: None)
    assert found.prepared is not None and found.teacher is not None and found.tokenizer is not None
    teacher: Any = found.teacher.load(found.tokenizer, planned.plan, lambda *_: None)
    for rows in (found.prepared.train, found.prepared.validation):
        for item in rows[:5]:
            example = item.example
            with torch.no_grad():
                logits = teacher(input_ids=example.token_ids[None]).logits[0] / 2.0
            places_ = torch.nonzero(example.tensors["target_weights"] > 0).squeeze(1)
            expected = logits[places_ - 1].log_softmax(-1)
            tokens, logps = example.tensors[TEACHER_TOKENS].long(), example.tensors[TEACHER_LOGPS]
            assert tokens.shape == (len(places_), 8) and logps.shape == (len(places_), 9)
            assert example.scopes[TEACHER_TOKENS] == example.scopes[TEACHER_LOGPS] == "target"
            assert torch.allclose(logps[:, :8], expected.gather(1, tokens), atol=1e-4)
            assert torch.allclose(logps[:, :8], expected.topk(8).values, atol=1e-4)
            assert torch.allclose(logps.exp().sum(1), torch.ones(len(logps)), atol=1e-5)
    assert TEACHER_LOGPS not in found.prepared.test[0].example.tensors


def test_the_teacher_runs_once(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    from tunesmith.pipeline import teacher

    load = teacher.load

    def counted(name: str, **options: Any) -> Any:
        loads.append(name)
        return load(name, **options)

    monkeypatch.setattr(teacher, "load", counted)
    values = recipe(places, of_teacher(places))
    job(values, tmp_path / "one")
    job({**values, "train": {**values["train"], "learning_rate": 0.01}}, tmp_path / "two")
    assert len(loads) == 1
    job(recipe(places, of_teacher(places, temperature=2.0)), tmp_path / "three")
    assert len(loads) == 2


@pytest.mark.parametrize(("method", "most"), [("lora", 0.96), ("full", 0.8)])
def test_the_student_comes_nearer_to_its_teacher(
    places: dict[str, Path], tmp_path: Path, method: str, most: float
) -> None:
    values = recipe(places, of_teacher(places, top_k=64), train={"steps": 30, "evaluate_every": 10})
    run = job({**values, "method": {"kind": method}}, tmp_path / "run")
    held_out = losses(run, "validation")
    assert held_out[-1] < most * losses(run, "step")[0]
    lineage = run.read("lineage.json")
    assert (
        lineage["teacher"]["name"] == str(places["teacher"]) and "model.safetensors" in lineage["teacher"]["files"][0]
    )
    said = {item["name"]: item["value"] for item in run.read("plan.json")["resolved"]}
    assert said["from the teacher"].endswith("MB")


def test_packed_and_padded_rows_give_the_same_losses(places: dict[str, Path], tmp_path: Path) -> None:
    runs = [
        job(recipe(places, of_teacher(places, weight=0.5), train={"packing": packing}), tmp_path / str(packing))
        for packing in (True, False)
    ]
    packed, padded = (losses(run, "step") + losses(run, "validation") for run in runs)
    assert packed == pytest.approx(padded, rel=1e-3)


@pytest.mark.parametrize(
    "objective",
    [{}, {"answers": "teacher"}, {"weight": 0.5, "teacher_prompt": PROMPT, "on_policy": 0.6, "max_new_tokens": 5}],
    ids=["rows", "answers", "own"],
)
def test_a_resumed_run_gives_the_same_bytes(places: dict[str, Path], tmp_path: Path, objective: dict[str, Any]) -> None:
    values = recipe(places, of_teacher(places, **objective), train={"checkpoint_every": 2}, evaluate="off")
    whole = job(values, tmp_path / "whole")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        job(values, tmp_path / "half", watcher=Watcher(event=stop))
    half = job(values, tmp_path / "half", resume=True)
    assert half.result is not None and whole.result is not None
    name = "adapter_model.safetensors"
    assert (half.result / name).read_bytes() == (whole.result / name).read_bytes()


def test_an_adapter_and_a_run_may_teach(places: dict[str, Path], tmp_path: Path) -> None:
    taught = job({**recipe(places, {}), "objective": "sft"}, tmp_path / "sft")
    assert taught.result is not None
    found = [
        losses(job(recipe(places, {"teacher": str(name)}), tmp_path / f"by-{at}"), "step")
        for at, name in enumerate((taught.path, taught.result))
    ]
    assert found[0] == found[1] and found[0][0] > 0


def test_the_teachers_answers_take_the_place_of_the_rows(places: dict[str, Path], tmp_path: Path) -> None:
    """A teacher that was trained to answer ends its answers, and the student learns those."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{**row, "completion": "RED"} for row in colour_rows(40)])
    trained = {**recipe(places, {}), "objective": "sft", "method": {"kind": "full"}, "evaluate": "off"}
    trained["data"], trained["train"] = {"train": str(rows)}, {"steps": 40, "batch_size": 8, "learning_rate": 5e-3}
    teacher = job(trained, tmp_path / "teacher")
    objective = {"teacher": str(teacher.path), "answers": "teacher"}
    planned = plan_of(recipe(places, objective))
    assert planned.prepared is not None
    found = with_teacher(planned, lambda *_: None)
    assert found.prepared is not None
    said = [row.row.references[0] for row in found.prepared.train]
    assert said.count("RED") > 0.9 * len(said)
    assert [row.row.messages[:-1] for row in found.prepared.train] == [
        row.row.messages[:-1] for row in planned.prepared.train
    ]
    assert [row.prompt_ids for row in found.prepared.train] == [row.prompt_ids for row in planned.prepared.train]
    assert {row.row.references[0] for row in found.prepared.test} != {"RED"}
    alone = recipe(places, {"teacher": str(teacher.path), "answers": "teacher", "weight": 0})
    del alone["objective"]["top_k"]
    run = job(alone, tmp_path / "alone")
    assert losses(run, "validation")[-1] < losses(run, "step")[0]


def test_answers_that_do_not_end_are_told(places: dict[str, Path], tmp_path: Path) -> None:
    run = job(recipe(places, of_teacher(places, answers="teacher", max_new_tokens=2)), tmp_path / "run")
    [note] = [note for note in run.read("plan.json")["notes"] if "keep their own answer" in note and "26" in note]
    assert "does not end within objective.max_new_tokens" in note
    assert run.report is not None and note in run.report["warnings"]


def test_sampled_answers_follow_the_seed(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def recorded(model: Any, prompts: Any, sampling: Any, **options: Any) -> Any:
        asked.append((sampling, torch.initial_seed()))
        return generate(model, prompts, sampling, **options)

    generate = distilling.generate
    monkeypatch.setattr(distilling, "generate", recorded)
    settings = of_teacher(places, answers="teacher", sample_temperature=0.7, max_new_tokens=3)
    with_teacher(plan_of({**recipe(places, settings), "seed": 5}), lambda *_: None)
    assert asked[0][0].temperature == 0.7 and asked[0][0].max_new_tokens == 3 and asked[0][1] == 5


def test_the_base_with_a_prompt_teaches_itself(places: dict[str, Path], tmp_path: Path) -> None:
    values = recipe(places, {"teacher_prompt": PROMPT}, train={"steps": 30, "evaluate_every": 10})
    run = job({**values, "model": str(places["teacher"])}, tmp_path / "run")
    held_out = losses(run, "validation")
    assert 0 < held_out[-1] < 0.9 * losses(run, "step")[0]
    report = run.report
    assert report is not None
    assert [entry["name"] for entry in report["prompted"]] == [entry["name"] for entry in report["metrics"]]
    prompted, base = (run.read(f"evaluation.{name}.json")["rows"] for name in ("prompted", "base"))
    assert [row["source"] for row in prompted] == [row["source"] for row in base]
    assert [row["targets"] for row in prompted] == [row["targets"] for row in base]
    assert [row["nll"] for row in prompted] != [row["nll"] for row in base]
    from tunesmith.cli.tables import report_lines

    assert any(line.startswith("the base with the teacher's prompt: ") for line in report_lines(report))
    assert "The base with the teacher’s prompt" in run.page.read_text(encoding="utf-8")


def test_only_the_teacher_reads_the_prompt(places: dict[str, Path]) -> None:
    planned = plan_of(recipe(places, of_teacher(places, teacher_prompt=PROMPT)))
    assert planned.prepared is not None and planned.teacher is not None and isinstance(planned.renderer, Renderer)
    item = planned.prepared.train[0]
    read = planned.teacher.reads(item, planned.renderer)
    text = planned.renderer.tokenizer.decode
    assert PROMPT in text(read.example.token_ids) and PROMPT not in text(item.example.token_ids)
    ours, theirs = ([row.example.token_ids[row.example.tensors["target_weights"] > 0].tolist()] for row in (item, read))
    assert ours == theirs
    assert read.prompt_ids == tuple(read.example.token_ids[: len(read.prompt_ids)].tolist())


def test_a_system_turn_of_the_row_follows_the_prompt(places: dict[str, Path]) -> None:
    values = recipe(places, of_teacher(places, teacher_prompt=PROMPT), data={"system": "Be kind."})
    planned = plan_of(values)
    assert planned.prepared is not None and planned.teacher is not None and isinstance(planned.renderer, Renderer)
    read = planned.teacher.reads(planned.prepared.train[0], planned.renderer)
    assert read.row.messages[0] == {"role": "system", "content": f"{PROMPT}\n\nBe kind."}
    assert [turn["role"] for turn in read.row.messages] == ["system", "user", "assistant"]


def test_rows_that_were_cut_are_compared_up_to_there(places: dict[str, Path]) -> None:
    whole = plan_of(recipe(places, of_teacher(places)))
    assert whole.prepared is not None
    data = {"max_length": whole.prepared.max_length - 3, "overlong": "truncate"}
    planned = plan_of(recipe(places, of_teacher(places, teacher_prompt=PROMPT), data=data))
    found = with_teacher(planned, lambda *_: None)
    assert found.prepared is not None
    cut = [row for row in found.prepared.train if row.cut_targets]
    assert cut
    for row in cut:
        assert len(row.example.tensors[TEACHER_TOKENS]) == row.example.targets


def test_a_note_says_when_the_teacher_knows_another_template(places: dict[str, Path], tmp_path: Path) -> None:
    assert not [note for note in plan_of(recipe(places, of_teacher(places))).plan.notes if "template" in note]
    values = recipe(places, of_teacher(places), data={"template": "zephyr"})
    assert any("chat template is another one" in note for note in plan_of(values).plan.notes)


def test_the_student_answers_in_a_share_of_the_steps(places: dict[str, Path]) -> None:
    values = recipe(places, of_teacher(places, on_policy=0.5, max_new_tokens=5, weight=0.5, teacher_prompt=PROMPT))
    planned = with_teacher(plan_of(values), lambda *_: None)
    assert planned.prepared is not None and planned.teacher is not None and planned.tokenizer is not None
    assert isinstance(planned.renderer, Renderer)
    written = StepBatches.of_job(planned.recipe, planned.plan, planned.prepared.train, planned.prepared.order)
    student: Any = load_model(planned.location, dtype=torch.float32, device=torch.device("cpu")).train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = distilling.with_own_answers(planned, student, written)
    assert isinstance(batches, OnPolicyBatches)
    own = [step for step in range(1, 101) if batches.is_own(step)]
    assert 30 < len(own) < 70
    other = next(step for step in range(1, 7) if step not in own)
    assert WRITTEN not in batches(other)[0].tensors
    first = next(step for step in range(1, 7) if step in own)
    found, again = batches(first), batches(first, 1)
    assert student.training and torch.equal(torch.get_rng_state(), before)
    assert torch.cat([b.token_ids for b in found]).tolist() == torch.cat([b.token_ids for b in again]).tolist()
    rows = [planned.prepared.train[at] for group in written.groups(first, 1) for at in group]
    teacher: Any = planned.teacher.load(planned.tokenizer, planned.plan, lambda *_: None)
    for batch, row in zip(again, rows, strict=True):
        asked = batch.tensors["target_weights"] > 0
        prompt, answer = batch.token_ids[~asked].tolist(), batch.token_ids[asked]
        assert prompt == list(row.prompt_ids) and 1 <= len(answer) <= 6
        assert not batch.tensors[WRITTEN].any()
        behind = planned.teacher.reads(row, planned.renderer).prompt_ids
        with torch.no_grad():
            logits = teacher(input_ids=torch.tensor([[*behind, *answer.tolist()]])).logits[0, len(behind) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, batch.tensors[TEACHER_TOKENS].long())
        assert torch.allclose(batch.tensors[TEACHER_LOGPS][:, :-1], expected, atol=1e-4)


def test_learning_from_its_own_answers_moves_the_student(places: dict[str, Path], tmp_path: Path) -> None:
    values = recipe(places, of_teacher(places, on_policy=1, top_k=64), train={"steps": 20, "evaluate_every": 10})
    run = job({**values, "method": {"kind": "full"}}, tmp_path / "run")
    held_out = losses(run, "validation")
    assert held_out[-1] < 0.85 * losses(run, "step")[0]
    assert any("stays in memory" in note for note in run.read("plan.json")["notes"])


def test_spread_weights_cannot_answer(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="answers cannot be drawn from weights that are spread"):
        plan_of(recipe(places, of_teacher(places, on_policy=0.5), train={"shard": True}))


def wrong_teachers(places: dict[str, Path], root: Path) -> dict[str, str]:
    other = build_model(root / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    empty = root / "empty"
    empty.mkdir()
    no_weights = build_model(root / "no-weights")
    (no_weights / "model.safetensors").unlink()
    return {"other": str(other), "empty": str(empty), "no_weights": str(no_weights), "gone": str(root / "gone")}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "no such model directory"),
        ("empty", "holds no model"),
        ("no_weights", "no safetensors weights"),
        ("other", "2 tokens differ"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_loaded(
    name: str, said: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.pipeline import finetune as module

    monkeypatch.setattr(module, "load_model", lambda *given, **named: pytest.fail("a model was loaded"))
    wrong = wrong_teachers(places, tmp_path)
    with pytest.raises(InputError, match=said) as error:
        job(recipe(places, {"teacher": wrong[name]}), tmp_path / "run")
    assert error.value.where == "objective.teacher" and error.value.fix
    assert not (tmp_path / "run").exists()


def test_a_model_that_judges_cannot_teach(places: dict[str, Path], tmp_path: Path) -> None:
    labels = [{"text": row["prompt"], "label": "yes" if at % 3 else "no"} for at, row in enumerate(colour_rows(40))]
    values = {**recipe(places, {}), "objective": {"kind": "classify", "head_rate": 1}, "evaluate": "off"}
    values["data"] = {"train": str(write_jsonl(tmp_path / "labels.jsonl", labels)), "validation": 0.2}
    judge = job(values, tmp_path / "judge")
    with pytest.raises(InputError, match="judges and writes nothing"):
        plan_of(recipe(places, {"teacher": str(judge.path)}))


@pytest.mark.parametrize("objective", [{"teacher_prompt": PROMPT}, {"answers": "teacher"}, {"on_policy": 0.5}])
def test_raw_text_asks_nobody(places: dict[str, Path], objective: dict[str, Any]) -> None:
    values = recipe(places, of_teacher(places, **objective), data={"train": str(places["text"])})
    with pytest.raises(InputError, match="raw text") as error:
        plan_of(values)
    assert error.value.where == f"objective.{next(iter(objective))}"


def test_raw_text_can_be_learned_from_a_teacher(places: dict[str, Path], tmp_path: Path) -> None:
    run = job(recipe(places, of_teacher(places), data={"train": str(places["text"])}), tmp_path / "run")
    assert len(losses(run, "step")) == 6


def test_a_prompt_that_does_not_fit_is_refused(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="256 positions"):
        plan_of(recipe(places, of_teacher(places, teacher_prompt=PROMPT * 20)))


def test_a_prompt_that_the_template_refuses_is_told_with_the_row(places: dict[str, Path], tmp_path: Path) -> None:
    template = tmp_path / "no-system.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    values = recipe(places, of_teacher(places, teacher_prompt=PROMPT), data={"template": str(template)})
    with pytest.raises(InputError, match="behind the teacher's prompt: the chat template refuses") as error:
        plan_of(values)
    assert "rows.jsonl:" in str(error.value.where)


def test_an_answer_that_becomes_other_tokens_cannot_be_compared(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_of(recipe(places, of_teacher(places, teacher_prompt=PROMPT)))
    assert planned.prepared is not None and planned.teacher is not None and isinstance(planned.renderer, Renderer)
    item, other = planned.prepared.train[0], planned.prepared.train[1]
    monkeypatch.setattr(planned.renderer, "render", lambda row: other)
    with pytest.raises(InputError, match="becomes other tokens"):
        planned.teacher.reads(item, planned.renderer)


def test_a_prompt_without_room_for_an_answer(places: dict[str, Path]) -> None:
    planned = plan_of(recipe(places, of_teacher(places, answers="teacher")))
    assert planned.teacher is not None
    narrow = replace(planned, teacher=replace(planned.teacher, positions=9))
    with pytest.raises(InputError, match="no room for an answer"):
        with_teacher(narrow, lambda *_: None)


def test_a_budget_counts_one_model(places: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="a teacher is another one") as error:
        plan_of({**recipe(places, of_teacher(places)), "budget": {"memory": "8GB"}})
    assert error.value.where == "budget.memory"


def test_new_tokens_are_unknown_to_the_base_that_teaches_itself(places: dict[str, Path]) -> None:
    values = recipe(places, {"teacher_prompt": PROMPT})
    values["model"] = {"path": str(places["student"]), "add_tokens": ["<colour>"]}
    with pytest.raises(InputError, match="1 tokens differ") as error:
        plan_of(values)
    assert error.value.where == "model.add_tokens"


def test_full_tuning_saves_a_model_that_says_what_it_learned(places: dict[str, Path], tmp_path: Path) -> None:
    assert Full().saved_as == "model"
    run = job({**recipe(places, of_teacher(places)), "method": {"kind": "full"}}, tmp_path / "run")
    assert run.result is not None and (run.result / "model.safetensors").is_file()
