"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdt_deploy.choices import BackendChoice

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the target if it exists.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; default: all cores.")]
BackendOption = Annotated[
    BackendChoice, typer.Option(help="What runs the graphs; see sdt-deploy doctor.")
]
BundleArgument = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
