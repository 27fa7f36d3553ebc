"""Well-known public data sets by name: where they are, how they are written, and under which licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.data.spec import Format


@dataclass(frozen=True)
class Preset:
    """One public data set.

    Attributes:
        path: its id on the model hub.
        format: how its rows are written.
        licence: an SPDX identifier, or in words what its card says.
        about: one line.
        subset: its configuration, where there are several.
        split: which of its splits is read.
        columns: its names of the parts of a row.
    """

    path: str
    format: Format
    licence: str
    about: str
    subset: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)


QUESTION_ANSWER = {"prompt": "question", "completion": "answer"}

PRESETS: dict[str, Preset] = {
    "alpaca": Preset(
        "tatsu-lab/alpaca", "alpaca", "CC-BY-NC-4.0", "52,000 instructions with answers of text-davinci-003"
    ),
    "alpaca-cleaned": Preset(
        "yahma/alpaca-cleaned", "alpaca", "CC-BY-4.0", "Alpaca with wrong and empty answers repaired"
    ),
    "dolly": Preset(
        "databricks/databricks-dolly-15k", "dolly", "CC-BY-SA-3.0", "15,000 instructions and answers by employees"
    ),
    "openassistant": Preset(
        "OpenAssistant/oasst1", "openassistant", "Apache-2.0", "trees of conversations in 35 languages by volunteers"
    ),
    "openassistant-2": Preset(
        "OpenAssistant/oasst2", "openassistant", "Apache-2.0", "OpenAssistant's trees, collected for longer"
    ),
    "no-robots": Preset(
        "HuggingFaceH4/no_robots", "messages", "CC-BY-NC-4.0", "10,000 conversations written by people"
    ),
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k",
        "messages",
        "MIT",
        "200,000 filtered dialogues of ChatGPT with itself",
        split="train_sft",
    ),
    "ultrafeedback": Preset(
        "HuggingFaceH4/ultrafeedback_binarized",
        "preference",
        "MIT",
        "61,000 pairs of answers, judged by GPT-4",
        split="train_prefs",
    ),
    "openhermes": Preset(
        "teknium/OpenHermes-2.5", "sharegpt", "none stated on its card", "a million answers, most of them of GPT-4"
    ),
    "slimorca": Preset("Open-Orca/SlimOrca", "sharegpt", "MIT", "518,000 answers of GPT-4 to FLAN's tasks"),
    "gsm8k": Preset(
        "openai/gsm8k",
        "prompt-completion",
        "MIT",
        "grade-school word problems with their solutions",
        subset="main",
        columns=QUESTION_ANSWER,
    ),
    "metamath": Preset(
        "meta-math/MetaMathQA",
        "prompt-completion",
        "MIT",
        "395,000 questions augmented from GSM8K and MATH",
        columns={"prompt": "query", "completion": "response"},
    ),
    "sst2": Preset(
        "stanfordnlp/sst2",
        "labelled",
        "unknown by its card",
        "sentences of film reviews, positive or negative",
        columns={"text": "sentence", "label": "label"},
    ),
    "banking77": Preset(
        "legacy-datasets/banking77", "labelled", "CC-BY-4.0", "questions to a bank with one of 77 intents"
    ),
    "wikitext": Preset(
        "Salesforce/wikitext",
        "text",
        "CC-BY-SA-3.0 and GFDL",
        "articles of Wikipedia, a line a row; many lines are empty, so set data.empty: drop",
        subset="wikitext-2-raw-v1",
    ),
}
"""Hub ids, columns and licences as the sets' own cards state them."""
