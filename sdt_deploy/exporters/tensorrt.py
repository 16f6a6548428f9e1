"""A bundle's graphs become engines, and the engines a part of the bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, input_shapes, plan_profiles
from sdt_deploy.bundle import MANIFEST, WEIGHTS, Bundle, Manifest, write_manifest
from sdt_deploy.config import BuildConfig, shown
from sdt_deploy.costs import active_shares
from sdt_deploy.engines import ENGINES, EngineSet, EngineSpec
from sdt_deploy.errors import (
    BuildError,
    BundleFormatError,
    ConfigError,
    OutputError,
)
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_process import Built, EngineJob, run_worker
from sdt_deploy.files import sha256, sync_tree
from sdt_deploy.gpu import driver, read_capability
from sdt_deploy.tokenization import read_lines

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ATTENTION = "decomposed"
"""Attention of the graphs as they are exported; see :attr:`EngineSet.attention`."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What ``build_engines`` did."""

    engines: EngineSet
    """All engines of the set as the bundle now lists them."""
    sources: Mapping[str, str]
    """For each graph that was asked for, where its engine came from: ``built``, ``cache`` or
    ``bundle``, which had it already."""


def build_engines(
    bundle: Bundle,
    config: BuildConfig,
    limits: BatchLimits | None = None,
    *,
    cache: EngineCache | None = None,
    progress: Progress = lambda what, done, total: None,
) -> BuildReport:
    """Build engines and put them into the bundle.

    The bundle changes in one step, by its manifest, after all builds; until then, and on any
    exception, it is as it was. If some builds fail the others are put into the bundle all the same,
    unless it has engines for these GPUs that were built with other settings.

    Args:
        bundle: the bundle; other processes may run it meanwhile, not build for it.
        config: what to build and for which GPU.
        limits: the largest batches; None: as long as the model's positions.
        cache: engines that need not be built again; None: only the bundle itself.
        progress: called with what is being done, steps done and steps in all.

    Raises:
        BuildError: if the library could not build some graphs; it names them and says why.
        BackendError: if the library is too old, or its process ended.
        MissingExtraError: if the library is not installed.
        ConfigError: if the config does not fit the bundle, the library or this machine.
        OutputError: if another build runs on the bundle, or a file cannot be written.
    """
    chosen = trt.flavour(config.flavour)
    manifest = bundle.manifest
    limits = limits or BatchLimits(max_seqlen=manifest.model.max_positions)
    if limits.max_seqlen > manifest.model.max_positions:
        raise ConfigError(
            f"max_seqlen = {limits.max_seqlen} exceeds the model's {manifest.model.max_positions} "
            "positions"
        )
    version = trt.checked_version(chosen)
    features = trt.features(chosen, version)
    if manifest.export.precision not in features.precisions:
        raise ConfigError(
            f"{chosen.name} {version} does not build {manifest.export.precision}; it builds "
            f"{', '.join(features.precisions)}. Export again with --precision"
        )
    if manifest.export.quantization != "none":
        raise ConfigError(
            f"{manifest.export.quantization} graphs are for ONNX Runtime on CPUs; export without "
            "--quantize to build engines"
        )
    if config.timing_cache is not None and not features.timing_cache:
        raise ConfigError(f"{chosen.name} {version} has no timing cache; leave --timing-cache out")
    targets = target_gpus(config, chosen)
    new = EngineSet(
        flavour=chosen.name,
        version=version,
        compute_capabilities=targets,
        profiles=plan_profiles(limits, read_lengths(config.lengths)),
        attention=ATTENTION,
        workspace_mb=config.workspace_mb,
        engines={},
    )
    jobs = plan_jobs(bundle, new, config.graphs)
    with exclusive(bundle.path), _workplace(bundle.path) as directory:
        old = next((each for each in manifest.engines if each.name == new.name), None)
        specs: dict[str, EngineSpec] = {}
        sources: dict[str, str] = {}
        missing = []
        for job in jobs:
            spec, source = _find(job, old, bundle.path, directory, cache)
            if spec is None:
                missing.append(job)
            else:
                specs[job.graph], sources[job.graph] = spec, source
        failures: dict[str, str] = {}
        if missing:
            names = [job.graph for job in missing]

            def step(graph: str, phase: str, done: int, total: int) -> None:
                number = names.index(graph) + 1
                progress(f"{graph} ({number} of {len(names)}): {phase}", done, total)

            options = worker_options(config, manifest, features, targets)
            for built in run_worker(missing, directory, options, on_step=step):
                if built.problem is not None:
                    failures[built.graph] = built.problem
                    continue
                job = missing[names.index(built.graph)]
                spec = _spec(job, built, new)
                specs[job.graph], sources[job.graph] = spec, "built"
                if cache is not None:
                    cache.put(spec, built.output)
        same_settings = old is not None and dataclasses.replace(old, engines={}) == new
        if old is not None and same_settings:  # keep those that were not asked for
            specs = {**old.engines, **specs}
        new = dataclasses.replace(new, engines=specs)
        # Some engines are better than none, but not better than all of the old ones.
        if new != old and specs and not (failures and old is not None and not same_settings):
            progress("put the engines into the bundle", 0, 0)
            install(bundle, new, directory)
    if failures:
        raise BuildError(_failure_text(bundle, config, limits, new, failures))
    return BuildReport(engines=new, sources=sources)


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
                + ("; take --target tensorrt there" if chosen.name == "tensorrt-rtx" else "")
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
            raise ConfigError(f"{path}: a length is a number of tokens, not {shown(line)}")
    return [int(line) for line in lines]


