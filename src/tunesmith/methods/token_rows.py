"""Rows of the vocabulary that are trained by themselves: embeddings of single tokens, and their rows of the head.

Meant for tokens that were added to a model or that pretraining never showed it: the rest of a table of millions of
weights stays frozen. Saved as PEFT saves its `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.base import InputError
from tunesmith.methods.targets import output_head_name
from tunesmith.models.embeddings import added_tokens, grow_vocabulary, vocabulary_rows
from tunesmith.models.load import load_tokenizer

SUFFIX = "token_adapter.trainable_tokens_delta"
"""What PEFT calls such rows in its files."""
FIELD = "method.trainable_tokens"


class TrainedRows(nn.Module):
    """An embedding table, or a head ``[vocabulary, width]``, some of whose rows are trained in the place of its own.

    Attributes:
        base: the frozen module.
        rows: fp32 ``[tokens, width]``; a tied head has the same ones.
        ids: the tokens that they are of, ascending; ``token_ids``, the same as int64 ``[tokens]``.
        used: whether they are; else the frozen ones.
    """

    is_adapter: ClassVar[bool] = True

    def __init__(self, base: nn.Module, rows: nn.Parameter, ids: Sequence[int]) -> None:
        super().__init__()
        self.base, self.rows, self.ids, self.used = base, rows, list(ids), True
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.tensor(self.ids, device=rows.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table: some architectures look at its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.base, "bias", None))

    def forward(self, given: Tensor) -> Tensor:
        output = self.base(given)
        if not self.used:
            return output
        if isinstance(self.base, nn.Embedding):
            place = torch.searchsorted(self.token_ids, given).clamp(max=len(self.token_ids) - 1)
            # Gemma scales what the table returns.
            rows = F.embedding(place, self.rows) * getattr(self.base, "embed_scale", 1.0)
            return torch.where((self.token_ids[place] == given)[..., None], rows.to(output.dtype), output)
        bias = None if self.bias is None else self.bias[self.token_ids].to(given.dtype)
        logits = F.linear(given, self.rows.to(given.dtype), bias)
        return output.index_copy(-1, self.token_ids, logits.to(output.dtype))


def token_rows(model: nn.Module) -> dict[str, TrainedRows]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedRows)}


def trained_token_ids(model: nn.Module) -> list[int]:
    """Tokens whose rows are trained by themselves, in layers of our own or of PEFT's."""
    table = cast(Any, model).get_input_embeddings()
    if isinstance(table, TrainedRows):
        return table.ids
    theirs = getattr(table, "token_adapter", None)
    return [] if theirs is None else list(theirs.token_indices["default"])


def chosen_tokens(model: nn.Module, tokens: Literal["added"] | Sequence[str | int]) -> list[int]:
    """Ids of tokens that are named by their text or id, ascending.

    Raises:
        InputError: when there are none, or one is not a single token of this model.
    """
    added = added_tokens(model)
    if tokens == "added":
        if not added:
            raise InputError(
                "no tokens were added to this model", where=FIELD, fix="list them in model.add_tokens, or name some"
            )
        return sorted(added.values())
    if not tokens:
        raise InputError("there is no token in the list", where=FIELD, fix="name some, or leave it out")
    rows, known = vocabulary_rows(model), dict(added)
    if any(isinstance(token, str) and token not in added for token in tokens):
        known = load_tokenizer(cast(Any, model).name_or_path).get_vocab() | known
    found = set[int]()
    for token in tokens:
        number = known.get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < rows:
            raise InputError(
                f"{token!r} is not a token of this model",
                where=FIELD,
                fix="write it as the vocabulary does, or add it with model.add_tokens",
            )
        found.add(number)
    return sorted(found)


def train_rows(model: nn.Module, token_ids: Sequence[int], adapted: Collection[str]) -> None:
    """Trains the rows of ``token_ids`` in the embedding table and in the head, which share them where they are tied.

    Args:
        adapted: names of modules that the method changes otherwise.

    Raises:
        InputError: when one of the two is among those.
    """
    rows: dict[int, nn.Parameter] = {}
    for name, module in _tables(model).items():
        if name in adapted or any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(
                f"{name} is trained by the method already",
                where=FIELD,
                fix="leave it out of targets and modules_to_save",
            )
        weight = cast(nn.Parameter, module.weight)
        if id(weight) not in rows:
            ids = torch.tensor(token_ids, device=weight.device)
            rows[id(weight)] = nn.Parameter(weight.detach()[ids].float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, TrainedRows(module, rows[id(weight)], token_ids))


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding table and the head by name."""
    table = cast(Any, model).get_input_embeddings()
    found = {next(name for name, module in model.named_modules() if module is table): table}
    head = output_head_name(model)
    return found if head is None else {**found, head: model.get_submodule(head)}


def _own_tables(model: nn.Module) -> list[str]:
    """Names of the embedding table and, where it is not tied to it, of the head."""
    first: dict[int, str] = {}
    for name, module in _tables(model).items():
        first.setdefault(id(module.weight), name)
    return list(first.values())


def row_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained rows by the names that they have in PEFT's files, without its prefix; tied ones once."""
    found = token_rows(model)
    return {f"{name}.{SUFFIX}": found[name].rows for name in _own_tables(model) if name in found}


def indices_for_peft(model: nn.Module, token_ids: Sequence[int] | None = None) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for some tokens, or for those that are trained in ``model``."""
    if token_ids is None:
        found = next(iter(token_rows(model).values()), None)
        if found is None:
            return None
        token_ids = found.ids
    return {name.rpartition(".")[2]: list(token_ids) for name in _own_tables(model)}


def indices_from_peft(model: nn.Module, config: Mapping[str, Any]) -> list[int] | None:
    """The ids that a configuration of PEFT's names for table and head alike.

    Returns:
        None when there are none, or they are of other layers or differ: only PEFT's own layers can train those.
    """
    named = config.get("trainable_token_indices")
    if not named:
        return None
    whole = [name.rpartition(".")[2] for name in _tables(model)]
    by_layer = named if isinstance(named, dict) else {whole[0]: named}
    needed = {name.rpartition(".")[2] for name in _own_tables(model)}
    different = {tuple(sorted(ids)) for ids in by_layer.values()}
    return sorted(next(iter(different))) if needed <= by_layer.keys() <= set(whole) and len(different) == 1 else None


def make_room_for(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Grows a model's vocabulary to that of the one that an adapter was trained on.

    Args:
        config, tensors: of the adapter, whose names are those in the model.
    """
    named = config.get("trainable_token_indices") or []
    ids = [number for some in (named.values() if isinstance(named, dict) else [named]) for number in some]
    whole = tensors.get(f"{_own_tables(model)[0]}.weight")
    needed = max([number + 1 for number in ids] + [0 if whole is None else len(whole)])
    if needed > vocabulary_rows(model):
        grow_vocabulary(model, needed)


@contextmanager
def without_rows(model: nn.Module) -> Iterator[None]:
    """Runs the model with its frozen rows."""
    modules = token_rows(model).values()
    for module in modules:
        module.used = False
    try:
        yield
    finally:
        for module in modules:
            module.used = True


def merge_rows(model: nn.Module) -> int:
    """Writes trained rows into the tables and puts plain modules back; returns how many modules there were."""
    found = token_rows(model)
    for name, module in found.items():
        with torch.no_grad():
            module.weight[module.token_ids] = module.rows.to(module.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.base)
    return len(found)
