"""Directories that come whole or not at all, and what is done about the leftovers of killed processes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tunesmith.files import ASIDE, OLD, new_directory, recovered, remove_directory


def dead_process() -> int:
    return next(number for number in range(4_000_000, 5_000_000) if not psutil.pid_exists(number))


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    with new_directory(tmp_path / "inner" / "run") as directory:
        (directory / "a").write_text("1")
    with pytest.raises(ValueError, match="no"), new_directory(tmp_path / "other") as directory:
        (directory / "a").write_text("1")
        raise ValueError("no")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["inner", "run", "a"]


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with new_directory(tmp_path / "run") as directory:
        (directory / "a").write_text("first")
    with pytest.raises(FileExistsError), new_directory(tmp_path / "run") as directory:
        (directory / "a").write_text("second")
    assert (tmp_path / "run" / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"), new_directory(tmp_path / "file" / "run"):
        pass


def test_leftovers_of_dead_processes_go_and_neighbours_stay(tmp_path: Path) -> None:
    left, notes = tmp_path / f"run{ASIDE}{dead_process()}", tmp_path / f"run{ASIDE}-notes"
    left.mkdir()
    notes.mkdir()
    with new_directory(tmp_path / "run"):
        pass
    assert notes.is_dir() and not left.exists()


def test_what_was_moved_away_comes_back(tmp_path: Path) -> None:
    for name in (f"adapter{OLD}{ASIDE}7", f"adapter{ASIDE}7", f"step-2{ASIDE}7", "step-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / f"report.json{ASIDE}7").write_text("half")
    recovered(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "step-4"]
    assert OLD in (tmp_path / "adapter" / "a").read_text(), "the new one was not committed"
    remove_directory(tmp_path / "step-4")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
