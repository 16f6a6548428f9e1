from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdt_deploy import files
from sdt_deploy.errors import OutputError
from sdt_deploy.files import check_replaceable, check_writable, new_directory, write_file

MARKER = ("mark.json", "mine")


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def build(overwrite: bool) -> None:
        with new_directory(target, marker=MARKER, overwrite=overwrite) as directory:
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(overwrite=False)
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mark.json").write_text('{"format": "mine"}')
    with pytest.raises(KeyboardInterrupt):
        build(overwrite=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mark.json"]


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for name in ("a", "b"):
        with new_directory(target, marker=MARKER, overwrite=True) as directory:
            (directory / name).write_text(name)
            (directory / "mark.json").write_text('{"format": "mine"}')
    assert sorted(p.name for p in target.iterdir()) == ["b", "mark.json"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "yours"}'])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, content: str | None) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    if content is not None:
        (target / "mark.json").write_text(content)
    refusal = pytest.raises(OutputError, match="will not be replaced")
    with refusal, new_directory(target, marker=MARKER, overwrite=True):
        pass
    assert (target / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty", marker=MARKER, overwrite=True) as directory:
        (directory / "new").write_text("")
    assert (tmp_path / "empty" / "new").exists()


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with (
        pytest.raises(OutputError, match="will not be replaced"),
        new_directory(file, marker=MARKER, overwrite=True),
    ):
        pass
    with (
        pytest.raises(OutputError, match="cannot be written"),
        new_directory(file / "below", marker=MARKER),
    ):
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
        with new_directory(target, marker=MARKER) as first:
            (first / "first").write_text("")
            with new_directory(target, marker=MARKER) as second:
                (second / "second").write_text("")

    with pytest.raises(OutputError, match="exists already"):
        write_twice()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "second"]


def test_another_writer_between_the_last_look_and_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, put = tmp_path / "target", files._put_in_place

    def late(source: Path, place: Path, *, overwrite: bool) -> None:
        place.mkdir()
        (place / "theirs").touch()
        put(source, place, overwrite=overwrite)

    monkeypatch.setattr(files, "_put_in_place", late)
    with (
        pytest.raises(OutputError, match="exists already; choose another path"),
        files.new_directory(target, marker=("m.json", "x")) as directory,
    ):
        (directory / "ours").touch()
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_umask_is_obeyed(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_file(tmp_path / "file", b"")
        with new_directory(tmp_path / "out", marker=MARKER) as directory:
            (directory / "inside").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"file": 0o600, "out": 0o700, "inside": 0o600}


def test_targets_are_looked_at_before_long_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "report.html")
    check_writable(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "new"]
    for target in (tmp_path, tmp_path / "file" / "below", Path("/proc/a")):
        with pytest.raises(OutputError, match="cannot be written"):
            check_writable(target)
    check_replaceable(tmp_path / "free", MARKER, overwrite=False)
    check_replaceable(tmp_path / "new", MARKER, overwrite=True)
    for target, overwrite in ((tmp_path / "new", False), (tmp_path, True)):
        with pytest.raises(OutputError, match=r"exists already|will not be replaced"):
            check_replaceable(target, MARKER, overwrite=overwrite)
