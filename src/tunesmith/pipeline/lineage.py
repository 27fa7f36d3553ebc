"""Where a run comes from, and what it left: `lineage.json` at its beginning, `manifest.json` at its end."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.read import STANDARD_INPUT, Reading, content_hash
from tunesmith.data.sources import readings
from tunesmith.files import ASIDE, file_sha256, read_json
from tunesmith.models.load import DEMO, weights_directory
from tunesmith.pipeline.fingerprints import Fingerprint, fingerprints
from tunesmith.pipeline.origin import dependency_versions, tunesmith_origin
from tunesmith.recipe import Recipe
from tunesmith.run import HELD, LOCK, MERGED, PLAN, RECIPE, RESULTS, Run

if TYPE_CHECKING:
    from tunesmith.pipeline.planning import Planned
    from tunesmith.pipeline.teacher import Teacher

LINEAGE, MANIFEST = "lineage.json", "manifest.json"
CHECKPOINTS, TRACKERS = "checkpoints", ("tensorboard", "wandb")

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "adapter_config.json",
)  # fmt: skip
"""What transformers and PEFT read beside the weights to build a model and its tokenizer."""


def describe_lineage(path: Path, planned: Planned, parent: Path | None, progress: Progress = silent) -> dict[str, Any]:
    """Everything that a run comes from. It holds no times: the same base, data, parents and versions say the same.

    Args:
        path: the run's directory, which need not exist yet.
        parent: the run that this one repeats with something changed, if any.

    Raises:
        InputError: when a file of the base cannot be read.
    """
    assert planned.prepared is not None
    base = _base(planned, progress)
    return {
        "base": base,
        **_teacher(planned, progress),
        "data": _data(planned.recipe, planned.prepared.sources),
        "texts": _texts(planned.recipe),
        "parents": _parents(path, base["location"], parent),
        "tunesmith": tunesmith_origin(),
        "python": platform.python_version(),
        "versions": dependency_versions(),
    }


def write_lineage(run: Run, planned: Planned, parent: Path | None, progress: Progress = silent) -> None:
    """Writes `lineage.json`; a run that repeats another one goes on doing so when it is written anew.

    Raises:
        InputError: as `describe_lineage`.
    """
    run.write(LINEAGE, describe_lineage(run.path, planned, parent or next(iter(repeated_runs(run)), None), progress))


def read_lineage(run: Run) -> dict[str, Any] | None:
    """What `write_lineage` wrote; None for a run of a version that wrote none.

    Raises:
        InputError: when it is damaged.
    """
    if not (run.path / LINEAGE).is_file():
        return None
    lineage = run.read(LINEAGE)
    if not isinstance(lineage, dict) or not {"base", "data", "texts", "parents"} <= lineage.keys():
        raise InputError("damaged: it is not what a run writes", where=run.path / LINEAGE, fix="restore it from a copy")
    return lineage


def parent_directory(run: Run, parent: dict[str, Any]) -> Path:
    """The directory of one of a run's `parents`, which are recorded relative to the run."""
    return Path(os.path.abspath(run.path / parent["run"]))


def repeated_runs(run: Run) -> list[Path]:
    """Directories of the runs that a run repeats: at most one."""
    lineage = read_lineage(run)
    parents = [] if lineage is None else lineage["parents"]
    return [parent_directory(run, parent) for parent in parents if parent["how"] == "rerun"]


def write_manifest(run: Run) -> None:
    """Writes `manifest.json`: size and SHA-256 of every file of a finished run.

    Left out are checkpoints, which have manifests of their own, the lock, the folders of trackers, what is not
    committed yet, other runs inside this one, and what later ones started from.
    """
    run.write(MANIFEST, {"files": fingerprints(run.path, manifest_files(run.path), "hashing the run", silent)})


def manifest_files(directory: Path) -> list[str]:
    """Names of the files of a run that a manifest lists, with `/` between their parts."""
    names = []
    for place, folders, files in os.walk(directory):
        here = Path(place)
        top = here == directory
        folders[:] = [
            name
            for name in folders
            if ASIDE not in name
            and not (top and (name in (CHECKPOINTS, *TRACKERS) or name.startswith(MERGED)))
            and not (here / name / RECIPE).is_file()
        ]
        for name in files:
            if ASIDE not in name and not (top and name in (HELD, LOCK, MANIFEST)):
                names.append((here / name).relative_to(directory).as_posix())
    return sorted(names)


def _base(planned: Planned, progress: Progress) -> dict[str, Any]:
    spec = planned.recipe.model
    directory, commit = directory_of_model(planned.location, spec.revision)
    here = "directory" if Path(planned.location).is_dir() else "hub"
    return {
        "name": spec.path,
        "from": DEMO if spec.path == DEMO and not Path(DEMO).exists() else here,
        "location": str(directory) if directory else planned.location,
        "within": _within(spec.path, directory),
        "revision": spec.revision,
        "commit": commit,
        "files": {} if directory is None else model_files(directory, "hashing the base", progress),
    }


