"""What is trained on equals what TRL trains on where it is right; where the two differ, this says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chat_templates import FAMILIES, KEEPING, published
from rendering import TURNS, conversation, renderer, row

MARKED = {
    # Published templates with generation markers, and what they mark besides an answer and its end-of-turn:
    # before it, the header or a part of it, which is given to the model at inference and never predicted;
    # behind it, what stands after the end of every generation.
    "llama-3": ("llama3_training", "", ""),
    "phi-3": ("phi3_training", "", "<|endoftext|>"),
    "gemma": ("gemma_training", "", "\n"),
    "qwen2.5": ("qwen2_5_training", "\n", "\n"),
    "qwen3": ("qwen3_training", "", "\n"),
    "deepseek-v3": ("deepseekv3_training", "<｜Assistant｜>", ""),
    "glm-4": ("glm4moe_training", "", ""),
    "gpt-oss": ("gptoss_training", "<|start|>assistant", ""),
}


@pytest.mark.parametrize("name", MARKED)
def test_masks_equal_those_of_templates_with_generation_markers(name: str) -> None:
    marked, before, behind = MARKED[name]
    of = FAMILIES[name].tokenizer()
    messages = conversation(*(TURNS if name in KEEPING else TURNS[:2]))
    theirs: Any = of.apply_chat_template(
        messages, chat_template=published(marked), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = renderer(of).render(row(messages))
    ids = ours.example.token_ids.tolist()
    assert theirs["input_ids"] == ids
    targets = [at for at, weight in enumerate(ours.example.tensors["target_weights"].tolist()) if weight]
    lead, surplus = (of(text, add_special_tokens=False)["input_ids"] for text in (before, behind))
    expected = set(targets)
    for at in targets:
        if at - 1 not in targets and ids[at - len(lead) : at] == lead:
            expected |= set(range(at - len(lead), at))
        if at + 1 not in targets and ids[at + 1 : at + 1 + len(surplus)] == surplus:
            expected |= set(range(at + 1, at + 1 + len(surplus)))
    assert {at for at, bit in enumerate(theirs["assistant_masks"]) if bit} == expected
    assert not lead or expected > set(targets)


def test_conversations_as_trl_prepares_them_for_the_last_answer(tiny_model: Path, tmp_path: Path) -> None:
    """TRL trains on the line end after the end-of-turn too, which no generation reaches; all else is the same."""
    of = AutoTokenizer.from_pretrained(tiny_model)
    rows = [conversation(*TURNS[:2]), conversation(*TURNS), conversation("Hi", "é 日本", system="Be brief")]
    data = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in rows]
    here = renderer(of, "last-answer")
    for messages, their in zip(rows, _prepared(tiny_model, of, data, tmp_path), strict=True):
        ours = here.render(row(messages)).example
        assert ours.token_ids.tolist() == their["input_ids"]
        targets = [int(label != -100) for label in their["labels"]]
        assert targets[-2:] == [1, 1]
        assert (ours.tensors["target_weights"] > 0).int().tolist() == [*targets[:-1], 0]


def test_conversations_as_trl_prepares_them_for_every_answer(tiny_model: Path, tmp_path: Path) -> None:
    """TRL finds the training template of a model by the text of its own one; here that of Qwen2.5."""
    of = AutoTokenizer.from_pretrained(tiny_model)
    of.chat_template = published("qwen2_5")
    rows = [conversation(*TURNS[:2]), conversation(*TURNS), conversation("Hi", "é 日本", system="Be brief")]
    here = renderer(of)
    expected = [here.render(row(messages)).example for messages in rows]
    data = [{"messages": messages} for messages in rows]
    for ours, their in zip(expected, _prepared(tiny_model, of, data, tmp_path, assistant_only_loss=True), strict=True):
        assert ours.token_ids.tolist() == their["input_ids"]
        targets = {at for at, weight in enumerate(ours.tensors["target_weights"].tolist()) if weight}
        line_ends = {at for edge in targets for at in (edge - 1, edge + 1) if at not in targets}
        assert {at for at, label in enumerate(their["labels"]) if label != -100} == targets | line_ends


def test_prompts_and_completions_as_trl_prepares_them(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing differs: the completion and the end-of-text are trained on."""
    of = AutoTokenizer.from_pretrained(tiny_model)
    rows = [("Say 3 red\n", "RED 3"), ("Q: é", " 日本"), ("Answer:", " the end of it")]
    data = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    here = renderer(of, template="plain")
    for (prompt, completion), their in zip(rows, _prepared(tiny_model, of, data, tmp_path), strict=True):
        ours = here.render(row(conversation(prompt, completion))).example
        assert ours.token_ids.tolist() == their["input_ids"]
        assert (ours.tensors["target_weights"] > 0).tolist() == [label != -100 for label in their["labels"]]


def _prepared(model: Path, of: PreTrainedTokenizerFast, rows: list[Any], directory: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = SFTConfig(
        output_dir=str(directory),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
        **settings,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    trainer = SFTTrainer(model=loaded, args=config, train_dataset=Dataset.from_list(rows), processing_class=of)
    return trainer.train_dataset
