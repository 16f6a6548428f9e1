"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdt_deploy.choices import BackendName
from sdt_deploy.console import be_quiet

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the target if it exists.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads; default: all usable cores.")
]
BackendOption = Annotated[
    BackendName, typer.Option(help="What runs the graphs; see sdt-deploy doctor.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=be_quiet, help="Print errors only, and JSON if it is asked for."
    ),
]
"""Works through its callback; commands take it and need not look at it."""
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text; may be given again.")]
TextFile = Annotated[Path | None, typer.Option(help="File with one text per line.")]
Ids = Annotated[Path | None, typer.Option(help=r".npy with token ids \[batch, seq], no padding.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut texts that are long.")]
BundleArgument = Annotated[Path, typer.Argument(help="Directory of the bundle.")]
