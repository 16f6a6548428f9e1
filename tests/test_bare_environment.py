"""A real environment with the CPU runtime only: no torch, no onnx, no transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden-bundle-v1"


def environment(directory: Path, requirement: str) -> Path:
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    python = directory / "bin" / "python"
    subprocess.run(
        [
            *(str(python), "-m", "pip", "install", "--quiet"),
            *("-c", str(ROOT / "constraints.txt"), requirement),
        ],
        check=True,
    )
    return directory / "bin"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"), f"{ROOT}[cpu]")


def test_the_base_opens_bundles_and_shows_the_cli(tmp_path: Path) -> None:
    base = environment(tmp_path, str(ROOT))
    assert "Usage" in call(base / "sdt-deploy", "--help").stdout
    done = call(base / "sdt-deploy", "inspect", GOLDEN)
    assert done.returncode == 0, done.stderr
    done = call(base / "sdt-deploy", "verify", GOLDEN)
    assert done.returncode == 2
    assert '"sdt-deploy[cpu]"' in " ".join(done.stderr.split())


def call(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_cpu_runtime_alone(bare: Path, tmp_path: Path) -> None:
    packages = call(bare / "python", "-m", "pip", "list").stdout
    assert "onnxruntime" in packages
    for absent in ("torch", "onnxscript", "transformers", "safetensors"):
        assert f"\n{absent} " not in packages
    done = call(bare / "sdt-deploy", "verify", GOLDEN)
    assert done.returncode == 0, done.stderr
    assert "0 routing flips" in done.stdout
    code = (
        "import sdt_deploy, sys\n"
        "with sdt_deploy.Session.open(sys.argv[1]) as session:\n"
        "    print(session.run([3, 4, 5], [0, 1, 3], path='sparse').output.shape)"
    )
    done = call(bare / "python", "-c", code, GOLDEN)
    assert done.stdout == "(2, 8)\n", done.stderr
    done = call(
        bare / "sdt-deploy", "bench", GOLDEN, "--cases", "1x4", "--budget", 0.1, "--no-memory"
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy was not measured" in done.stdout
    done = call(bare / "sdt-deploy", "profile", GOLDEN, "--case", "1x4", "--budget", 0.1)
    assert done.returncode == 0, done.stderr
    np.save(tmp_path / "ids.npy", np.array([[3, 4, 5]]))
    done = call(bare / "sdt-deploy", "explain", GOLDEN, "--ids", tmp_path / "ids.npy")
    assert len(done.stdout.splitlines()) == 3, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "model.pt", "out"), "needs torch, which is not installed: pip install"),
        (("export", "model", "out"), '"sdt-deploy[export]"'),
        (("bench", str(GOLDEN), "--plot", "x.png"), '"sdt-deploy[demo]"'),
        (("bench", str(GOLDEN), "--report", "x.html"), '"sdt-deploy[report]"'),
        (("explain", str(GOLDEN), "--ids", "x", "--html", "x.html"), '"sdt-deploy[report]"'),
    ],
)
def test_what_is_missing_is_named(bare: Path, arguments: tuple[str, ...], message: str) -> None:
    done = call(bare / "sdt-deploy", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())
