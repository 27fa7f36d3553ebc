"""The renderer of raw documents: every token of a text is trained on, its end included."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from transformers import PreTrainedTokenizerBase

from tunesmith.base import InputError
from tunesmith.data.formats import LAYOUTS
from tunesmith.data.render import Rendered, Renderer
from tunesmith.data.row import Row
from tunesmith.data.spec import DataSpec
from tunesmith.models.templates import resolve_template

OF_CONVERSATIONS = ("answer_after", "system", "template", "train_on", "overlong")
"""Settings of `data` that mean nothing where documents are read whole and cut into blocks."""


class DocumentRenderer(Renderer):
    """A document as the tokens that open it, its text and end-of-text.

    What stands first is context and never a target: the tokenizer's own begin-of-text token, or, where it puts none,
    end-of-text, with which the document before would have ended (Radford et al. 2019, GPT-2). So the first token of the
    text is predicted too.
    """

    in_blocks: ClassVar[bool] = True
    unused = tuple(dict.fromkeys([*(name for name, _, _ in LAYOUTS if name != "text"), "openassistant"]))

    @property
    def name(self) -> str:
        return "documents as they are"

    def identity(self) -> dict[str, Any]:
        return {"documents": super().identity()}

    @classmethod
    def of(cls, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> DocumentRenderer:
        """The renderer of a recipe's `data` section; the model's own template goes with the result untouched.

        Raises:
            InputError: for settings that only conversations have.
        """
        given = DataSpec(train="")
        for name in OF_CONVERSATIONS:
            if getattr(spec, name) != getattr(given, name):
                raise InputError(
                    "objective.kind: pretrain reads documents whole and cuts them into blocks; this is about "
                    "conversations or single rows",
                    where=f"data.{name}",
                    fix="remove it, or use objective.kind: sft",
                )
        return cls(resolve_template("auto", tokenizer), tokenizer, spec.train_on, stop_ids)

    def _finished_text(self, row: Row, ids: list[int]) -> Rendered:
        opening = [] if self._bos else [cast(int, self.tokenizer.eos_token_id)]
        return super()._finished_text(row, opening + ids)
