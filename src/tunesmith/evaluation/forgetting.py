"""General text on which a model should be no worse after fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.batch import Example
from tunesmith.data.general_text import general_text
from tunesmith.data.read import Reading, open_records
from tunesmith.data.record import RowErrors
from tunesmith.data.render import TOKEN_SCOPES
from tunesmith.models.templates import opening_text

LONGEST = 512
MOST_PASSAGES = 48


@dataclass(frozen=True)
class GeneralText:
    """Passages whose perplexity is compared before and after.

    Attributes:
        source: what the report calls them.
        passages: every token but the first is a target.
    """

    source: str
    passages: list[Example]


def general_passages(setting: str, tokenizer: PreTrainedTokenizerBase, model_limit: int) -> GeneralText | None:
    """Loads the general text that a recipe names; None when the check is off.

    Raises:
        InputError: when the file cannot be read or its rows have no text.
    """
    if setting == "off":
        return None
    if setting == "auto":
        source, texts = general_text()
    else:
        source, texts = setting, _texts(setting)
    limit = min(LONGEST, model_limit)
    passages = [_passage(text, tokenizer, limit) for text in texts[:MOST_PASSAGES]]
    passages = [passage for passage in passages if len(passage) > 1]
    if not passages:
        raise InputError("the general text is empty", where="evaluate.forgetting")
    return GeneralText(source, passages)


def _texts(path: str) -> list[str]:
    """The first texts of a file, as many as are measured on."""
    errors = RowErrors()
    records = islice(open_records(Reading(path), errors), MOST_PASSAGES)
    texts = [_text_of(record.fields, str(record.source)) for record in records]
    errors.raise_any()
    return texts


def _text_of(fields: dict[str, object], where: str) -> str:
    for name in ("text", "content", "document"):
        if isinstance(value := fields.get(name), str):
            return value
    raise InputError("general text needs a `text` column", where=where, fix="use a .txt file, or rows with `text`")


def _passage(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> Example:
    ids = cast(list[int], tokenizer(opening_text(tokenizer) + text, add_special_tokens=False)["input_ids"])[:limit]
    weights = torch.ones(len(ids))
    weights[:1] = 0.0
    return Example(torch.tensor(ids), {"target_weights": weights}, TOKEN_SCOPES)
