"""Which engines to build, for which GPU and with which profiles; nothing is built here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, input_shapes
from sdt_deploy.bundle import PROJECT, UPDATE, WEIGHTS, Bundle, GraphSpec, Manifest
from sdt_deploy.config import BuildConfig, shown
from sdt_deploy.costs import active_shares
from sdt_deploy.engines import EngineSet, build_command
from sdt_deploy.errors import BundleFormatError, ConfigError
from sdt_deploy.exporters.engine_graphs import REVISION
from sdt_deploy.exporters.engine_process import EngineJob
from sdt_deploy.files import sha256
from sdt_deploy.gpu import driver, read_capability
from sdt_deploy.tokenization import read_lines

WHOLE_MODELS = frozenset({"dense", "masked"})
"""Graphs other than stages that have attention."""
NO_ENGINES = "single", PROJECT, UPDATE, "decode-"
"""What graphs without engines begin with: the single file, whose shapes depend on its data inside,
the pieces of stages, whose attention is in their engines, and steps with cached keys."""


def target_gpus(config: BuildConfig, chosen: trt.Flavour) -> tuple[str, ...]:
    """Return the compute capabilities to build for.

    Raises:
        ConfigError: if none is given and no GPU is here, or if the flavour cannot build for one.
    """
    wanted = config.compute_capabilities
    for capability in wanted:
        read_capability(capability)
    here = driver()
    local = here.gpus[0].compute_capability if here.gpus else None
    if not wanted and local is None:
        advice = "name the GPU to build for, as in --compute-capability 8.9"
        if not chosen.builds_for_other_gpus:
            advice = f"{chosen.name} builds on the GPU that runs the engines; tensorrt-rtx builds "
            advice += "for other GPUs"
        raise ConfigError(f"{here.problem}: {advice}")
    for capability in wanted:
        if not chosen.builds_for_other_gpus and capability != local:
            raise ConfigError(
                f"{chosen.name} builds on the GPU that runs the engines, {local or 'none'} here, "
                f"not for {capability}; tensorrt-rtx builds for other GPUs"
            )
    targets = wanted or (str(local),)
    supported = chosen.compute_capabilities
    for capability in targets:
        if supported is not None and capability not in supported:
            raise ConfigError(
                f"{chosen.name} engines run on GPUs of compute capability {', '.join(supported)}, "
                f"not {capability}"
                + (f"; take --target {chosen.alternative} there" if chosen.alternative else "")
            )
    return tuple(sorted(set(targets), key=read_capability))


def read_lengths(path: Path | None) -> list[int] | None:
    """Read recorded sequence lengths, one a line.

    Raises:
        ConfigError: if a line is no number.
        InputError: if the file cannot be read.
    """
    if path is None:
        return None
    lines = read_lines(path)
    for line in lines:
        if not (line.isascii() and line.isdecimal() and len(line) < 10):
            raise ConfigError(
                f"{path}: a length is a number of tokens, not {shown(line)}; write one a "
                "line, as 17"
            )
    return [int(line) for line in lines]


def set_attention(config: BuildConfig, manifest: Manifest, chosen: trt.Flavour, found: str) -> str:
    """Return which attention to ask for, one of :data:`sdt_deploy.engines.ATTENTIONS`.

    Raises:
        ConfigError: if the bundle or version ``found`` of the library does not have it.
    """
    features, exported = trt.features(chosen, found), manifest.export.attention
    if config.attention == "packed" and exported != "fused":
        raise ConfigError(
            "packed attention is made from fused attention, and the bundle has it "
            f"{exported}; export it with --attention fused"
        )
    if config.attention == "packed" and not features.packed_attention:
        raise ConfigError(
            f"{chosen.name} {found} has no packed attention, tensorrt "
            f"{trt.written(trt.PACKED_SINCE)} and newer have; leave --attention packed out"
        )
    if exported == "fused" and not features.fused_attention:
        raise ConfigError(
            f"{chosen.name} {found} has no fused attention, tensorrt "
            f"{trt.written(trt.FUSED_SINCE)} and newer have; export the bundle with --attention "
            "decomposed"
        )
    return "packed" if config.attention == "packed" else exported


def fused_hint(manifest: Manifest, features: trt.Features) -> str | None:
    """Advise fused attention for a bundle without it; None: it has it, or would not gain by it."""
    export = manifest.export
    fusible = features.fused_attention and manifest.model.is_plain
    if export.attention == "fused" or export.precision == "float32" or not fusible:
        return None
    return (
        f"the bundle has decomposed attention; exported with --precision {export.precision} "
        "--attention fused, its engines may get one kernel for it"
    )


def graph_attention(spec: GraphSpec, asked: str) -> str | None:
    """Return what an engine of a set is asked for; packing is for stages."""
    if spec.layers is not None:
        return asked
    if spec.name not in WHOLE_MODELS:
        return None
    return "fused" if asked == "packed" else asked


def pinned_times(config: BuildConfig) -> str | None:
    """Return the SHA-256 of a pinned timing cache, which decides the kernels; None: not pinned.

    Raises:
        ConfigError: if it cannot be read.
    """
    if not config.pin_timing_cache or config.timing_cache is None:
        return None
    try:
        return sha256(config.timing_cache)
    except OSError as error:
        raise ConfigError(
            f"the timing cache {config.timing_cache} cannot be read: {error}. Make it first, with "
            "a build without --pin-timing-cache"
        ) from error


def plan_jobs(
    bundle: Bundle,
    engines: EngineSet,
    graphs: Sequence[str] = (),
    *,
    pinned: str | None = None,
) -> list[EngineJob]:
    """Plan the builds of a set.

    Args:
        bundle: the bundle.
        engines: what is to be built, with its profiles.
        graphs: names of graphs; none: all.
        pinned: see :func:`pinned_times`.

    Raises:
        ConfigError: if the bundle has no graph of a name.
        BundleFormatError: if a graph takes something that no profile is known for.
    """
    manifest = bundle.manifest
    possible = [name for name in manifest.graphs if not name.startswith(NO_ENGINES)]
    unknown = [name for name in graphs if name not in possible]
    if unknown:
        raise ConfigError(
            f"the bundle has no graph {', '.join(unknown)} to build; it has {', '.join(possible)}"
        )
    shares = active_shares(manifest, manifest.model.thresholds)
    jobs = []
    for name in graphs or possible:
        spec = manifest.graphs[name]
        share = None if spec.layers is None else shares[spec.layers[0]]
        try:
            profiles = tuple(
                {
                    tensor.name: input_shapes(tensor.axes, profile, active_share=share)
                    for tensor in spec.inputs
                }
                for profile in engines.profiles
            )
        except ConfigError as error:
            raise BundleFormatError(f"graph {name} cannot become an engine: {error}") from error
        parts = {
            "graph": manifest.files[spec.file]["sha256"],
            "weights": manifest.files.get(WEIGHTS, {}).get("sha256"),
            "profiles": profiles,
            "precision": manifest.export.numbers,
            "attention": graph_attention(spec, engines.attention),
            "flavour": engines.flavour,
            "version": engines.version,
            "compute_capabilities": engines.compute_capabilities,
            "workspace_mb": engines.workspace_mb,
            "timing_cache": pinned,
            **_rewriting(engines, graph_attention(spec, engines.attention)),
            **_machine(engines),
        }
        canonical = json.dumps(parts, sort_keys=True).encode()
        jobs.append(
            EngineJob(
                graph=name,
                onnx=bundle.path / spec.file,
                profiles=profiles,
                attention=graph_attention(spec, engines.attention),
                key=hashlib.sha256(canonical).hexdigest(),
            )
        )
    return jobs


def _machine(engines: EngineSet) -> dict[str, Any]:
    """What of this machine goes into an engine: kernels chosen by timing them on its GPU."""
    if trt.flavour(engines.flavour).builds_for_other_gpus:
        return {}
    here = driver()
    return {"gpu": here.gpus[0].name, "driver": here.cuda_version}


def _rewriting(engines: EngineSet, attention: str | None) -> dict[str, Any]:
    """How a graph is rewritten before its build, if it is: engines of before are not reused."""
    legacy = trt.features(trt.flavour(engines.flavour), engines.version).legacy
    rewritten = legacy or attention in ("fused", "packed")
    return {"rewriting": REVISION} if rewritten else {}


def worker_options(
    config: BuildConfig, manifest: Manifest, features: trt.Features, targets: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of the worker's job that hold for all graphs."""
    local = [gpu.compute_capability for gpu in driver().gpus[:1]]
    workspace = config.workspace_mb
    return {
        "rtx": trt.flavour(config.flavour).polygraphy_rtx,
        "compute_capabilities": [read_capability(each) for each in targets],
        "gpu_here": bool(set(local) & set(targets)),
        "workspace_bytes": None if workspace is None else workspace << 20,
        "legacy": features.legacy,
        "precision": manifest.export.precision,
        "timing_cache": None if config.timing_cache is None else str(config.timing_cache),
        "pin_timing_cache": config.pin_timing_cache,
    }


def command_line(
    bundle: Path,
    config: BuildConfig,
    limits: BatchLimits,
    engines: EngineSet,
    graph: str,
    cache: Path | None,
    *,
    keep_bundle: bool,
) -> str:
    """Return the command that builds just one engine of a set; ``cache``: None for no cache."""
    further = ["--no-cache"] if cache is None else ["--cache", str(cache)]
    if keep_bundle:
        further.append("--keep-bundle")
    if config.timing_cache is not None:
        further += ["--timing-cache", str(config.timing_cache)]
    if config.pin_timing_cache:
        further.append("--pin-timing-cache")
    return build_command(
        bundle, engines, (graph,), limits=limits, lengths=config.lengths, further=further
    )
