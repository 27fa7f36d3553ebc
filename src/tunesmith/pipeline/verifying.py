"""`tunesmith runs verify`: whether everything that belongs to a run is still what it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.base import InputError, Progress, silent
from tunesmith.data.read import Reading, content_hash
from tunesmith.files import file_sha256
from tunesmith.pipeline.fingerprints import differences
from tunesmith.pipeline.lineage import LINEAGE, MANIFEST, manifest_files, parent_directory, read_lineage
from tunesmith.pipeline.reproduce import REPRODUCE
from tunesmith.run import DATA, RECIPE, RESULTS, Run
from tunesmith.train.checkpoint import Checkpoints

State = Literal["ok", "changed", "gone", "not checked"]


@dataclass(frozen=True)
class Part:
    """One thing that was looked at.

    Attributes:
        name: what it is: the run's files, a checkpoint, a source of data, the base, a parent.
        state: `ok`; `changed`, which also stands for damaged and missing parts of what is there; `gone`, when it is no
            longer on this machine; `not checked`, when there is nothing to check it by.
        detail: what was found, in words.
        findings: each thing that has changed, when there are several.
        fix: what to do; empty when there is nothing to do.
    """

    name: str
    state: State
    detail: str
    findings: list[str] = field(default_factory=list)
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_run(run: Run, progress: Progress = silent) -> list[Part]:
    """Checks every hash that a run has: its files, its checkpoints, its data, its base and its parents.

    Raises:
        InputError: when `lineage.json` or `manifest.json` themselves cannot be read.
    """
    lineage = read_lineage(run)
    parts = [_files(run, progress), *_checkpoints(run)]
    if lineage is None:
        data = [{**source, "location": None} for source in run.read(DATA)["sources"]]
        parts += [_source(source, progress) for source in data]
        why = f"there is no {LINEAGE}: the run was begun by an older version"
        return [*parts, Part("base", "not checked", why)]
    parts += [_source(source, progress) for source in [*lineage["data"], *lineage["texts"]]]
    parts.append(_base(lineage["base"], progress))
    return parts + [_parent(run, parent) for parent in lineage["parents"]]


def _files(run: Run, progress: Progress) -> Part:
    if not (run.path / MANIFEST).is_file():
        done = run.report is not None
        why = "and was finished by an older version" if done else "because it is not finished"
        advice = "" if done else "finish it with --resume, and its files can be checked"
        return Part("files", "not checked", f"the run has no {MANIFEST}, {why}", fix=advice)
    manifest = run.read(MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise InputError("damaged: it does not list files", where=run.path / MANIFEST, fix="restore it from a copy")
    listed: dict[str, dict[str, Any]] = manifest["files"]
    found = differences(run.path, listed, "checking the run's files", progress)
    found += [
        f"{name} was not there when the run ended"
        for name in manifest_files(run.path)
        if name.split("/")[0] in RESULTS and name not in listed
    ]
    again = f"restore the run from a copy, or train it again: sh {run.path / REPRODUCE}"
    return _judged("files", found, f"{len(listed)} files are as the run left them", again)


def _checkpoints(run: Run) -> list[Part]:
    checkpoints = Checkpoints(run.checkpoints, 1)
    parts = []
    for step in checkpoints.steps():
        damage = checkpoints.damage(step)
        # A run that is at work removes checkpoints while they are being looked at.
        if damage is None:
            parts.append(Part(f"checkpoint {checkpoints.path(step).name}", "ok", "as it was committed"))
        elif checkpoints.path(step).is_dir():
            advice = "the result does not need it" if run.report is not None else "--resume uses the one before it"
            fix = f"remove {checkpoints.path(step)}; {advice}"
            parts.append(Part(f"checkpoint {checkpoints.path(step).name}", "changed", damage, [damage], fix))
    return parts


def _source(source: dict[str, Any], progress: Progress) -> Part:
    name = f"{source['role']} {source['path']}"
    # A run may have been moved with its project; relative paths of a recipe lead there from the project's directory.
    places = [place for place in (source["location"], source["path"]) if place and Path(place).expanduser().exists()]
    if not places and not source["location"]:
        why = "standard input is not kept" if source["path"] == "-" else "this is not a file of this machine"
        return Part(name, "not checked", why)
    if not places:
        return Part(name, "gone", f"it is no longer in {source['location']}", fix="put it back before training again")
    progress("checking data", 0, None)
    try:
        digest = content_hash(Reading(places[0], split=source.get("split")))
    except (OSError, InputError) as error:
        return Part(name, "changed", f"it cannot be read: {error}", fix="check its permissions and the disk it is on")
    found = [] if digest == source["sha256"] else [f"{places[0]} has changed"]
    return _judged(name, found, "the same content", "restore it, or `tunesmith rerun` the run on what it is now")


def _base(base: dict[str, Any], progress: Progress) -> Part:
    name = f"base {base['name']}"
    if not base["files"]:
        return Part(name, "not checked", "its files were not on this machine when the run began")
    named = str(Path(base["name"], base.get("within", ".")))
    places = [place for place in (base["location"], named) if Path(place).expanduser().is_dir()]
    if not places:
        return Part(name, "gone", f"it is no longer in {base['location']}", fix="put it back: the run needs its base")
    found = differences(Path(places[0]).expanduser(), base["files"], "checking the base", progress)
    fix = f"restore {places[0]}, or `tunesmith rerun` the run on what it is now"
    return _judged(name, found, f"{len(base['files'])} files are as the run found them", fix)


def _parent(run: Run, parent: dict[str, Any]) -> Part:
    directory = parent_directory(run, parent)
    name = f"parent {parent['run']}"
    if not (directory / RECIPE).is_file():
        return Part(name, "gone", f"there is no run in {directory}", fix="nothing but the run's history depends on it")
    if file_sha256(directory / RECIPE) != parent["recipe_sha256"]:
        return Part(name, "changed", f"another run is in {directory} now", fix="move that one away, or ignore this")
    return Part(name, "ok", "the run that it was")


def _judged(name: str, found: list[str], right: str, fix: str) -> Part:
    if not found:
        return Part(name, "ok", right)
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return Part(name, "changed", f"{found[0]}{more}", found, fix)