def _teacher(planned: Planned, progress: Progress) -> dict[str, Any]:
    """What a student learned from, where that is another model than its base."""
    teacher = planned.teacher
    if teacher is None or teacher.itself:
        return {}
    return {"teacher": {"name": teacher.name, "files": teacher_files(teacher, progress)}}


def teacher_files(teacher: Teacher, progress: Progress) -> list[dict[str, Fingerprint]]:
    """Fingerprints of a teacher's files: those of its weights, and of the adapter on them if there is one.

    Raises:
        InputError: when one cannot be read, or the weights are not on this machine.
    """
    directory, _ = directory_of_model(teacher.location.base, teacher.revision)
    directory = directory or weights_directory(teacher.location.base, teacher.revision)
    parts = [directory, *([] if teacher.location.adapter is None else [teacher.location.adapter])]
    return [model_files(part, "hashing the teacher", progress) for part in parts]


def model_files(directory: Path, label: str, progress: Progress) -> dict[str, Fingerprint]:
    """Fingerprints of the files that make a model and its tokenizer, or an adapter.

    Raises:
        InputError: when one cannot be read.
    """
    names = {path.name for pattern in WEIGHTS for path in directory.glob(pattern)}
    names |= {name for name in BESIDE_WEIGHTS if (directory / name).is_file()}
    try:
        return fingerprints(directory, sorted(names), label, progress)
    except OSError as error:
        raise InputError(
            f"a file of the model cannot be read: {error.strerror}",
            where=error.filename or directory,
            fix="check its permissions and the disk it is on",
        ) from error


def _within(named: str, directory: Path | None) -> str:
    """Where the weights are below what the recipe names, when that is a run or an adapter; else `.`."""
    place = os.path.expanduser(named)
    return _relative(str(directory), os.path.abspath(place)) if directory and os.path.isdir(place) else "."


def directory_of_model(location: str, revision: str | None) -> tuple[Path | None, str | None]:
    """The directory that the weights are read from, and the hub's commit when it is a snapshot of the hub's cache."""
    directory = Path(os.path.abspath(location))
    if not directory.is_dir():
        cached = try_to_load_from_cache(location, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None, None
        directory = Path(cached).parent
    snapshot = directory.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", directory.name) is not None
    return directory, directory.name if snapshot else None


def _data(recipe: Recipe, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources of `data.json`, and for those on this machine where they are."""
    return [
        {**source, "location": _location(reading.path), "split": reading.split}
        for (reading, _), source in zip(readings(recipe.data), sources, strict=True)
    ]


def _texts(recipe: Recipe) -> list[dict[str, Any]]:
    """Files that a result depends on besides data and base: a template, general text, benchmarks."""
    named = [("template", recipe.data.template)]
    named += [("benchmark", path) for path in recipe.data.benchmarks]
    if recipe.evaluate != "off":
        named.append(("forgetting", recipe.evaluate.forgetting))
    found = []
    for role, path in named:
        location = _location(path)
        if location is not None and path not in ("auto", "off", "plain"):
            digest = content_hash(Reading(location))
            found.append({"path": path, "role": role, "sha256": digest, "location": location, "split": None})
    return found


def _location(path: str) -> str | None:
    """Absolute path of what is on this machine; None for standard input and data sets of the hub."""
    file = os.path.expanduser(path)
    return os.path.abspath(file) if path != STANDARD_INPUT and os.path.exists(file) else None


def _parents(path: Path, base: str, repeated: Path | None) -> list[dict[str, Any]]:
    found = [("rerun", repeated)] if repeated is not None else []
    found += [("base", directory) for directory in (run_of_base(Path(base)),) if directory is not None]
    return [
        {
            "how": how,
            "run": _relative(os.path.abspath(directory), os.path.abspath(path)),
            "recipe_sha256": file_sha256(directory / RECIPE),
        }
        for how, directory in found
    ]


def run_of_base(base: Path) -> Path | None:
    """The run that made a model: the one it lies in, or whose adapter was merged into it."""
    if (inside := _run_around(base)) is not None:
        return inside
    try:
        adapter = read_json(base / "merge.json")["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A relative name was written from the directory that `merge` was called in, which may have been any above.
    for start in (Path(), *base.absolute().parents):
        if (start / str(adapter)).is_dir():
            return _run_around(start / str(adapter))
    return None


def _run_around(result: Path) -> Path | None:
    run = Path(os.path.abspath(result)).parent
    is_run = (
        (result.name in RESULTS or result.name.startswith(MERGED))
        and (run / RECIPE).is_file()
        and (run / PLAN).is_file()
    )
    return run if is_run else None


def _relative(path: str, start: str) -> str:
    """Runs that are moved together still find each other; on Windows other drives have no relative path."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return Path(path).as_posix()
