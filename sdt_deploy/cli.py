"""The command line; the commands themselves are in :mod:`sdt_deploy.commands`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getdoc
from typing import Annotated

import typer

from sdt_deploy.commands import bundles, engines, generating, looking, models, training
from sdt_deploy.console import console, fail, print_what_the_encoding_lacks, report_bug
from sdt_deploy.errors import SdtDeployError
from sdt_deploy.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Deploy depth-sparse transformers: per-layer engines with compaction between them.",
)


def help_of(command: Callable[..., None]) -> str:
    """Return the docstring of a command, its examples set line by line."""
    text = getdoc(command) or ""
    return text.replace("Examples::\n\n", "\b\nExamples:\n")


for command in (
    models.convert,
    models.export,
    bundles.inspect,
    bundles.verify,
    bundles.run,
    bundles.bench,
    generating.generate,
    looking.explain,
    looking.profile,
    engines.build_engine,
    engines.doctor,
    training.distill,
    training.evaluate,
):
    app.command(help=help_of(command))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"sdt-deploy {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line.

    Exit codes: 0 when all is well, 2 for what the user can mend, with one message and no traceback,
    1 for a bug, 130 and 143 after SIGINT and SIGTERM, 141 when nobody reads the output any more.
    """
    print_what_the_encoding_lacks()
    try:
        app()
    except SdtDeployError as error:
        fail(str(error))
    except MemoryError as error:
        fail(f"not enough memory: {error}. Take a smaller batch, case or model")
    except OSError as error:
        fail(str(error))
    except Exception:
        report_bug()
