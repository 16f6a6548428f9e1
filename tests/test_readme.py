"""Every command and every Python block of the README runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SET_UP = ("git clone", "cd ", "make ", "pip install")
"""Lines that fetch or install; `make` targets are what runs this test."""

pytestmark = pytest.mark.xdist_group("minilm")


def test_readme_commands(tmp_path: Path, minilm: Path) -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    kinds = [kind for kind, _ in blocks]
    assert kinds.count("bash") >= 2
    assert kinds.count("python") >= 1
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    bin_directory = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"}
    n_run = 0
    for kind, text in blocks:
        if kind == "bash":
            lines = [line for line in text.splitlines() if not line.startswith(SET_UP)]
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
        elif kind == "python":
            command = [sys.executable, "-c", text]
        else:
            assert kind == "text", f"a block of kind {kind!r} would not be run"
            continue
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        n_run += 1
    assert n_run >= 3
    script = ROOT / "examples" / "agreement.py"
    done = subprocess.run(
        [sys.executable, str(script), "build/bundle", "examples/texts/shakespeare.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("agreement of sparse with dense embeddings over 256 texts is")
    few = tmp_path / "few.txt"
    few.write_text("To be, or not to be\n" * 3 + "that is the question " * 200 + "\n")
    bench = ["bench", "build/bundle", "--cases", "1x8", "--budget", "0.1", "--no-memory"]
    script = bin_directory / "sdt-deploy"
    for arguments, message in (
        ([*bench, "--texts", str(few)], "4 of 4 real texts, 1 of them cut to length"),
        (["run", "build/bundle", "--texts", str(few), "--truncate"], "output (4, 384)"),
    ):
        done = subprocess.run(
            [str(script), *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert message in " ".join(done.stdout.split())
    assert (tmp_path / "build" / "bench.json").exists()


def test_links_in_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_file_tree_names_every_module() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "sdt_deploy").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text, f"{path.name} is missing in the README's file tree"
