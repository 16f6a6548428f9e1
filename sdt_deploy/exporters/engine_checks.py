"""What is refused before any engine is built."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Manifest
from sdt_deploy.config import BuildConfig
from sdt_deploy.engines import EngineSet, build_command
from sdt_deploy.errors import ConfigError, OutputError


def check_model(manifest: Manifest, limits: BatchLimits) -> None:
    """Check that engines can run the model, in batches as large as ``limits``.

    Raises:
        ConfigError: if they cannot.
    """
    model = manifest.model
    if limits.max_seqlen > model.max_positions:
        raise ConfigError(
            f"max_seqlen = {limits.max_seqlen} exceeds the model's {model.max_positions}"
            " positions; take as many at most"
        )
    if model.causal:
        raise ConfigError(
            "engines run on GPUs, where causal attention is not supported; run this bundle by "
            "onnxruntime-cpu"
        )
    if not model.scored_once:
        raise ConfigError(
            "engines run on GPUs, which route by thresholds on one score, and this model has "
            f"routing {model.routing!r} and selection {model.selection!r}; run it by "
            "onnxruntime-cpu"
        )
    if manifest.export.quantization != "none":
        raise ConfigError(
            f"{manifest.export.quantization} graphs are for ONNX Runtime on CPUs; export without "
            "--quantize to build engines"
        )


def check_library(
    manifest: Manifest, config: BuildConfig, chosen: trt.Flavour, version: str
) -> None:
    """Check that a version of the library can build what is asked for.

    Raises:
        ConfigError: if it cannot.
    """
    features, precision = trt.features(chosen, version), manifest.export.precision
    if precision not in features.precisions:
        raise ConfigError(
            f"{chosen.name} {version} does not build {precision}; it builds "
            f"{', '.join(features.precisions)}. Export again with --precision"
        )
    if config.timing_cache is not None and not features.timing_cache:
        raise ConfigError(f"{chosen.name} {version} has no timing cache; leave --timing-cache out")
    if config.pin_timing_cache and not features.pins_times:
        raise ConfigError(f"{chosen.name} {version} cannot pin times; leave --pin-timing-cache out")


def check_timing_cache(config: BuildConfig) -> None:
    """Check that a timing cache which is to be updated can be written.

    Raises:
        OutputError: if it cannot.
    """
    path = config.timing_cache
    if path is None or config.pin_timing_cache:
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent):  # as the lock that lies beside it
            pass
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise OutputError(
            f"the timing cache {path} cannot be written: {error}. Name a file in a folder that can "
            "be written with --timing-cache, or only read it with --pin-timing-cache"
        ) from error


def check_gpus(manifest: Manifest, chosen: trt.Flavour, targets: Sequence[str]) -> None:
    """Check that stages of the bundle's precision can be built for some GPUs.

    Args:
        manifest: of the bundle.
        chosen: the library.
        targets: compute capabilities.

    Raises:
        ConfigError: if they cannot.
    """
    precision = manifest.export.precision
    for capability in targets:
        known = chosen.limited.get(capability)
        if known is not None and precision not in known:
            raise ConfigError(
                f"{chosen.name} does not build {precision} stages for compute capability "
                f"{capability}, only {', '.join(known)}: export again with --precision {known[0]}"
            )


def check_others_stay(
    bundle: Path, old: EngineSet | None, new: EngineSet, graphs: Sequence[str]
) -> None:
    """Check that a build of some graphs does not drop the engines of the others.

    Args:
        bundle: where the sets are.
        old: what the bundle has; None: nothing.
        new: what is to be built; its engines are not looked at.
        graphs: names of graphs; none: all.

    Raises:
        ConfigError: if their settings differ: a set has the same ones throughout.
    """
    if old is None or not graphs or set(old.engines) <= set(graphs):
        return
    differences = list(old.differences(new))
    if not differences:
        return
    said = "; ".join(f"{name} is {there}, not {asked}" for name, there, asked in differences)
    same = build_command(bundle, old, graphs)
    raise ConfigError(
        f"the bundle's engines {old.name} have other settings: {said}. With --graph those of the "
        "other graphs would be lost. Leave --graph out, to build all of them with the new "
        f"settings, or build with those of the others"
        + (f": {same}" if old.version == new.version else f", by {old.flavour} {old.version}")
    )
