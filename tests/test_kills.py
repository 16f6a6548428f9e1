"""Processes that are killed, disks that fail and writers that meet: what is found is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.bundle_files import MANIFEST
from sdt_deploy.errors import SdtDeployError
from sdt_deploy.files import is_partial
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint, load
from tests.mortal import STRUCK
from tests.samples import CONFIGS, GOLDEN, random_model

SIGKILL = -9
Doomed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("native") / "model"
    config = CONFIGS["dense-twin"][0].replace(n_layers=1, thresholds=())
    checkpoints.save(Checkpoint(model=random_model(config, 0)), target)
    return target


@pytest.fixture(scope="module")
def doomed(native: Path) -> Iterator[Doomed]:
    """Run ``sdt-deploy`` in a process that fails at a step; see :mod:`tests.mortal`."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.mortal", str(native)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def call(
            *arguments: object, directory: Path, step: int = 0, failure: int = 0
        ) -> tuple[int, str]:
            order = {
                "arguments": [str(argument) for argument in arguments],
                "directory": str(directory),
                "step": step,
                "failure": failure,
            }
            print(json.dumps(order), file=server.stdin, flush=True)
            code, messages = json.loads(server.stdout.readline())
            assert "Traceback" not in messages, messages
            return code, " ".join(messages.split())  # long paths wrap lines

        yield call
        server.stdin.close()


