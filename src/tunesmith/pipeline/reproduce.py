"""`reproduce.sh`: a shell script in every run that makes its environment anew, checks its inputs and trains again."""

from __future__ import annotations

import re
import shlex
from typing import Any

from tunesmith.files import read_json
from tunesmith.models.load import DEMO
from tunesmith.pipeline.lineage import LINEAGE
from tunesmith.pipeline.origin import OPTIONAL
from tunesmith.pipeline.planning import Planned
from tunesmith.run import ENVIRONMENT, Run

REPRODUCE = "reproduce.sh"
TORCH_WHEELS = "https://download.pytorch.org/whl/"


def write_reproduce_script(run: Run, planned: Planned) -> None:
    """Writes `reproduce.sh`; `lineage.json` and `environment.json` must stand in the run already."""
    lineage, environment = read_json(run.path / LINEAGE), read_json(run.path / ENVIRONMENT)
    run.write_text(REPRODUCE, reproduce_script(lineage, environment, planned.recipe.output))


def reproduce_script(lineage: dict[str, Any], environment: dict[str, Any], output: str) -> str:
    """A POSIX shell script, which checks hashes with Python's standard library alone, and names no path of this machine
    but those that the recipe names.

    Args:
        lineage: from `describe_lineage`.
        environment: from `describe_environment`.
        output: the run's directory as the recipe names it.
    """
    versions = _versions(lineage, environment)
    is_here = lineage["base"]["from"] == "directory"
    values = {
        "PYTHON_VERSION": ".".join(lineage["python"].split(".")[:2]),
        "TORCH": _own_build_of_torch(versions.get("torch", "")),
        "REQUIREMENTS": "".join(f"        {shlex.quote(f'{name}=={one}')} \\\n" for name, one in versions.items()),
        "CONSTRAINTS": "\n".join(f"{name}=={version}" for name, version in lineage["versions"].items()),
        "TUNESMITH": _tunesmith(lineage["tunesmith"]),
        "SOURCE_SHA256": lineage["tunesmith"]["source_sha256"],
        "INPUTS": _listed([*lineage["data"], *lineage["texts"]]),
        "BASE": shlex.quote(_joined(lineage["base"])) if is_here else "$(fetch_base)",
        "FETCH_BASE": "" if is_here else _FETCH_BASE.replace("@FETCH@", _fetch(lineage["base"])),
        "BASE_FILES": ascii([(name, entry["sha256"]) for name, entry in lineage["base"]["files"].items()]),
        "THREADS": str(int(environment["threads"])),
        "LAUNCH": _launch(int(environment["processes"])),
        "SETTINGS": _settings(lineage["base"]),
        # Inputs that can be checked before an hour of installing are; a base that is fetched needs the environment.
        "ALL": "check_inputs; make_environment; train" if is_here else "make_environment; check_inputs; train",
        "OUTPUT": shlex.quote(f"{output}-reproduced"),
    }
    return re.sub("@([A-Z_0-9]+)@", lambda match: values[match[1]], _TEMPLATE)


def _joined(base: dict[str, Any]) -> str:
    """The directory of the base's files, as the recipe names it or below that."""
    within = base.get("within", ".")
    return base["name"] if within == "." else f"{base['name']}/{within}"


def _versions(lineage: dict[str, Any], environment: dict[str, Any]) -> dict[str, str]:
    """What is installed by name; the rest follows from that, at the versions of the constraints."""
    versions = {name: version for name, version in environment["versions"].items() if version and name != "tunesmith"}
    return versions | {name: lineage["versions"][name] for name in OPTIONAL if name in lineage["versions"]}


def _own_build_of_torch(version: str) -> str:
    """Builds with a local version such as `+cpu` are not on the package index, but may be in a mirror of one's own."""
    _, _, build = version.partition("+")
    if not build:
        return ""
    install = (
        f'"$venv/bin/python" -m pip install --constraint "$venv/constraints.txt" {shlex.quote(f"torch=={version}")}'
    )
    return f"    {install} ||\n        {install} --extra-index-url {TORCH_WHEELS}{build}\n"


def _tunesmith(origin: dict[str, Any]) -> str:
    """The line that says which Tunesmith is installed."""
    if origin["from"] == "index":
        return f'tunesmith="${{TUNESMITH:-tunesmith=={origin["version"]}}}"'
    commit = f", commit {origin['commit']}" if origin["commit"] else ""
    changed = " with changes that were not committed" if origin["changed"] else ""
    asked = (
        f"set TUNESMITH to the path of a checkout of Tunesmith {origin['version']}{commit}{changed}: "
        "this run was made with one, not with a release"
    )
    return f"tunesmith=${{TUNESMITH:?{asked}}}"


def _listed(entries: list[dict[str, Any]]) -> str:
    """A Python list of inputs: name, hash or None where it cannot be checked, and the split of a directory."""
    return ascii([(entry["path"], entry["sha256"] if entry["location"] else None, entry["split"]) for entry in entries])


def _fetch(base: dict[str, Any]) -> str:
    if base["from"] == DEMO:
        return "from tunesmith.models.demo import demo_model; print(demo_model())"
    patterns = '["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]'
    return (
        "from huggingface_hub import snapshot_download; "
        f"print(snapshot_download({base['name']!a}, revision={base['commit']!r}, allow_patterns={patterns}))"
    )


