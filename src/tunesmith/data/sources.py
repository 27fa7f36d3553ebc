"""The files that a recipe's `data` section names, and how each of them is read."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.base import InputError
from tunesmith.data.read import Reading
from tunesmith.data.spec import DataSpec, SourceSpec


def source_specs(spec: DataSpec) -> list[SourceSpec]:
    """The training sources with the defaults of the section filled in; the replayed one last.

    Raises:
        InputError: when none is named.
    """
    given = [spec.train] if isinstance(spec.train, str) else spec.train
    if not given:
        raise InputError("the list is empty", where="data.train", fix="name at least one file")
    full = [SourceSpec(path=item) if isinstance(item, str) else item for item in given]
    filled = [
        item.model_copy(
            update={
                "format": spec.format if item.format == "auto" else item.format,
                "columns": item.columns or spec.columns,
            }
        )
        for item in full
    ]
    if spec.replay is None:
        return filled
    replay = spec.replay.model_dump(include={"path", "format", "columns", "subset", "split"})
    return [*filled, SourceSpec(**replay)]


def readings(spec: DataSpec, also_held: Sequence[str] = ()) -> list[tuple[Reading, str]]:
    """How each source is read, and its role: the training sources in their order, then those that are held out.

    Args:
        also_held: more files to hold the training rows against.
    """
    sources = source_specs(spec)
    tasks = len(sources) - (spec.replay is not None)
    found = [
        (_reading(source, spec, parted=at < tasks), "train" if at < tasks else "replay")
        for at, source in enumerate(sources)
    ]
    held = [("validation", spec.validation), ("test", spec.test), *(("test", path) for path in also_held)]
    for role, value in held:
        if isinstance(value, str) and value != "auto":
            found.append((_reading(held_out_spec(value, spec), spec, parted=True), role))
    return found


def held_out_spec(path: str, spec: DataSpec) -> SourceSpec:
    """Held-out rows are read as the training rows are, when all of those are read alike."""
    like = source_specs(spec.model_copy(update={"replay": None}))
    same = all((other.format, other.columns) == (like[0].format, like[0].columns) for other in like)
    kind, columns = (like[0].format, like[0].columns) if same else (spec.format, spec.columns)
    return SourceSpec(path=path, format=kind, columns=columns)


def _reading(source: SourceSpec, spec: DataSpec, *, parted: bool) -> Reading:
    return Reading(
        path=source.path,
        format=source.format,
        columns=source.columns,
        subset=source.subset,
        split=source.split,
        answer_after=spec.answer_after if parted else None,  # what is replayed is of another kind
        system=spec.system,
        group=spec.group if parted else None,
        stratify=spec.stratify if parted else None,
    )
