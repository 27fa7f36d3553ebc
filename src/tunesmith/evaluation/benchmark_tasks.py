"""Tasks as lm-eval defines them, on items from where `benchmark_data` finds them. Needs the package lm-eval.

Prompts, answers, filters, metrics and the aggregation of groups are lm-eval's own; only where a task's rows are read is
another place, through the method that lm-eval has for that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from datasets import DatasetDict
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from tunesmith.base import InputError
from tunesmith.evaluation.benchmark_data import Items
from tunesmith.evaluation.benchmark_names import harness_tasks, named_in, refuse_unknown

SPLITS = ("training_split", "validation_split", "test_split")


def load_tasks(names: Sequence[str], items: Items, shots: int | None) -> tuple[TaskDict, list[str]]:
    """Tasks and groups by lm-eval's names, and notes on what differs from lm-eval's own.

    Args:
        shots: worked examples before each item; None for what the task itself says, mostly none.

    Raises:
        InputError: for an unknown name, or items that cannot be had.
    """
    manager = _manager(names)
    notes: list[str] = []
    built: list[Any] = []
    for name in names:
        entry = manager.task_index[name]
        overrides = {"class": _local(items, notes)}
        python_task = entry.kind.name == "PY_TASK"
        try:
            found = manager._factory.build(
                entry, overrides=None if python_task else overrides, registry=dict(manager.task_index)
            )
        except InputError:
            raise
        except Exception as error:  # whatever the hub's client, or the task's own code, meets
            first = next(iter(str(error).splitlines()), "")[:200]
            raise InputError(
                f"the items of {name} cannot be had ({type(error).__name__}: {first})",
                fix="connect to the network, or name a directory that holds them: --benchmark-data DIR",
            ) from error
        built += found if isinstance(found, list) else [found]
    loaded = manager.load(built)
    for task in loaded["tasks"].values():
        _set_shots(task, shots)
    return loaded, list(dict.fromkeys(notes))


def _manager(names: Sequence[str]) -> TaskManager:
    """What knows these names: reading all fourteen thousand files of lm-eval's tasks takes half a minute, so that those
    beside the files that define the names are tried first, then those of their families.

    Raises:
        InputError: for a name that no file has.
    """
    root = harness_tasks()
    refuse_unknown(names)
    files, _ = named_in(root)
    if all(name in files for name in names):
        own = [files[name] for name in names]
        for folders in ([file.parent for file in own], [root / file.relative_to(root).parts[0] for file in own]):
            manager = TaskManager(include_defaults=False, include_path=list(dict.fromkeys(folders)))
            if all(_is_complete(name, manager.task_index) for name in names):
                return manager
    return TaskManager()


def _is_complete(name: str, index: dict[str, Any]) -> bool:
    """Whether a task is known, and everything that a group consists of."""
    entry = index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else sorted(entry.tags) * (not entry.cfg)
    named = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members or []]
    return all(isinstance(member, str) and _is_complete(member, index) for member in named)


def _set_shots(task: Task, shots: int | None) -> None:
    """As lm-eval's own `simple_evaluate` does it, with its seed."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)


def _local(items: Items, notes: list[str]) -> type[ConfigurableTask]:
    class LocalTask(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            config = copy.copy(config)
            config.pop("class", None)
            self._splits = items.find(str(config.get("dataset_path")), cast("str | None", config.get("dataset_name")))
            if self._splits is not None:
                notes.extend(_fit_splits(config, set(self._splits)))
            super().__init__(config=config)

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            if self._splits is None:
                super().download(dataset_kwargs, **kwargs)
            else:
                splits = DatasetDict(cast(Any, self._splits))
                self.dataset = _with_columns(splits, str(self.config.dataset_path), self.config.dataset_name)

    return LocalTask


def _fit_splits(config: dict[str, Any], there: set[str]) -> list[str]:
    """Takes splits that the copy does not hold out of a task's settings; says so where items become others.

    Raises:
        InputError: when none of the splits that it is judged on is there.
    """
    name, notes = config.get("task"), []
    asked = next((config[key] for key in ("test_split", "validation_split") if config.get(key)), None)
    for key in SPLITS:
        if config.get(key) and config[key] not in there:
            config[key] = None
    judged = next((config[key] for key in ("test_split", "validation_split") if config.get(key)), None)
    if judged is None:
        raise InputError(
            f"the copy of {config.get('dataset_path')} holds no {asked} items for {name}",
            fix="name a directory that has them: --benchmark-data DIR",
        )
    if judged != asked:
        notes.append(f"{name} is judged on its {judged} items: the copy at hand has no {asked} items")
    if config.get("fewshot_split") and config["fewshot_split"] not in there:
        config["fewshot_split"] = judged
        notes.append(f"the worked examples of {name} come from its {judged} items")
    return notes


def _with_columns(splits: DatasetDict, path: str, name: str | None) -> DatasetDict:
    """BoolQ as SuperGLUE has it: the answer as a number."""
    if (path, name) != ("aps/super_glue", "boolq") or "label" in next(iter(splits.values())).column_names:
        return splits
    return splits.map(lambda row: {"label": int(row["answer"])})
