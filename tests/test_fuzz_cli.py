"""The command line against random arguments: exit code 0 or 2, and never a traceback."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sdt_deploy.cli import main
from tests.samples import GOLDEN, THOROUGH

COMMANDS = (
    *("convert", "export", "inspect", "verify", "run", "bench", "explain", "profile", "generate"),
    *("--version", "--help", "fly"),
)
OPTIONS = (
    *("--text", "--texts", "--ids", "--out", "--path", "--truncate", "--show-depth", "--json"),
    *("--html", "--model", "--case", "--trace", "--top", "--report", "--json-file", "--quiet"),
    *("--n-threads", "--plot", "--no-memory", "--overwrite", "--layers-per-stage", "--help"),
    *(
        "--target-depth",
        "--levels",
        "--importance",
        "--context",
        "--head",
        "--nonsense",
        "--",
        "-x",
    ),
)


def values(directory: Path) -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(
            [
                *(str(GOLDEN), str(GOLDEN / "manifest.json"), str(GOLDEN / "weights.bin")),
                *(str(directory / name) for name in ("ids.npy", "bad.npy", "texts.txt", "none")),
                *(str(directory / "model.pt"), str(directory), "/dev/null", "/dev/zero", "/"),
                *("", ".", "a\0b", "x" * 5000, "1", "0", "-1", "1e99", "nan", "inf", "9" * 5000),
                *("sparse", "dense", "auto", "graded", "all", "lm", "2x3", "²x5", "1x1,", "\udcff"),
            ]
        ),
        st.text(st.characters(exclude_characters="\0"), max_size=10),
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    np.save(path / "ids.npy", np.array([[1, 2, 3]]))
    (path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00{{{{{")
    (path / "texts.txt").write_text("one\ntwo\n")
    (path / "model.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    return path


def call(arguments: list[str]) -> tuple[int, str]:
    """Run the command line in this process, as the console script does."""
    out, messages = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["sdt-deploy", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
            main()
    except SystemExit as end:
        code = end.code
        return (code if isinstance(code, int) else int(code is not None)), messages.getvalue()
    finally:
        sys.argv = before
    return 0, messages.getvalue()


@given(data=st.data())
@settings(
    max_examples=5000 if THOROUGH else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_arguments(
    directory: Path, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    value = values(directory)
    command = data.draw(st.sampled_from(COMMANDS))
    arguments = [command]
    if data.draw(st.booleans()):
        arguments.append(str(GOLDEN))
    option = st.one_of(
        st.sampled_from(OPTIONS).map(lambda name: [name]),
        st.tuples(st.sampled_from(OPTIONS), value).map(list),
        value.map(lambda text: [text]),
    )
    for part in data.draw(st.lists(option, max_size=4)):
        arguments += part
    if command == "bench":  # at its shortest where the arguments are valid
        arguments += ["--budget", "0.1", "--cases", "1x2", "--no-memory"]
    if command == "profile":
        arguments += ["--budget", "0.1"]
    if command in ("run", "bench", "verify", "explain", "profile") and "--n-threads" in arguments:
        arguments = [a for a in arguments if a not in ("1", "9" * 5000)]
    code, messages = call(arguments)
    event(f"{command} {code}")
    assert code in (0, 2), messages
    assert "Traceback" not in messages
    assert code == 0 or messages.strip()
