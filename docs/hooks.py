"""Puts the reference of the command line, made from the commands, into its page."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import typer.main
from typer.cli import get_docs_for_click

from sdt_deploy.cli import app

EXAMPLES = re.compile(r"^Examples:\n((?: {4}.*\n)+)", re.MULTILINE)
PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the place for commands, where a page has one."""
    if PLACE not in markdown:
        return markdown
    command = typer.main.get_command(app)
    context = command.make_context("sdt-deploy", [], resilient_parsing=True)
    parts = [
        get_docs_for_click(obj=one, ctx=context, name=name, indent=1, call_prefix="sdt-deploy")
        for name, one in command.commands.items()  # type: ignore[attr-defined]
    ]
    text = "\n".join(parts).replace("\b", "")
    return markdown.replace(PLACE, EXAMPLES.sub(_fenced, text))


def _fenced(match: re.Match[str]) -> str:
    return f"```console\n{dedent(match[1])}```\n"
