"""Which module may import which, and what an import pulls in."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sdt_deploy
from sdt_deploy.extras import require

ROOT = Path(sdt_deploy.__file__).parent

LEVELS = (
    "version",
    "errors",
    "extras",
    "files",
    "arrays",
    "external_data",
    "forking",
    "cores",
    "checks",
    "choices",
    "config_parts",
    "config",
    "description",
    "combinations",
    "buckets",
    "gpu",
    "engines",
    "bundle_files",
    "bundle",
    "costs",
    "stages",
    "tokenization",
    "ort",
    "ort_library",
    "trt",
    "diagnosis",
    "pages",
    "model",
    "exporters",
    "runtime",
    "evaluation",
    "training",
    "bench",
    "explain",
    "profiling",
    "testing",
    "hf",
    "__init__",
    "console",
    "commands",
    "cli",
    "__main__",
)
"""A module imports only what stands above it, or beside it in its own folder."""
FORBIDDEN = {"runtime": {"model", "exporters"}, "exporters": {"runtime"}}
"""Serving needs no exporter and no model code; the two halves meet on disk."""
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "numpy",
    "safetensors",
    "tokenizers",
    "matplotlib",
    "vl_convert",
)


def top(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # "from sdt_deploy import trt" imports a module, not the package's public names.
            is_package = node.module == "sdt_deploy"
            found |= names if is_package else {node.module or ""}
    return {name for name in found if name.split(".")[0] == "sdt_deploy"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_levels(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path):
        other = top(name)
        assert LEVELS.index(other) <= LEVELS.index(own), f"{own} imports {name}"
        assert other not in FORBIDDEN.get(own, set()), f"{own} imports {name}"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import sdt_deploy", set()),
        ("import sdt_deploy.cli", set()),
        ("import sdt_deploy.bundle", set()),
        ("import sdt_deploy; sdt_deploy.Session", {"numpy"}),
    ],
)
def test_imports_are_light(statement: str, allowed: set[str]) -> None:
    assert loaded_by(statement) & set(HEAVY) <= allowed


def test_public_names() -> None:
    for name in sdt_deploy.__all__:
        assert getattr(sdt_deploy, name).__doc__
    assert sdt_deploy.__all__ == sorted(sdt_deploy.__all__)
    assert dir(sdt_deploy) == sdt_deploy.__all__
    with pytest.raises(AttributeError):
        sdt_deploy.Sessions  # noqa: B018


def test_every_module_imports() -> None:
    names = "attention", "entry", "pooling", "routing"
    kernels = {f"sdt_deploy.runtime.triton_{name}" for name in names}
    absent = set() if find_spec("triton") else kernels
    for module in pkgutil.walk_packages([str(ROOT)], "sdt_deploy."):
        if module.name not in absent:
            importlib.import_module(module.name)


def test_files_stay_small() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 420, path


def test_a_missing_extra_names_the_command() -> None:
    with pytest.raises(sdt_deploy.MissingExtraError) as error:
        require("nonexistent_engine", extra="tensorrt", purpose="Building engines")
    assert str(error.value) == (
        "Building engines needs nonexistent_engine, which is not installed: "
        'pip install "sdt-deploy[tensorrt]"'
    )
