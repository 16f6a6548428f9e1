from __future__ import annotations

from pathlib import Path

import pytest

from sdt_deploy.errors import OutputError
from sdt_deploy.files import new_directory, write_file


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def build(overwrite: bool) -> None:
        with new_directory(target, overwrite=overwrite) as directory:
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(overwrite=False)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        build(overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("a", "b"):
        with new_directory(target, overwrite=True) as directory:
            (directory / name).write_text(name)
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "out", "b"]


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OutputError, match="not a directory"), new_directory(file, overwrite=True):
        pass
    with pytest.raises(OutputError, match="cannot be written"), new_directory(file / "below"):
        pass
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(file / "below", b"")
    with pytest.raises(OutputError, match="cannot be written"):
        write_file(tmp_path, b"")
    assert file.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_of_two_writers_one_wins_and_nothing_is_mixed(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write_twice() -> None:
        with new_directory(target) as first:
            (first / "first").write_text("")
            with new_directory(target) as second:
                (second / "second").write_text("")

    with pytest.raises(OutputError, match="exists already"):
        write_twice()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "second"]
