"""A bundle's graphs become engines, and the engines a part of the bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle, write_manifest
from sdt_deploy.config import BuildConfig
from sdt_deploy.engines import ENGINES, EngineSet, EngineSpec
from sdt_deploy.errors import BuildError, BundleError, OutputError
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_checks import (
    check_gpus,
    check_library,
    check_model,
    check_others_stay,
    check_timing_cache,
)
from sdt_deploy.exporters.engine_plan import (
    command_line,
    fused_hint,
    pinned_times,
    plan_jobs,
    read_lengths,
    set_attention,
    target_gpus,
    worker_options,
)
from sdt_deploy.exporters.engine_process import Built, EngineJob, run_worker
from sdt_deploy.extras import require
from sdt_deploy.files import sha256, sync_tree

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What ``build_engines`` did."""

    engines: EngineSet
    """All engines of the set as the bundle now lists them."""
    sources: Mapping[str, str]
    """For each graph that was asked for, where its engine came from: ``built``, ``cache`` or
    ``bundle``, which had it already."""
    hint: str | None
    """What would make better engines, in one sentence; None: nothing that is known."""


def build_engines(
    bundle: Bundle,
    config: BuildConfig,
    limits: BatchLimits | None = None,
    *,
    cache: EngineCache | None = None,
    keep_bundle: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> BuildReport:
    """Build engines and put them into the bundle.

    The bundle changes in one step, by its manifest, after all builds; until then, and on any
    exception, it is as it was; the cache keeps what was built by then. If some builds fail the
    others are put into the bundle all the same, unless it has engines for these GPUs that were
    built with other settings.

    Args:
        bundle: the bundle; other processes may run it meanwhile, not build for it.
        config: what to build and for which GPU.
        limits: the largest batches; None: as long as the model's positions.
        cache: engines that need not be built again; None: only the bundle itself.
        keep_bundle: leave the bundle as it is; what is built goes into the cache alone.
        progress: called with what is being done, steps done and steps in all.

    Raises:
        BuildError: if the library could not build some graphs; it names them and says why.
        BundleIntegrityError: if the bundle was removed or exported anew meanwhile.
        BackendError: if the library is too old, or its process ended.
        MissingExtraError: if the library is not installed.
        ConfigError: if the config does not fit the bundle, the engines that it has, the library or
            this machine.
        OutputError: if another build runs on the bundle, or a file cannot be written, the timing
            cache too.
    """
    chosen = trt.flavour(config.flavour)
    manifest = bundle.manifest
    limits = limits or BatchLimits(max_seqlen=manifest.model.max_positions)
    check_model(manifest, limits)
    version = trt.checked_version(chosen)
    check_library(manifest, config, chosen, version)
    check_timing_cache(config)
    features = trt.features(chosen, version)
    targets = target_gpus(config, chosen)
    check_gpus(manifest, chosen, targets)
    new = EngineSet(
        flavour=chosen.name,
        version=version,
        compute_capabilities=targets,
        profiles=plan_profiles(limits, read_lengths(config.lengths)),
        attention=set_attention(config, manifest, chosen, version),
        workspace_mb=config.workspace_mb,
        engines={},
        precision=manifest.export.precision,
    )
    require("onnx", extra=chosen.name, purpose="Building engines")
    jobs = plan_jobs(bundle, new, config.graphs, pinned=pinned_times(config))
    with exclusive(bundle.path), _workplace(bundle.path) as directory:
        present = bundle.current().engines  # another build may have ended since it was opened
        old = next((each for each in present if each.name == new.name), None)
        if not keep_bundle:
            check_others_stay(bundle.path, old, new, config.graphs)
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
            if features.timing_cache and options["timing_cache"] is None:
                times = directory / "kernel-times"  # layers of one topology need the same ones
                times.touch()
                options["timing_cache"] = str(times)
            builds = run_worker(missing, directory, options, on_step=step)
            with contextlib.closing(builds):
                for built in builds:
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
        stays = old if failures and not same_settings else None
        changed = new != old or set(sources.values()) - {"bundle"}
        if changed and specs and stays is None and not keep_bundle:
            progress("put the engines into the bundle", 0, 0)
            made = [graph for graph, source in sources.items() if source != "bundle"]
            install(bundle, new, directory, made)
    if failures:
        folder = None if cache is None else cache.directory
        commands = {
            graph: command_line(
                bundle.path, config, limits, new, graph, folder, keep_bundle=stays is not None
            )
            for graph in failures
        }
        text = _failure_text(new, failures, commands)
        raise BuildError(text if keep_bundle else text + _usable_text(new, failures, stays))
    return BuildReport(engines=new, sources=sources, hint=fused_hint(manifest, features))


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep other builds from a bundle. Windows cannot lock a directory: there nothing is kept out.

    Raises:
        OutputError: if one is under way, or the file system knows no such locks.
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
        except BlockingIOError as error:
            raise OutputError(
                f"another build is under way for {directory}: wait until it is done"
            ) from error
        except OSError as error:  # as on NFS
            raise OutputError(
                f"{directory} cannot be locked, so builds could not be kept apart: {error}. Copy "
                "the bundle to a local file system and build there"
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
        attention=built.attention,
        attention_reason=built.attention_reason,
        scratch_bytes=built.scratch_bytes,
        layers=built.layers,
    )


def install(bundle: Bundle, engines: EngineSet, directory: Path, made: Sequence[str]) -> None:
    """List ``engines`` in the bundle, and move those of the graphs ``made`` there.

    They come from ``directory``. Files that no set lists any more are removed.

    Raises:
        BundleIntegrityError: if the bundle was removed or exported anew since it was opened.
        OutputError: if it cannot be written.
    """
    current = bundle.current()
    others = [each for each in current.engines if each.name != engines.name]
    manifest = dataclasses.replace(current, engines=(*others, engines))
    try:
        for graph in made:
            (directory / f"{graph}.engine").replace(bundle.path / engines.engines[graph].file)
        sync_tree(bundle.path / ENGINES)
        write_manifest(bundle.path, manifest)
    except OSError as error:
        raise OutputError(f"{bundle.path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError, BundleError):  # what is left over is not listed
            _remove_unlisted(bundle, directory)


def _remove_unlisted(bundle: Bundle, directory: Path) -> None:
    """Remove engines that the manifest, as it stands, does not list; ``directory`` stays."""
    listed = {spec.file for each in bundle.current().engines for spec in each.engines.values()}
    for path in (bundle.path / ENGINES).iterdir():
        if path != directory and path.relative_to(bundle.path).as_posix() not in listed:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _failure_text(
    engines: EngineSet, failures: Mapping[str, str], commands: Mapping[str, str]
) -> str:
    """Say what failed, and how each can be tried again."""
    return "\n".join(
        f"{engines.flavour} {engines.version} could not build {graph}:\n{problem}\n"
        f"to try this one again: {commands[graph]}"
        for graph, problem in failures.items()
    )


def _usable_text(engines: EngineSet, failures: Mapping[str, str], stays: EngineSet | None) -> str:
    """Say what can be used; ``stays``: the set that ``engines`` did not replace."""
    usable = [name for name in (stays or engines).engines if stays or name not in failures]
    said = f"\nthese engines can be used: {', '.join(usable)}" if usable else ""
    if stays is not None:
        said += (
            "\nthey are the bundle's former ones, with other settings; of the new ones none was "
            "put into it"
        )
    return said