def content(directory: Path) -> str | None:
    """A digest of all files; None where nothing is. Raises unless it is a whole one of ours."""
    if not directory.exists():
        return None
    if (directory / MANIFEST).exists():
        Bundle.open(directory)
    else:
        load(directory)
    files = sorted(path for path in directory.iterdir())
    parts = [path.name.encode() + path.read_bytes() for path in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def make_old(directory: Path, command: str) -> None:
    if command == "export":
        shutil.copytree(GOLDEN, directory)
    else:
        checkpoints.save(Checkpoint(model=random_model(CONFIGS["active-lm"][0], 1)), directory)


def check_leftovers(target: Path) -> int:
    """Nothing beside ``target`` is taken for a bundle or a model; return how much there is."""
    others = [path for path in target.parent.iterdir() if path != target]
    for path in others:
        assert is_partial(path)
        if not path.is_dir():
            continue
        for reader in (Bundle.open, load):
            with pytest.raises(SdtDeployError):
                reader(path)  # type: ignore[operator]
    return len(others)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", ["export", "convert"])
def test_killed_at_any_step(
    doomed: Doomed, native: Path, tmp_path: Path, command: str, overwrite: bool
) -> None:
    """After each kill the target is the old one or the new one, or absent if there was none."""
    place, old = tmp_path / "place", tmp_path / "old"
    place.mkdir()
    target = place / "target"
    if overwrite:
        make_old(old, command)
    arguments = [command, native, target, *(["--overwrite"] if overwrite else [])]
    assert doomed(*arguments, directory=place)[0] == 0
    before, new = content(old), content(target)
    assert new is not None
    assert new != before

    found, leftovers, step, code = [], 0, 0, SIGKILL
    while code == SIGKILL:
        shutil.rmtree(place)
        place.mkdir()
        if overwrite:
            shutil.copytree(old, target)
        step += 1
        code, messages = doomed(*arguments, directory=place, step=step)
        assert code in (SIGKILL, 0), messages
        found.append(content(target))
        leftovers += check_leftovers(target)
    assert step > (40 if command == "export" else 12)
    assert leftovers > step / 2
    assert set(found) == {before, new}
    assert found == sorted(found, key=lambda one: one == new)  # old until a step, new from then on
    assert check_leftovers(target) == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_leftovers_are_in_nobodys_way(
    doomed: Doomed, native: Path, tmp_path: Path, overwrite: bool
) -> None:
    target = tmp_path / "target"
    arguments = ["convert", native, target, *(["--overwrite"] if overwrite else [])]
    assert doomed(*arguments, directory=tmp_path, step=9)[0] == SIGKILL
    assert check_leftovers(target) == 1
    assert doomed(*arguments, directory=tmp_path)[0] == 0
    assert content(target) is not None
    assert check_leftovers(target) == 1


@pytest.mark.parametrize(
    ("command", "failure"), [("export", errno.ENOSPC), ("convert", errno.EROFS)]
)
def test_a_disk_that_fails_at_any_step(
    doomed: Doomed, native: Path, tmp_path: Path, command: str, failure: int
) -> None:
    """One message, exit code 2, the old one untouched, nothing left."""
    place, old = tmp_path / "place", tmp_path / "old"
    make_old(old, command)
    target = Path(shutil.copytree(old, place / "target"))
    arguments = [command, native, target, "--overwrite"]
    assert doomed(*arguments, directory=place)[0] == 0
    before, new = content(old), content(target)
    shutil.rmtree(target)
    shutil.copytree(old, target)
    codes, messages = [], STRUCK
    while STRUCK in messages:
        step = len(codes) + 1
        code, messages = doomed(*arguments, directory=place, step=step, failure=failure)
        codes.append(code)
        if code == 0:  # what failed did not matter: the directory exists, the new one is in place
            assert content(target) == new
            shutil.rmtree(target)
            shutil.copytree(old, target)
        else:
            assert code == 2
            assert "cannot be written" in messages
            assert os.strerror(failure) in messages
        assert content(target) == before
        assert check_leftovers(target) == 0
    assert codes.count(2) > (20 if command == "export" else 5)
    assert codes.count(0) < 9  # directories that exist, flushes of what is in place


@pytest.mark.parametrize(("command", "failure"), [("run", errno.ENOSPC), ("bench", errno.EROFS)])
def test_a_disk_that_fails_under_results(
    doomed: Doomed, tmp_path: Path, command: str, failure: int
) -> None:
    out = tmp_path / "out" / "result"
    out.parent.mkdir()
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3]]))
    if command == "run":
        arguments = ["run", GOLDEN, "--ids", tmp_path / "ids.npy", "--out", out]
    else:
        arguments = ["bench", GOLDEN, "--cases", "1x2", "--budget", "0.1", "--no-memory"]
        arguments += ["--json-file", out]
    codes, messages = [], STRUCK
    while STRUCK in messages:
        out.write_text("what was measured before")
        step = len(codes) + 1
        code, messages = doomed(*arguments, directory=out.parent, step=step, failure=failure)
        codes.append(code)
        if code:
            assert code == 2
            assert "cannot be written" in messages
            assert out.read_text() == "what was measured before"
        else:
            assert not out.read_bytes().startswith(b"what")
        assert list(out.parent.iterdir()) == [out]
    # What is tried before and after does not matter: folders that exist, other kinds of temporary
    # files, flushes of what is in place. Between are opening, flushing and renaming.
    assert "".join(map(str, codes)).strip("0") == "2222"


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_exports_to_one_directory(native: Path, tmp_path: Path, overwrite: bool) -> None:
    """Both begin before either ends: one wins or both do, one after the other; none is mixed."""
    target = tmp_path / "target"
    script = str(Path(sys.executable).with_name("sdt-deploy"))
    command = [script, "convert", str(native), str(target), *(["--overwrite"] * overwrite)]
    command = [sys.executable, "-c", MEET, str(tmp_path), *command[1:]]
    both = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    codes = sorted(code for _, code in results)
    assert codes == ([0, 0] if overwrite else [0, 2]), results
    if not overwrite:
        refusal = next(message for message, code in results if code)
        assert "exists already" in " ".join(refusal.split())
    assert content(target) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["met-0", "met-1", "target"]


MEET = """
import os, sys, time
from pathlib import Path
from sdt_deploy import cli, files
place, sync = Path(sys.argv[1]), files.sync_tree
def meet(directory):
    for name in ("met-0", "met-1"):
        try:
            (place / name).touch(exist_ok=False)
            break
        except FileExistsError:
            pass
    while not (place / "met-1").exists():
        time.sleep(0.01)
    sync(directory)
files.sync_tree = meet
sys.argv = ["sdt-deploy", *sys.argv[2:]]
cli.main()
"""


def test_a_console_script_that_is_killed(native: Path, tmp_path: Path) -> None:
    """The same without any help: the real script, killed when it opens the file to be last."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(KILL)
    path = os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])
    target = tmp_path / "place" / "target"
    done = subprocess.run(
        [str(Path(sys.executable).with_name("sdt-deploy")), "export", str(native), str(target)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == SIGKILL, done.stderr
    assert not target.exists()
    assert check_leftovers(target) == 1


KILL = """
import os, signal, sys
def hear(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hear)
"""
