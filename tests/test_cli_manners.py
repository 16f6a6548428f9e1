"""What every command does, whichever it is: a new one cannot escape these tests."""

from __future__ import annotations

import inspect
import io
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.console
import typer.main

from sdt_deploy import cli, console
from sdt_deploy.config import HeadConfig
from sdt_deploy.errors import SdtDeployError
from tests.test_cli import SCRIPT, call
from tests.textmodels import CONFIG, save_teacher, texts

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with something for each command to work on."""
    path = tmp_path_factory.mktemp("manners")
    save_teacher(path / "teacher", CONFIG.replace(n_layers=2, thresholds=()))
    call("export", path / "teacher", path / "bundle", "--no-single-file")
    causal = CONFIG.replace(
        n_layers=1, thresholds=(), causal=True, head=HeadConfig(kind="lm"), probe="none"
    )
    save_teacher(path / "causal", causal)
    call("export", path / "causal", path / "decoder")
    (path / "texts.txt").write_text("\n".join(texts(40)))
    np.save(path / "ids.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    return path


ARGUMENTS: dict[str, str] = {
    "convert": "teacher new-model --overwrite",
    "export": "teacher new-bundle --overwrite --no-single-file",
    "inspect": "bundle",
    "verify": "bundle",
    "run": "bundle --ids ids.npy",
    "bench": "bundle --cases 1x4 --budget 0.1 --no-memory",
    "generate": "decoder --ids ids.npy --max-new-tokens 4",
    "explain": "bundle --ids ids.npy --html routes.html",
    "profile": "bundle --case 2x4 --budget 0.1 --trace trace.json",
    "build-engine": "bundle --target tensorrt-rtx --compute-capability 8.9 --graph head "
    "--cache cache --max-seqlen 8 --max-batch 2 --max-padded-tokens 16",
    "doctor": "",
    "distill": "teacher distilled --texts texts.txt --target-depth 1.5 --steps 2 --batch-size 4 "
    "--overwrite",
    "evaluate": "bundle --teacher teacher --texts texts.txt",
}
"""A short call of every command."""


def test_every_command_is_called_here() -> None:
    assert ARGUMENTS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    command, text = COMMANDS[name], call(name, "--help")
    assert "Examples:" in text
    for line in inspect.getdoc(command.callback).split("Examples::\n\n")[1].splitlines():
        program, given, *arguments = shlex.split(line)
        assert (program, given) == ("sdt-deploy", name)
        assert line.strip()[:60] in text
        command.make_context(name, arguments)  # parses as it stands
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name} is not described"


@pytest.mark.parametrize("name", COMMANDS)
def test_json_and_quiet(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    arguments = [name, *ARGUMENTS[name].split()]
    assert call(*arguments, "--quiet") == ""
    assert json.loads(call(*arguments, "--json", "--quiet"))


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is seen above; 2 for what the user can mend, quiet or not, and 1 for a bug."""
    monkeypatch.chdir(place)
    message = call(name, "--nonsense", code=2)
    assert "No such option" in message
    positional = [p for p in COMMANDS[name].params if p.param_type_name == "argument"]
    if positional:
        given = ["nowhere", *ARGUMENTS[name].split()[1:], "--quiet"]
        assert "nowhere" in " ".join(call(name, *given, code=2).split())
    for error, code in ((SdtDeployError("mend [this]"), 2), (ZeroDivisionError("a slip"), 1)):

        def fails(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(COMMANDS[name], "callback", fails)
        monkeypatch.setattr(cli, "app", lambda: COMMANDS[name](ARGUMENTS[name].split()))
        monkeypatch.setattr(sys, "argv", ["sdt-deploy"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        shown = capsys.readouterr().err
        assert str(error) in shown
        assert ("Traceback" in shown) == ("This is a bug" in shown) == (code == 1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    def complete(*words: str) -> str:
        line = " ".join(("sdt-deploy", *words))
        environment = {
            "_SDT_DEPLOY_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words)),
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        return subprocess.run(
            [str(SCRIPT)], capture_output=True, text=True, check=False, env=os.environ | environment
        ).stdout

    shown = complete("")
    assert all(name in shown for name in COMMANDS)
    assert "tensorrt-rtx" in complete("build-engine", "--target", "tens")


def in_terminal(*arguments: str) -> str:
    """Return what a command shows where standard error is a terminal, control codes included."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        [str(SCRIPT), *arguments], stdout=subprocess.PIPE, stderr=other, env=os.environ
    )
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.communicate()[0]
    assert process.returncode == 0, shown
    return shown.decode()


def test_progress_bars_vanish_when_piped(place: Path) -> None:
    bench = ("bench", str(place / "bundle"), *ARGUMENTS["bench"].split()[1:])
    assert "1x4" in in_terminal(*bench)
    assert in_terminal(*bench, "--json", "--quiet") == ""
    done = subprocess.run([str(SCRIPT), *bench], capture_output=True, check=True)
    assert done.stderr == b""
    assert b"\x1b" not in done.stdout


def test_progress_shows_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in what TensorRT says of a fused node; rich would take them for its markup."""
    shown = io.StringIO()
    terminal = rich.console.Console(file=shown, force_terminal=True, width=200)
    monkeypatch.setattr(console, "messages", terminal)
    monkeypatch.setattr(console.console, "quiet", False)
    with console.progress_bar("build") as advance:
        advance("no kernel for ForeignNode[/model/a...[/b]]", 1, 2)
    assert "ForeignNode[/model/a...[/b]]" in shown.getvalue()


def test_piped_text_is_not_broken(place: Path) -> None:
    """Whole lines for ``grep``; a terminal wraps them itself."""
    out = place / ("long-" * 30 + "name.npz")
    arguments = ["run", str(place / "bundle"), "--ids", str(place / "ids.npy"), "--out", str(out)]
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    assert f"{out}: output (2, 16) float32\n" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_that_cannot_encode_all(place: Path, encoding: str) -> None:
    """As in containers without a locale: what the encoding lacks comes out as an escape."""
    arguments = ["run", str(place / "bundle"), "--ids", str(place / "ids.npy")]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, check=True, env=env)
    shown = done.stdout.decode(encoding)
    assert ("\u2026" in shown) == (encoding == "cp1252")
    assert ("\\u2026" in shown) == (encoding == "ascii")


def test_a_reader_that_goes_away(place: Path) -> None:
    """As ``sdt-deploy inspect bundle --json | head -1`` under ``set -o pipefail``."""
    for arguments in (["--json"], []):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [str(SCRIPT), "inspect", str(place / "bundle"), *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_quiet_ends_with_its_command() -> None:
    assert call("doctor", "-q") == ""
    assert call("doctor") != ""


def test_numbers_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        console.print_json({"ratio": float("nan")})
    assert end.value.code == 2
    assert "not finite" in capsys.readouterr().err


def test_help_is_quick() -> None:
    """What takes long is imported inside the commands; else it would show among the modules."""
    code = "import sys; from sdt_deploy.cli import app; print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400, "the command line imports more than it needs to show its help"
