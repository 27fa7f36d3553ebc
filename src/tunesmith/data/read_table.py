"""Parquet files, `datasets` directories and data sets of the hub: batches of rows with their class labels named."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO, Any, cast

from tunesmith.base import InputError, Source, nearest
from tunesmith.data.compressed import CHUNK, FileBytes, whole_file
from tunesmith.data.record import Record

BATCH = 500
"""Rows turned into Python objects at a time."""

NO_PARQUET = "name a whole Parquet file, or use the ending of the format that it has"


class Table:
    """Rows in batches.

    Args:
        batches: of rows.
        names: for each column of class labels the names that its numbers stand for.
        rows: how many there are.
        shown: the table's name in messages.
        reading: open while rows are read.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[list[dict[str, Any]]]],
        names: Mapping[str, list[str]],
        rows: int,
        shown: str,
        reading: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._batches, self._names, self._rows, self._shown = batches, names, rows, shown
        self._reading = reading or ExitStack()
        self._done = 0

    def position(self) -> tuple[int, int]:
        """Rows done, and of how many."""
        return self._done, self._rows

    def __iter__(self) -> Iterator[Record]:
        with self._reading, whole_file(self._shown):
            for batch in self._batches():
                for row in batch:
                    self._done += 1
                    for column, known in self._names.items():
                        row[column] = _named(row.get(column), known)
                    yield Record(row, Source(self._shown, self._done))


def _named(value: Any, known: list[str]) -> Any:
    """A model should learn to say the names of classes, not their numbers."""
    if isinstance(value, list):
        return [_named(item, known) for item in value]
    if isinstance(value, int):
        return known[value] if 0 <= value < len(known) else None
    return value


def parquet_table(file: FileBytes) -> Table:
    """Opens a Parquet file; a compressed one is unpacked into a temporary file.

    Raises:
        InputError: when it is none.
    """
    import pyarrow
    import pyarrow.parquet

    opened = ExitStack()
    try:
        source = opened.enter_context(_unpacked(file) if file.compression else open(file.file, "rb"))  # noqa: SIM115 closed with the table
        table = pyarrow.parquet.ParquetFile(source, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        opened.close()
        raise InputError(f"not a Parquet file: {error}", where=file.shown, fix=NO_PARQUET) from error
    stored = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    features: dict[str, Any] = (stored.get("info") or {}).get("features") or {}
    names = {column: found for column, feature in features.items() if (found := _stored_names(feature))}

    def batches() -> Iterator[list[dict[str, Any]]]:
        try:
            for batch in table.iter_batches(batch_size=BATCH):
                yield batch.to_pylist()
        except pyarrow.ArrowException as error:
            raise InputError(
                f"cannot be read: {error}", where=file.shown, fix="check that the file is whole"
            ) from error

    return Table(batches, names, table.metadata.num_rows, file.shown, opened)


def _unpacked(file: FileBytes) -> IO[bytes]:
    whole = tempfile.TemporaryFile()  # noqa: SIM115
    with file.open() as stream:
        while block := stream.read(CHUNK):
            whole.write(block)
    whole.seek(0)
    return whole


def _stored_names(feature: Any) -> list[str] | None:
    """Class names as `datasets` writes them beside a Parquet file's schema, of a column or of a column of lists."""
    if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    elif isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        return feature.get("names")
    return None


def directory_table(file: Path, shown: str, split: str | None) -> tuple[Table, list[str]]:
    """Opens a directory written by `datasets`, and says what of it is not read. Its files are mapped, not loaded.

    Args:
        split: which split of several; None is ``train``.

    Raises:
        InputError: when the directory is none, or has no such split.
    """
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(file))
    except (OSError, ValueError) as error:
        raise InputError(
            f"not a directory written by datasets: {str(error).splitlines()[0]}",
            where=shown,
            fix="name a file inside the directory, or a directory from save_to_disk",
        ) from error
    if isinstance(data, Dataset):
        if split is not None:
            raise InputError(
                f"the directory is one split, so there is no {split!r} in it", where=shown, fix="remove `split`"
            )
        return dataset_table(data, shown), []
    chosen, splits = split or "train", [str(name) for name in data]
    if chosen not in splits:
        raise InputError(
            f"the directory holds several splits: {', '.join(splits)}, and no {chosen!r}{nearest(chosen, splits)}",
            where=shown,
            fix=f"set `split` to one of them, for example {splits[0]}, or name {shown.rstrip('/')}/{splits[0]}",
        )
    others = [name for name in splits if name != chosen]
    notes = [f"{shown}: read the split {chosen!r}, not {', '.join(others)}"] if others and split is None else []
    return dataset_table(data[chosen], shown), notes


def hub_data(path: str, subset: str | None, split: str | None) -> Any:
    """Loads one split of a data set of the hub: downloaded once, then mapped from the cache of `datasets`.

    Raises:
        InputError: when it cannot be fetched, or has no such configuration or split.
    """
    from datasets import load_dataset

    chosen = split or "train"
    try:
        return load_dataset(path, name=subset, split=chosen)
    except Exception as error:  # the hub client raises dozens of unrelated classes for "not there" and "no network"
        said = str(error).strip() or type(error).__name__
        listed = re.search(r"(?:Should be one of|available configs:|Available:)\s*(\[[^\]]*\])", said)
        if listed and "split" in said.lower():
            what, fix = f"there is no split {chosen!r}; it has {listed[1]}", "set `split` to one of them"
        elif listed:
            what = f"there is no configuration {subset!r}" if subset else "it has several configurations"
            what, fix = f"{what}: {listed[1]}", "set `subset` to one of them"
        else:
            what = f"neither a file here nor a data set that can be fetched: {said.splitlines()[0]}"
            fix = "check the path, or the hub id and the network"
        raise InputError(what, where=path, fix=fix) from error


def dataset_table(data: Any, shown: str) -> Table:
    """Rows of a `datasets.Dataset`."""

    def batches() -> Iterator[list[dict[str, Any]]]:
        for batch in cast(Any, data).iter(batch_size=BATCH):
            columns = list(batch)
            yield [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    names = {column: found for column, feature in data.features.items() if (found := _feature_names(feature))}
    return Table(batches, names, len(data), shown)


def _feature_names(feature: Any) -> list[str] | None:
    from datasets import ClassLabel

    inner = getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) and inner.names else None
