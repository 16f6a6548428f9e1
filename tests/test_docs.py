"""The site builds without a warning, its links lead somewhere, and what its pages show works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer.main

from sdt_deploy import cli
from sdt_deploy.config import HeadConfig
from tests.conftest import ROOT, Once, blocks_of, commands_of, user_environment
from tests.test_cli import call
from tests.textmodels import CONFIG, save_teacher, texts

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "decisions")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def site(once: Once) -> Path:
    """The built site."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it comes with the docs extra")

    def fill(directory: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stderr, done.stderr

    return once("site", fill)


class Anatomy(HTMLParser):
    """Ids, links and what a page loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found[name] or "" for name in ("id", "name") if name in found}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(str(found["src"]))
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loads.append(str(found["href"]))


def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {page: Anatomy(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 20
    for page, anatomy in pages.items():
        for link in (*anatomy.links, *anatomy.loads):
            parts = urlsplit(link)
            if parts.scheme:
                assert link in anatomy.links, f"{page} loads {link} from the network"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                anchors = pages[target].ids
                assert unquote(parts.fragment) in anchors, f"{page.relative_to(site)}: {link}"


def test_the_reference_is_complete(site: Path) -> None:
    """Every command with its options, every public name, and no markup of another kind."""
    text = (site / "reference" / "cli.html").read_text()
    for name, command in COMMANDS.items():
        assert f"sdt-deploy {name}" in text
        for parameter in command.params:
            assert all(option in text for option in parameter.opts)
    import sdt_deploy

    reference = (site / "reference" / "python.html").read_text()
    for name in sdt_deploy.__all__:
        assert re.search(rf'id="sdt_deploy[\w.]*\.{name}"', reference), name
    assert not re.search(r":(class|func|meth|mod|attr|data):", reference)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_commands_that_are_not_run_parse(page: Path) -> None:
    """Blocks of plain text, which need a GPU, another model, or a server that stays."""
    for kind, text in blocks_of(page):
        assert kind in ("bash", "python", "text", "json", "xml"), f"{page}: {kind}"
        for line in commands_of(text) if kind == "text" else ():
            if line.startswith("sdt-deploy "):
                _, name, *arguments = shlex.split(line)
                COMMANDS[name].make_context(name, arguments)


ELSEWHERE = ("build/gpu", "tensorrt", "cuda")
"""Words of commands that need a GPU, or a library for one."""


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(DOCS / "how-to").glob("*.md")], ids=lambda page: page.name
)
def test_commands_for_other_models_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of plain text, with tiny models under the names that stand there, and two steps."""
    commands = [
        line
        for kind, text in blocks_of(page)
        if kind == "text"
        for line in commands_of(text)
        if line.startswith("sdt-deploy ") and not any(word in line for word in ELSEWHERE)
        if "--resume" not in line  # of a run that was killed: tests/training/test_job.py
    ]
    monkeypatch.chdir(tmp_path)
    wide = CONFIG.replace(n_layers=6, thresholds=(), d_model=64, d_ff=64)
    small = CONFIG.replace(n_layers=2, thresholds=(), max_positions=90)
    save_teacher(tmp_path / "MINILM", wide)
    save_teacher(tmp_path / "my-encoder", small)
    save_teacher(tmp_path / "my-llama", small.replace(causal=True, head=HeadConfig(kind="lm")))
    for number, name in enumerate(("texts.txt", "held-out.txt", "prompts.txt")):
        (tmp_path / name).write_text("\n".join(texts(40, seed=number)))
    for line in commands:
        _, name, *arguments = shlex.split(line)
        if name in ("convert", "distill", "export"):
            arguments.append("--overwrite")  # blocks show several ways to make the same
        if name == "distill":
            arguments += ["--steps", "2", "--batch-size", "4"]
        if name == "export":
            arguments.append("--no-single-file")
        if "./my-" in line:
            arguments += ["--target-depth", "1.5"] if "--target-depth" in arguments else []
        call(name, *arguments)
    if page.name in ("README.md", "own-model.md", "generation.md"):
        assert len(commands) > 3


RUN = """
import sys, traceback
from pathlib import Path
for path in sys.argv[1:]:
    code = compile(Path(path).read_text(), path, "exec")
    exec(code, {"__name__": "__main__"})
"""


def test_blocks_run(readme: Path, tmp_path: Path) -> None:
    """In the README's directory; commands that are in the README too have been run there."""
    done_before = {
        command
        for kind, text in blocks_of(ROOT / "README.md")
        if kind == "bash"
        for command in commands_of(text)
        if command.startswith("sdt-deploy")
    }
    commands: list[str] = []
    scripts: list[str] = []
    for page in PAGES:
        for number, (kind, text) in enumerate(blocks_of(page)):
            if kind == "bash":
                commands += [one for one in commands_of(text) if one not in done_before]
            elif kind == "python":
                script = tmp_path / f"{page.stem}-{number}.py"
                script.write_text(text)
                scripts.append(str(script))
    assert len(commands) > 5
    assert len(scripts) > 5
    for command in (
        ["bash", "-euxo", "pipefail", "-c", "\n".join(commands)],
        [sys.executable, "-c", RUN, *scripts],
    ):
        done = subprocess.run(
            command, cwd=readme, env=user_environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
