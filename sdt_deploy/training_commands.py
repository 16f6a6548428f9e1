"""Commands about training and quality; :mod:`sdt_deploy.cli` registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sdt_deploy.console import clean_up_on_sigterm, console


def evaluate(
    subject: Annotated[Path, typer.Argument(help="Bundle, or any model that convert accepts.")],
    teacher: Annotated[Path, typer.Option(help="Dense model to compare with.")],
    texts: Annotated[Path, typer.Option(help="Held-out text, one paragraph per line.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare with a dense teacher on held-out text; a bundle keeps the result.

    Example: sdt-deploy evaluate bundle --teacher ./all-MiniLM-L6-v2 --texts held-out.txt
    """
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    require("torch", extra="export", purpose="Running the teacher")
    from sdt_deploy.evaluation.evaluate import evaluate as measure
    from sdt_deploy.tokenization import read_lines

    quality = measure(subject, teacher, read_lines(texts)).to_dict()
    if as_json:
        console.file.write(json.dumps(quality, indent=1) + "\n")
        return
    for name, value in quality.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.print(f"[bold]{name:<16}[/bold]{shown}", highlight=False)