def plan_jobs(bundle: Bundle, engines: EngineSet, graphs: Sequence[str] = ()) -> list[EngineJob]:
    """Plan the builds of a set.

    Args:
        bundle: the bundle.
        engines: what is to be built, with its profiles.
        graphs: names of graphs; none: all.

    Raises:
        ConfigError: if the bundle has no graph of a name.
        BundleFormatError: if a graph takes something that no profile is known for.
    """
    manifest = bundle.manifest
    unknown = [name for name in graphs if name not in manifest.graphs]
    if unknown:
        raise ConfigError(
            f"the bundle has no graph {', '.join(unknown)}; it has {', '.join(manifest.graphs)}"
        )
    shares = active_shares(manifest, manifest.model.thresholds)
    jobs = []
    for name, spec in manifest.graphs.items():
        if graphs and name not in graphs:
            continue
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
            "attention": engines.attention,
            "flavour": engines.flavour,
            "version": engines.version,
            "compute_capabilities": engines.compute_capabilities,
            "workspace_mb": engines.workspace_mb,
            **_machine(engines),
        }
        canonical = json.dumps(parts, sort_keys=True).encode()
        jobs.append(
            EngineJob(
                graph=name,
                onnx=bundle.path / spec.file,
                profiles=profiles,
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


def worker_options(
    config: BuildConfig, manifest: Manifest, features: trt.Features, targets: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of the worker's job that hold for all graphs."""
    local = [gpu.compute_capability for gpu in driver().gpus[:1]]
    workspace = config.workspace_mb
    return {
        "rtx": config.flavour == "tensorrt-rtx",
        "compute_capabilities": [read_capability(each) for each in targets],
        "gpu_here": bool(set(local) & set(targets)),
        "workspace_bytes": None if workspace is None else workspace << 20,
        "strongly_typed": features.strongly_typed,
        "precision": manifest.export.precision,
        "timing_cache": None if config.timing_cache is None else str(config.timing_cache),
        "pin_timing_cache": config.pin_timing_cache,
    }


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep other builds from a bundle. Windows cannot lock a directory: there nothing is kept out.

    Raises:
        OutputError: if one is under way.
    """
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{directory} cannot be opened: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another build is under way for {directory}: wait until it is done"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _workplace(bundle: Path) -> Iterator[Path]:
    """Yield a folder inside the bundle for engines that are not part of it yet."""
    try:
        (bundle / ENGINES).mkdir(exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=".build-", dir=bundle / ENGINES))
    except OSError as error:
        raise OutputError(f"{bundle} cannot be written: {error}") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds engines, as it mostly does
            (bundle / ENGINES).rmdir()


def _find(
    job: EngineJob,
    old: EngineSet | None,
    bundle: Path,
    directory: Path,
    cache: EngineCache | None,
) -> tuple[EngineSpec | None, str]:
    """Return an engine that need not be built, and where it was found."""
    spec = None if old is None else old.engines.get(job.graph)
    if spec is not None and spec.key == job.key:
        path = bundle / spec.file
        if path.is_file() and sha256(path) == spec.sha256:
            return spec, "bundle"
    if cache is not None:
        return cache.get(job.key, directory / f"{job.graph}.engine"), "cache"
    return None, ""


def _spec(job: EngineJob, built: Built, engines: EngineSet) -> EngineSpec:
    gpus = "_".join(engines.compute_capabilities)
    return EngineSpec(
        graph=job.graph,
        file=f"{ENGINES}/{engines.flavour}-{gpus}-{job.graph}-{job.key[:12]}.engine",
        sha256=sha256(built.output),
        size_bytes=built.output.stat().st_size,
        key=job.key,
        build_s=built.build_s,
        scratch_bytes=built.scratch_bytes,
        n_layers=built.n_layers,
    )


def install(bundle: Bundle, engines: EngineSet, directory: Path) -> None:
    """Move the files of ``engines`` from ``directory`` into the bundle and list them there.

    Files that no set lists any more are removed.

    Raises:
        OutputError: if the bundle was replaced meanwhile, or cannot be written.
    """
    current = Manifest.from_json((bundle.path / MANIFEST).read_bytes())
    if current.files != bundle.manifest.files:
        raise OutputError(
            f"{bundle.path} was exported anew while its engines were built; try again"
        )
    others = [each for each in current.engines if each.name != engines.name]
    manifest = dataclasses.replace(current, engines=(*others, engines))
    try:
        for spec in engines.engines.values():
            made = directory / f"{spec.graph}.engine"
            if made.exists():
                made.replace(bundle.path / spec.file)
        sync_tree(bundle.path / ENGINES)
        write_manifest(bundle.path, manifest)
    except OSError as error:
        raise OutputError(f"{bundle.path} cannot be written: {error}") from error
    listed = {spec.file for each in manifest.engines for spec in each.engines.values()}
    for path in (bundle.path / ENGINES).iterdir():
        if path != directory and path.relative_to(bundle.path).as_posix() not in listed:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _failure_text(
    bundle: Bundle,
    config: BuildConfig,
    limits: BatchLimits,
    engines: EngineSet,
    failures: Mapping[str, str],
) -> str:
    lines = []
    for graph, problem in failures.items():
        command = command_line(bundle.path, config, limits, engines, graph)
        lines.append(
            f"{engines.flavour} {engines.version} could not build {graph}:\n{problem}\n"
            f"to try this one again: {command}"
        )
    if engines.engines:
        lines.append(f"these engines can be used: {', '.join(engines.engines)}")
    return "\n".join(lines)


def command_line(
    bundle: Path, config: BuildConfig, limits: BatchLimits, engines: EngineSet, graph: str
) -> str:
    """Return the command that builds just one engine of a set."""
    words = ["sdt-deploy", "build-engine", str(bundle), "--target", config.flavour]
    for capability in engines.compute_capabilities:
        words += ["--compute-capability", capability]
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if value is not None:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    for name in ("workspace_mb", "lengths", "timing_cache"):
        value = getattr(config, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if config.pin_timing_cache:
        words.append("--pin-timing-cache")
    return shlex.join([*words, "--graph", graph])
