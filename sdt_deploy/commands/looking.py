"""Commands that show what happens inside a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sdt_deploy.choices import PathName
from sdt_deploy.commands.inputs import read_inputs
from sdt_deploy.commands.options import (
    BackendOption,
    BundleArgument,
    Ids,
    Json,
    Quiet,
    TextFile,
    Texts,
    Threads,
    Truncate,
)
from sdt_deploy.console import clean_up_on_sigterm, console, print_json, print_profile, print_tokens
from sdt_deploy.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.explain.html import Weights


def explain(
    bundle: BundleArgument,
    text: Texts = None,
    texts: TextFile = None,
    ids: Ids = None,
    html: Annotated[
        Path | None, typer.Option(help="Draw it, with attention maps, as one HTML file.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Native directory for the attention; default: the bundle's own weights."),
    ] = None,
    truncate: Truncate = False,
    backend: BackendOption = "onnxruntime-cpu",
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how deep every token goes, and what the active ones look at.

    In a terminal, tokens in the colour of their depth; elsewhere one line a token: text, token,
    score, depth, and a mark for each layer.

    Examples::

        sdt-deploy explain bundle --text "To be, or not to be"
        sdt-deploy explain bundle --texts texts.txt --html routes.html
        sdt-deploy explain bundle --text "To be, or not to be" --json
    """
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.explain.routing import explain as explained
    from sdt_deploy.extras import require
    from sdt_deploy.files import check_writable, write_file
    from sdt_deploy.runtime.session import Session

    if html is not None:
        require("vl_convert", extra="report", purpose="Drawing charts")
        check_writable(html)
    inputs = read_inputs(text, texts, ids)
    opened = Bundle.open(bundle)
    config = opened.manifest.model
    weights = _weights(opened, model) if html is not None else None
    with Session.open(opened, backend=backend, n_threads=n_threads) as session:
        found = explained(session, inputs, truncate=truncate)
    if html is not None:
        from sdt_deploy.explain.html import explanation_page

        page = explanation_page(bundle.resolve().name, config, found, weights)
        write_file(html, page.encode())
    if as_json:
        print_json(
            {
                "n_layers": config.n_layers,
                "thresholds": config.thresholds,
                "texts": [
                    {
                        "tokens": one.tokens,
                        "input_ids": one.input_ids.tolist(),
                        "scores": one.scores.tolist(),
                        "depths": one.depths.tolist(),
                        "active": one.active.tolist(),
                    }
                    for one in found
                ],
            }
        )
        return
    print_tokens(found, config.n_layers)
    if html is not None:
        without = "" if weights else ", without attention: torch and onnx are not installed"
        console.print(f"[bold]{escape(str(html))}[/bold]{without}", highlight=False)


def profile(
    bundle: BundleArgument,
    case: Annotated[
        str | None,
        typer.Option(help="BATCHxSEQ of the bundle's text sample; default: 8x128, or shorter."),
    ] = None,
    text: Texts = None,
    texts: TextFile = None,
    ids: Ids = None,
    path: Annotated[PathName, typer.Option(help="Path to take.")] = "sparse",
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev or chrome://tracing.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Operators to list.")] = 12,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds of timing.")] = 2.0,
    backend: BackendOption = "onnxruntime-cpu",
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where the time of one batch goes: graphs, operators, and the host around them.

    On a GPU, graphs are timed by CUDA events and are NVTX ranges; operators are not timed.

    Examples::

        sdt-deploy profile bundle
        sdt-deploy profile bundle --backend onnxruntime-cuda
        sdt-deploy profile bundle --case 16x256 --trace trace.json
        sdt-deploy profile bundle --texts texts.txt --path dense --json
    """
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.files import check_writable, write_file
    from sdt_deploy.profiling.inputs import profiled_batch
    from sdt_deploy.profiling.profile import profile as measure

    opened = Bundle.open(bundle)
    given = None
    if text or texts is not None or ids is not None:
        if case is not None:
            raise InputError("give --case or inputs of your own, not both")
        given = read_inputs(text, texts, ids)
    if trace is not None:
        check_writable(trace)
    clean_up_on_sigterm()
    found = measure(
        opened,
        profiled_batch(opened, case, given),
        path=path,
        backend=backend,
        n_threads=n_threads,
        budget_s=budget,
    )
    if trace is not None:
        write_file(trace, json.dumps(found.trace).encode())
    if as_json:
        print_json({**dataclasses.asdict(found), "trace": None if trace is None else str(trace)})
        return
    print_profile(found, top)
    if trace is not None:
        console.print(f"[bold]{escape(str(trace))}[/bold]: open it in ui.perfetto.dev")


def _weights(bundle: Bundle, model: Path | None) -> Weights | None:
    """Return what computes attention weights; None where the bundle's model cannot be rebuilt."""
    from functools import partial

    from sdt_deploy.extras import require

    try:
        require("torch", extra="export", purpose="Attention maps")
        needed = "onnx" if model is None else "safetensors"
        require(needed, extra="export", purpose="Attention maps")
    except MissingExtraError:
        if model is not None:
            raise
        return None
    from sdt_deploy.explain.attention import attention_weights, oracle_of

    return partial(attention_weights, oracle_of(bundle, model))