def _launch(processes: int) -> str:
    return f"-m torch.distributed.run --nproc-per-node {processes} -m tunesmith" if processes > 1 else "-m tunesmith"


def _settings(base: dict[str, Any]) -> str:
    """A branch of the hub may have moved; its commit has not."""
    return f" model.revision={base['commit']}" if base["from"] == "hub" and base["commit"] else ""


_FETCH_BASE = """\
fetch_base() {
    need_environment
    "$venv/bin/python" - <<'END_OF_FETCH'
@FETCH@
END_OF_FETCH
}

"""

_TEMPLATE = """\
#!/bin/sh
# Trains this run again: the same packages, the same data and base (their hashes are checked), the same recipe.
#
#   sh reproduce.sh               all of it
#   sh reproduce.sh environment   only make the virtual environment
#   sh reproduce.sh check         only check data and base
#   sh reproduce.sh train         only train, in the environment that is there
#
# Relative paths of the recipe are read from the directory that this is called in.
# PYTHON     a Python @PYTHON_VERSION@ (default: python@PYTHON_VERSION@, else python3)
# VENV       directory of the virtual environment (default: .venv-reproduce)
# TUNESMITH  what pip installs as Tunesmith, for example the path of a checkout
# OUTPUT     directory of the new run
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv=${VENV:-.venv-reproduce}
output=${OUTPUT:-}
if [ -z "$output" ]; then output=@OUTPUT@; fi
step=${1:-all}

if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif command -v python@PYTHON_VERSION@ >/dev/null 2>&1; then python=python@PYTHON_VERSION@
else python=python3
fi

make_environment() {
    @TUNESMITH@
    found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$found" != @PYTHON_VERSION@ ]; then
        echo "warning: this is Python $found; the run was made with @PYTHON_VERSION@ (set PYTHON to one)" >&2
    fi
    "$python" -m venv "$venv"
    cat >"$venv/constraints.txt" <<'END_OF_CONSTRAINTS'
@CONSTRAINTS@
END_OF_CONSTRAINTS
@TORCH@    "$venv/bin/python" -m pip install --constraint "$venv/constraints.txt" \\
@REQUIREMENTS@        "$tunesmith"
    source=$("$venv/bin/python" -c 'from tunesmith.pipeline.environment import code_sha256; print(code_sha256())')
    if [ "$source" != @SOURCE_SHA256@ ]; then
        echo "warning: the installed Tunesmith is not the one that this run was made with" >&2
    fi
}

need_environment() {
    if [ ! -x "$venv/bin/python" ]; then
        echo "there is no environment in $venv; first: sh reproduce.sh environment" >&2
        exit 2
    fi
}

@FETCH_BASE@check_inputs() {
    base=@BASE@
    "$python" - "$base" <<'END_OF_CHECK'
import hashlib, os, sys

INPUTS = @INPUTS@
BASE_FILES = @BASE_FILES@


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def sha256(path, split):
    if not os.path.isdir(path):
        return file_sha256(path)
    files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names]
    parts = {tuple(os.path.relpath(file, path).split(os.sep)): file for file in files}
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(("%s\\0%s\\0" % ("/".join(name), file_sha256(parts[name]))).encode())
    digest.update((split or "").encode())
    return digest.hexdigest()


wrong = 0
base = os.path.expanduser(sys.argv[1])
files = [(name, digest, split) for name, digest, split in INPUTS]
files += [(os.path.join(base, name), digest, None) for name, digest in BASE_FILES]
for name, expected, split in files:
    path = os.path.expanduser(name)
    if expected is None:
        print("not checked: %s" % name)
    elif not os.path.exists(path):
        wrong += 1
        print("missing: %s" % name, file=sys.stderr)
    elif sha256(path, split) != expected:
        wrong += 1
        print("changed: %s" % name, file=sys.stderr)
    else:
        print("ok: %s" % name)
if wrong:
    print("these are not the inputs of the run; restore them (relative paths are read from %s)" % os.getcwd(),
          file=sys.stderr)
    sys.exit(2)
END_OF_CHECK
}

train() {
    need_environment
    # Settings are read as YAML, in which a quoted name is that name, whatever stands in it.
    quoted=$("$python" -c 'import json, sys; print(json.dumps(sys.argv[1], ensure_ascii=False))' "$output")
    code=0
    export OMP_NUM_THREADS=@THREADS@
    "$venv/bin/python" @LAUNCH@ train "$here/recipe.yaml"@SETTINGS@ "output=$quoted" || code=$?
    if [ "$code" != 0 ] && [ "$code" != 3 ]; then exit "$code"; fi
    for file in "$here"/adapter/*.safetensors "$here"/model/*.safetensors; do
        if [ ! -e "$file" ]; then continue; fi
        name=${file#"$here"/}
        if cmp -s "$file" "$output/$name"; then echo "the same bytes: $name"; else echo "other bytes: $name"; fi
    done
    exit "$code"
}

case $step in
    all) @ALL@ ;;
    environment) make_environment ;;
    check) check_inputs ;;
    train) train ;;
    *) echo "unknown step '$step': environment, check or train" >&2; exit 2 ;;
esac
"""
