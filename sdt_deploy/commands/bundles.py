"""Commands that look at a bundle, run it and measure it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sdt_deploy.choices import PathChoice
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
from sdt_deploy.console import (
    clean_up_on_sigterm,
    console,
    print_depths,
    print_engines,
    print_graphs,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from sdt_deploy.runtime.result import RunResult


def inspect(
    bundle: BundleArgument,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a bundle.

    Examples::

        sdt-deploy inspect bundle
        sdt-deploy inspect bundle --json
    """
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.description import described, quality_figures

    manifest = Bundle.open(bundle, check_files=False).manifest
    if as_json:
        print_json(json.loads(manifest.to_json()))
        return
    facts = {
        **described(manifest.model),
        "numbers": manifest.export.numbers,
        "source": manifest.provenance.get("source", "unknown"),
        "licence": manifest.provenance.get("license") or "unknown",
        "quality": "not evaluated"
        if manifest.quality is None
        else ", ".join(f"{k} {v}" for k, v in quality_figures(manifest.quality).items()),
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.created_by.items()),
        "size": f"{sum(f['size_bytes'] for f in manifest.files.values()) / 1e6:.1f} MB",
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:<13}[/bold]{escape(str(value))}", highlight=False)
    print_graphs(manifest.graphs.values())
    print_engines(manifest.engines)


def verify(
    bundle: BundleArgument,
    backend: BackendOption = "onnxruntime-cpu",
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check every file of a bundle and its outputs against the reference in it.

    Examples::

        sdt-deploy verify bundle
        sdt-deploy verify bundle --backend onnxruntime-cuda
    """
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.runtime.session import Session
    from sdt_deploy.runtime.verification import verify_bundle

    opened = Bundle.open(bundle)
    with Session.open(opened, backend=backend, n_threads=n_threads) as session:
        checks = verify_bundle(opened, session)
    if as_json:
        print_json({"n_files": len(opened.manifest.files), "checks": checks})
        return
    console.print(f"{len(opened.manifest.files)} files are as they were exported")
    for check in checks:
        console.print(
            f"{check.path:<7} {check.n_cases} cases, largest error {check.max_abs_error:.2g}, "
            f"{check.routing_flips} routing flips"
        )


def run(
    bundle: BundleArgument,
    text: Texts = None,
    texts: TextFile = None,
    ids: Ids = None,
    out: Annotated[
        Path | None, typer.Option(help="Save as .npz: output, depths, input_ids, cu_seqlens.")
    ] = None,
    path: Annotated[PathChoice, typer.Option(help="Path to take.")] = "auto",
    truncate: Truncate = False,
    show_depth: Annotated[
        bool, typer.Option("--show-depth", help="Print every token in the colour of its depth.")
    ] = False,
    backend: BackendOption = "onnxruntime-cpu",
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run texts or token ids and print or save the outputs.

    Examples::

        sdt-deploy run bundle --text "To be, or not to be" --show-depth
        sdt-deploy run bundle --texts texts.txt --truncate --out embeddings.npz
        sdt-deploy run bundle --ids ids.npy --path dense --json
    """
    from sdt_deploy.explain.routing import token_names
    from sdt_deploy.files import check_writable
    from sdt_deploy.runtime.session import Session

    inputs = read_inputs(text, texts, ids)
    if out is not None:
        check_writable(out)
    with Session.open(bundle, backend=backend, n_threads=n_threads) as session:
        result = session.run(
            inputs,
            path=path,
            overflow="truncate" if truncate else "error",
        )
        if show_depth and not as_json:
            tokens = [token_names(session, ids) for ids in result.split(result.input_ids)]
            depths = result.split(result.depths)
            print_depths(zip(tokens, depths, strict=True), session.manifest.model.n_layers)
    if out is not None:
        _save(out, result)
    if as_json:
        print_json(_document(result, out, session.manifest.model.head.per_sequence))
        return
    if out is not None:
        console.print(f"[bold]{escape(str(out))}[/bold]: output {result.output.shape} float32")
    else:
        for row in result.output[:20]:
            values = " ".join(f"{value:+.4f}" for value in row[:8])
            console.print(f"{values}{' …' if len(row) > 8 else ''}", highlight=False)
        if len(result.output) > 20:
            console.print(f"… {len(result.output) - 20} more rows; save them with --out")
    console.print(
        f"output {result.output.shape}, mean depth {result.layer_usage.mean_depth:.2f}, "
        f"path {result.path}, {result.timings.total_ms:.2f} ms",
        highlight=False,
    )


def bench(
    bundle: BundleArgument,
    cases: Annotated[
        str | None, typer.Option(help="BATCHxSEQ,…; default: 2,8,16 x 20,64,128,256,512,1024.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Measure real lengths too, one text per line; 128 spread lines at most."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option(help="Write all figures as JSON.")] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write all of it as one HTML file.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios (PNG).")] = None,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds of timing per case.")] = 4.0,
    beside: Annotated[
        Path | None, typer.Option(help="Bundle of the same model, cut otherwise, to time as well.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory in processes.")] = True,
    backend: BackendOption = "onnxruntime-cpu",
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure sparse against dense: same backend, same threads, interleaved, medians.

    Examples::

        sdt-deploy bench bundle --cases 2x20,8x128 --json-file bench.json
        sdt-deploy bench bundle --texts texts.txt --plot bench.png --no-memory
        sdt-deploy bench bundle --report report.html
        sdt-deploy bench bundle --n-threads 1 --json
        sdt-deploy bench bundle --beside bundle-auto --cases 2x20,8x128
    """
    from sdt_deploy.bench.run import BenchOptions, run_bench

    options = BenchOptions(
        cases=cases,
        texts=texts,
        json_file=json_file,
        plot_file=plot_file,
        report_file=report_file,
        budget_s=budget,
        beside=beside,
        with_memory=memory,
        backend=backend,
        n_threads=n_threads,
    )
    clean_up_on_sigterm()
    with progress_bar("bench") as advance:
        outcome = run_bench(bundle, options, progress=advance)
    if as_json:
        print_json(outcome.document)
        return
    console.print(outcome.table)
    for line in outcome.remarks:
        console.print(line, highlight=False)
    for written in (json_file, plot_file, report_file):
        if written is not None:
            console.print(f"[bold]{escape(str(written))}[/bold]")


def _document(result: RunResult, out: Path | None, per_sequence: bool) -> dict[str, Any]:
    """Return a run as plain JSON types; the outputs only where no file holds them."""
    outputs = result.output if per_sequence else result.split(result.output)
    parts = zip(result.split(result.input_ids), result.split(result.depths), outputs, strict=True)
    sequences = [
        {
            "input_ids": ids.tolist(),
            "depths": depths.tolist(),
            **({"output": output.tolist()} if out is None else {}),
        }
        for ids, depths, output in parts
    ]
    return {
        "path": result.path,
        "output_shape": list(result.output.shape),
        "output_file": None if out is None else str(out),
        "mean_depth": result.layer_usage.mean_depth,
        "timings": result.timings,
        "sequences": sequences,
    }


def _save(path: Path, result: RunResult) -> None:
    import io

    import numpy as np

    from sdt_deploy.files import write_file

    stream = io.BytesIO()
    np.savez(
        stream,
        output=result.output,
        depths=result.depths,
        input_ids=result.input_ids,
        cu_seqlens=result.cu_seqlens,
    )
    write_file(path, stream.getvalue())
