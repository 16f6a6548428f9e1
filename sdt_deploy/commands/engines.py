"""Commands about engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdt_deploy.commands.options import BundleArgument, Json, Quiet
from sdt_deploy.config import EngineFlavour, EngineLayout
from sdt_deploy.console import (
    clean_up_on_sigterm,
    console,
    print_engines,
    print_json,
    progress_bar,
)


def build_engine(
    bundle: BundleArgument,
    target: Annotated[
        EngineFlavour,
        typer.Option(help="tensorrt: on the GPU that will run them. tensorrt-rtx: anywhere."),
    ],
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="GPU to build for, such as 8.9; may be given again. Default: the one."),
    ] = None,
    max_seqlen: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's positions.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 64,
    max_padded_tokens: Annotated[
        int, typer.Option(min=1, help="Sequences times the longest; memory grows with it.")
    ] = 8192,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens; default: as --max-padded-tokens.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option(help="Recorded sequence lengths, one a line, to plan for.")
    ] = None,
    attention: Annotated[
        EngineLayout,
        typer.Option(
            help="packed: without padding, in bundles with fused attention (TensorRT 11.1; "
            "untested)."
        ),
    ] = "padded",
    workspace_mb: Annotated[
        int | None, typer.Option(min=1, help="Bound on the scratch memory of each engine.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Then run each engine on this GPU and compare its outputs."),
    ] = False,
    graph: Annotated[
        list[str] | None, typer.Option(help="Only this graph; may be given again.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of built engines; default: the user's cache.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Use no such folder.")] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File with kernel times, read and updated (tensorrt).")
    ] = None,
    pin_timing_cache: Annotated[
        bool, typer.Option("--pin-timing-cache", help="Only read it; fail where it lacks a time.")
    ] = False,
    keep_bundle: Annotated[
        bool,
        typer.Option("--keep-bundle", help="Leave the bundle as it is; engines go to the cache."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT engines from a bundle's graphs and put them into it.

    Examples::

        sdt-deploy build-engine bundle --target tensorrt-rtx --compute-capability 8.9
        sdt-deploy build-engine bundle --target tensorrt --max-seqlen 256 --compare
    """
    from sdt_deploy.buckets import BatchLimits
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.config import BuildConfig
    from sdt_deploy.errors import ConfigError
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    require("polygraphy", extra=target, purpose="Building engines")
    from sdt_deploy.exporters.engine_cache import EngineCache, default_cache
    from sdt_deploy.exporters.tensorrt import build_engines

    if no_cache and cache is not None:
        raise ConfigError("--cache and --no-cache contradict each other; give one of them")
    if keep_bundle and compare:
        raise ConfigError("--compare runs the bundle's engines; leave it or --keep-bundle out")
    opened = Bundle.open(bundle)
    config = BuildConfig(
        flavour=target,
        compute_capabilities=tuple(compute_capability or ()),
        attention=attention,
        workspace_mb=workspace_mb,
        graphs=tuple(graph or ()),
        lengths=lengths,
        timing_cache=timing_cache,
        pin_timing_cache=pin_timing_cache,
    )
    limits = BatchLimits(
        max_seqlen=max_seqlen or opened.manifest.model.max_positions,
        max_batch=max_batch,
        max_padded_tokens=max_padded_tokens,
        max_tokens=max_tokens,
    )
    with progress_bar("build engines") as advance:
        report = build_engines(
            opened,
            config,
            limits,
            cache=None if no_cache else EngineCache(cache or default_cache()),
            keep_bundle=keep_bundle,
            progress=advance,
        )
    errors = _compare(bundle, target, tuple(report.sources)) if compare else {}
    if as_json:
        found = {"engines": report.engines, "sources": report.sources, "hint": report.hint}
        print_json({**found, "max_abs_error": errors})
        return
    print_engines([report.engines])
    counts = {source: list(report.sources.values()).count(source) for source in ORIGINS}
    said = [f"{count} {ORIGINS[source]}" for source, count in counts.items() if count]
    console.print(f"[bold]{escape(str(bundle))}[/bold]: {', '.join(said)}", highlight=False)
    if report.hint is not None:
        console.print(f"hint: {report.hint}", highlight=False)
    for name, error in errors.items():
        console.print(f"{name}: at most {error:.2g} from the model", highlight=False)


def _compare(path: Path, flavour: str, graphs: tuple[str, ...]) -> dict[str, float]:
    """Compare engines that were built with the model; return by how much each deviates."""
    from sdt_deploy import trt
    from sdt_deploy.bundle import Bundle
    from sdt_deploy.exporters.engine_accuracy import compare_engines
    from sdt_deploy.runtime.backends.tensorrt import find_engines

    bundle = Bundle.open(path)
    engines = find_engines(bundle, trt.flavour(flavour))
    return dict(compare_engines(bundle, engines, graphs))


ORIGINS = {
    "built": "built",
    "cache": "from the cache: same graph, weights, profiles, library and GPU",
    "bundle": "unchanged: graph, weights, profiles, library and GPU are as they were",
}


def doctor(
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show which backends work on this machine, and why the others do not.

    Examples::

        sdt-deploy doctor
        sdt-deploy doctor --json
    """
    from sdt_deploy.diagnosis import diagnose

    rows = diagnose()
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("backend", "version", "builds", "runs", "remark")
    for row in rows:
        marks = ["–" if can is None else "yes" if can else "no" for can in (row.builds, row.runs)]
        table.add_row(row.backend, row.version or "–", *marks, escape(row.remark))
    console.print(table)
