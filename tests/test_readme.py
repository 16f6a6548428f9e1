"""Every command and every Python block of the README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_commands(readme: Path) -> None:
    """The fixture runs the blocks; what follows is near to them."""
    assert (readme / "build" / "bench.json").exists()
    script = ROOT / "examples" / "agreement.py"
    done = subprocess.run(
        [sys.executable, str(script), "build/bundle", "examples/texts/shakespeare.txt"],
        cwd=readme,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("agreement of sparse with dense embeddings over 256 texts is")
    few = readme / "few.txt"
    few.write_text("To be, or not to be\n" * 3 + "that is the question " * 200 + "\n")
    bench = ["bench", "build/bundle", "--cases", "1x8", "--budget", "0.1", "--no-memory"]
    script = Path(sys.executable).with_name("sdt-deploy")
    for arguments, message in (
        ([*bench, "--texts", str(few)], "4 of 4 real texts, 1 of them cut to length"),
        (["run", "build/bundle", "--texts", str(few), "--truncate"], "output (4, 384)"),
    ):
        done = subprocess.run(
            [str(script), *arguments], cwd=readme, capture_output=True, text=True, check=True
        )
        assert message in " ".join(done.stdout.split())


def test_links_in_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_file_tree_names_every_module() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "sdt_deploy").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text, f"{path.name} is missing in the README's file tree"
