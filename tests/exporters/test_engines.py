"""Engines are really built here, ahead of time, by TensorRT-RTX; none is run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sdt_deploy.buckets import BatchLimits, input_shapes, plan_profiles
from sdt_deploy.bundle import MANIFEST, Bundle, Manifest
from sdt_deploy.config import BuildConfig, ExportConfig
from sdt_deploy.engines import ENGINES, EngineSet, read_engine
from sdt_deploy.errors import (
    BackendError,
    BuildError,
    BundleFormatError,
    BundleIntegrityError,
    ConfigError,
    OutputError,
)
from sdt_deploy.exporters import engine_process, tensorrt
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_plan import plan_jobs
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import driver
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import memory_bundle
from tests.samples import CONFIGS, ExportedModel, random_model, sign_bundle

Exported = Callable[[str], ExportedModel]
ADA = BuildConfig(flavour="tensorrt-rtx", compute_capabilities=("8.9",))


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Bundle:
    """A copy of a small bundle with both row sets, to put engines into."""
    return Bundle.open(shutil.copytree(exported("all-embedding").bundle, tmp_path / "bundle"))


def stages_only(bundle: Bundle) -> BuildConfig:
    return dataclasses.replace(ADA, graphs=("stage-00", "stage-01"))


def built_graphs(bundle: Bundle) -> list[str]:
    return [name for name in bundle.manifest.graphs if name != "single"]


def reopened(bundle: Bundle) -> EngineSet:
    engines = Bundle.open(bundle.path).manifest.engines
    assert len(engines) == 1
    return engines[0]


def files_of(bundle: Bundle) -> dict[str, bytes]:
    return {
        path.relative_to(bundle.path).as_posix(): path.read_bytes()
        for path in sorted(bundle.path.rglob("*"))
        if path.is_file()
    }


def no_build(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing had to be built")


def test_all_graphs_become_engines(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    report = build_engines(bundle, ADA, progress=lambda *step: steps.append(step))
    engines = reopened(bundle)
    assert engines == report.engines
    assert list(engines.engines) == built_graphs(bundle)
    assert set(report.sources.values()) == {"built"}
    assert any("stage-01" in what and total > 0 for what, _, total in steps)
    for spec in engines.engines.values():
        content = read_engine(bundle.path, spec)
        assert len(content) == spec.size_bytes > 1000
        assert spec.build_s > 0
    # The bundle runs on the CPU as before.
    with Session.open(bundle.path) as session:
        assert len(session.run([[1, 5, 6, 2]]).output) == 1


def test_an_unchanged_bundle_builds_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = shutil.copytree(bundle.path, tmp_path / "fresh")
    config, cache = stages_only(bundle), EngineCache(tmp_path / "cache")
    build_engines(bundle, config, cache=cache)
    before = files_of(bundle)
    monkeypatch.setattr(tensorrt, "run_worker", no_build)
    again = build_engines(Bundle.open(bundle.path), config, cache=cache)
    assert set(again.sources.values()) == {"bundle"}
    assert files_of(bundle) == before
    # A new export of the same model finds them in the cache.
    other = build_engines(Bundle.open(fresh), config, cache=cache)
    assert set(other.sources.values()) == {"cache"}
    assert {s.sha256 for s in other.engines.engines.values()} == {
        s.sha256 for s in again.engines.engines.values()
    }


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (dataclasses.replace(ADA, workspace_mb=64), None),
        (dataclasses.replace(ADA, compute_capabilities=("8.6",)), None),
        (dataclasses.replace(ADA, compute_capabilities=("8.9", "12.0")), None),
        (ADA, BatchLimits(max_seqlen=24)),
    ],
)
def test_everything_that_matters_is_in_the_key(
    bundle: Bundle, config: BuildConfig, limits: BatchLimits | None
) -> None:
    def keys(config: BuildConfig, limits: BatchLimits | None, version: str = "1.7.1") -> list[str]:
        engines = EngineSet(
            flavour=config.flavour,
            version=version,
            compute_capabilities=config.compute_capabilities,
            profiles=plan_profiles(limits or BatchLimits(max_seqlen=40)),
            attention="decomposed",
            workspace_mb=config.workspace_mb,
            engines={},
        )
        return [job.key for job in plan_jobs(bundle, engines)]

    first = keys(ADA, None)
    assert len(set(first)) == len(first)
    assert keys(ADA, None) == first
    assert not set(keys(config, limits)) & set(first)
    assert not set(keys(ADA, None, version="1.7.2")) & set(first)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    config = CONFIGS["all-embedding"][0].replace(n_layers=1, thresholds=())
    checkpoint = Checkpoint(model=random_model(config, seed=3), provenance={})
    export(checkpoint, tmp_path / "bundle", ExportConfig(precision=precision))  # type: ignore[arg-type]
    bundle = Bundle.open(tmp_path / "bundle")
    build_engines(bundle, ADA)
    assert list(reopened(bundle).engines) == built_graphs(bundle)


@pytest.mark.parametrize("name", ["active-lm", "active-grouped", "all-grouped"])
def test_every_kind_of_stage_builds(name: str, exported: Exported, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(exported(name).bundle, tmp_path / "bundle"))
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(["3"] * 9 + ["12"] * 4))
    config = dataclasses.replace(ADA, lengths=lengths, compute_capabilities=("12.0",))
    build_engines(bundle, config, BatchLimits(max_seqlen=20, max_batch=5))
    assert list(reopened(bundle).engines) == built_graphs(bundle)


def test_stages_are_built_for_the_share_that_is_expected(bundle: Bundle) -> None:
    report = build_engines(bundle, stages_only(bundle))
    jobs = plan_jobs(bundle, report.engines)
    by_name = {job.graph: job.profiles[0] for job in jobs}
    first = by_name["stage-00"]["hidden_states"][1][0]
    last = by_name["stage-02"]["hidden_states"][1][0]
    whole = input_shapes(("n_tokens",), report.engines.profiles[0], active_share=1.0)[1][0]
    assert last < first <= whole
    assert by_name["stage-02"]["context_states"][1][0] == whole


def test_several_gpus_have_sets_of_their_own(bundle: Bundle) -> None:
    config = dataclasses.replace(ADA, graphs=("head",))
    build_engines(bundle, config)
    turing = dataclasses.replace(config, compute_capabilities=("7.5",))
    build_engines(Bundle.open(bundle.path), turing)
    sets = Bundle.open(bundle.path).manifest.engines
    assert [each.compute_capabilities for each in sets] == [("8.9",), ("7.5",)]
    # New settings replace the set of the same GPU, and its files.
    build_engines(Bundle.open(bundle.path), dataclasses.replace(turing, workspace_mb=32))
    sets = Bundle.open(bundle.path).manifest.engines
    assert [each.workspace_mb for each in sets] == [None, 32]
    listed = {spec.file for each in sets for spec in each.engines.values()}
    assert {p.relative_to(bundle.path).as_posix() for p in (bundle.path / ENGINES).iterdir()} == (
        listed
    )


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_interrupted_build_leaves_nothing(bundle: Bundle, at: int) -> None:
    before = files_of(bundle)
    count = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, ADA, progress=interrupt)
    assert files_of(bundle) == before
    assert not (bundle.path / ENGINES).exists()


def test_a_closed_pipe_cancels_the_build(bundle: Bundle, tmp_path: Path) -> None:
    """The worker must not go on when the process that started it was killed."""
    report = build_engines(bundle, stages_only(bundle))
    job = next(job for job in plan_jobs(bundle, report.engines) if job.graph == "dense")
    output = tmp_path / "dense.engine"
    request = {
        "rtx": True,
        "compute_capabilities": [[8, 9]],
        "gpu_here": False,
        "workspace_bytes": None,
        "strongly_typed": True,
        "precision": "float32",
        "timing_cache": None,
        "pin_timing_cache": False,
        "graphs": [
            {
                "name": job.graph,
                "onnx": str(job.onnx),
                "output": str(output),
                "profiles": job.profiles,
            }
        ]
        * 20,
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "sdt_deploy.exporters.engine_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(request).encode())
    worker.stdin.close()
    assert worker.stdout.readline()
    worker.stdout.close()
    worker.wait(timeout=60)
    assert not output.exists()


def break_graph(bundle: Bundle, graph: str) -> Bundle:
    path = bundle.path / f"{graph}.onnx"
    proto = onnx.load(path, load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "Softmax").op_type = "Sharpmax"
    onnx.save(proto, path)
    sign_bundle(bundle.path)
    return Bundle.open(bundle.path)


def test_a_failed_build_is_named_and_the_others_can_be_used(bundle: Bundle) -> None:
    broken = break_graph(bundle, "stage-01")
    config = dataclasses.replace(ADA, graphs=("stage-00", "stage-01", "head"))
    with pytest.raises(BuildError) as error:
        build_engines(broken, config, BatchLimits(max_seqlen=24))
    text = str(error.value)
    assert "could not build stage-01" in text
    assert "Sharpmax" in text
    assert (
        f"sdt-deploy build-engine {bundle.path} --target tensorrt-rtx --compute-capability 8.9 "
        "--max-seqlen 24 --max-batch 64 --max-padded-tokens 8192 --graph stage-01"
    ) in text
    assert list(reopened(broken).engines) == ["stage-00", "head"]
    # Nor do some new engines replace a whole set that was built with other settings.
    before = files_of(broken)
    with pytest.raises(BuildError):
        build_engines(Bundle.open(bundle.path), config, BatchLimits(max_seqlen=32))
    assert files_of(broken) == before


def test_too_little_workspace_is_a_failed_build(bundle: Bundle) -> None:
    before = files_of(bundle)
    config = dataclasses.replace(ADA, workspace_mb=1, graphs=("stage-00",))
    limits = BatchLimits(max_seqlen=40, max_batch=512, max_padded_tokens=20480)
    with pytest.raises(BuildError, match="workspace"):
        build_engines(bundle, config, limits)
    assert files_of(bundle) == before


def test_a_full_disk(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(bundle)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "sync_tree", full)
        with pytest.raises(OutputError, match="No space left"):
            build_engines(bundle, stages_only(bundle))
    # Engines that came first may lie there; the manifest does not know them.
    kept = files_of(bundle)
    assert {name: kept[name] for name in before} == before
    build_engines(bundle, stages_only(bundle))
    assert len(list((bundle.path / ENGINES).iterdir())) == 2


def test_an_altered_engine_is_refused_and_built_again(bundle: Bundle) -> None:
    config = dataclasses.replace(ADA, graphs=("head",))
    spec = build_engines(bundle, config).engines.engines["head"]
    path = bundle.path / spec.file
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(bytes(altered))
        with pytest.raises(BundleIntegrityError, match="altered"):
            read_engine(bundle.path, spec)
    path.write_bytes(content[:-1])
    with pytest.raises(BundleIntegrityError, match="altered"):
        read_engine(bundle.path, spec)
    path.write_bytes(content + b"x")
    with pytest.raises(BundleIntegrityError, match="cannot be read"):
        read_engine(bundle.path, spec)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(BundleIntegrityError):
        read_engine(bundle.path, spec)
    path.unlink()
    assert build_engines(Bundle.open(bundle.path), config).sources == {"head": "built"}
    assert read_engine(bundle.path, reopened(bundle).engines["head"])


def test_a_damaged_cache_is_not_used(bundle: Bundle, tmp_path: Path) -> None:
    config, cache = dataclasses.replace(ADA, graphs=("head",)), EngineCache(tmp_path / "cache")
    fresh = shutil.copytree(bundle.path, tmp_path / "fresh")
    build_engines(bundle, config, cache=cache)
    (engine,) = (tmp_path / "cache").glob("*.engine")
    engine.write_bytes(engine.read_bytes()[:-1] + b"!")
    assert build_engines(Bundle.open(fresh), config, cache=cache).sources == {"head": "built"}


def test_two_builds_at_once(bundle: Bundle) -> None:
    with tensorrt.exclusive(bundle.path), pytest.raises(OutputError, match="under way"):
        build_engines(bundle, ADA)
    assert build_engines(bundle, stages_only(bundle)).sources


def test_a_bundle_that_was_exported_anew_meanwhile(bundle: Bundle) -> None:
    stale = Bundle(path=bundle.path, manifest=bundle.manifest)
    break_graph(bundle, "stage-02")
    with pytest.raises(OutputError, match="exported anew"):
        build_engines(stale, stages_only(bundle))
    assert not Bundle.open(bundle.path).manifest.engines


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        EngineCache(tmp_path / "file")


def test_a_worker_that_dies(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'segmentation fault' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr(engine_process.sys, "executable", str(script))
    with pytest.raises(BackendError, match=r"ended with 139(.|\n)*segmentation fault"):
        build_engines(bundle, stages_only(bundle))
    assert not (bundle.path / ENGINES).exists()


@pytest.mark.parametrize(
    ("config", "limits", "message"),
    [
        (
            dataclasses.replace(ADA, compute_capabilities=("9.0",)),
            None,
            "not 9.0; take --target tensorrt there",
        ),
        (dataclasses.replace(ADA, compute_capabilities=("8.9a",)), None, "is written like 8.9"),
        (
            dataclasses.replace(ADA, graphs=("stage-77",)),
            None,
            "no graph stage-77 to build; it has entry",
        ),
        (dataclasses.replace(ADA, timing_cache=Path("t")), None, "no timing cache"),
        (ADA, BatchLimits(max_seqlen=41), "exceeds the model's 40 positions"),
    ],
)
def test_bad_configurations(
    bundle: Bundle, config: BuildConfig, limits: BatchLimits | None, message: str
) -> None:
    before = files_of(bundle)
    with pytest.raises(ConfigError, match=message):
        build_engines(bundle, config, limits)
    assert files_of(bundle) == before


def test_no_gpu_to_build_for(bundle: Bundle) -> None:
    if driver().gpus:
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="name the GPU to build for"):
        build_engines(bundle, BuildConfig(flavour="tensorrt-rtx"))


def test_lengths_that_are_none(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    path.write_text("3\nfour\n")
    with pytest.raises(ConfigError, match="not 'four'"):
        build_engines(bundle, dataclasses.replace(ADA, lengths=path))


def test_int8_graphs_are_not_for_engines() -> None:
    model = random_model(CONFIGS["all-embedding"][0], seed=3)
    with pytest.raises(ConfigError, match="without --quantize"):
        build_engines(memory_bundle(model, ExportConfig(quantization="int8")), ADA)


@pytest.mark.parametrize(
    "change",
    [
        lambda engines: engines[0].update(flavour="tensorflow"),
        lambda engines: engines[0].update(profiles=[]),
        lambda engines: engines[0].update(compute_capabilities="8.9"),
        lambda engines: engines[0].update(extra=1),
        lambda engines: engines[0]["engines"]["head"].update(file="engines/../weights.bin"),
        lambda engines: engines[0]["engines"]["head"].update(file="/etc/passwd"),
        lambda engines: engines[0]["engines"]["head"].update(sha256="0"),
        lambda engines: engines[0]["engines"]["head"].update(graph="entry"),
        lambda engines: engines[0]["engines"].update(tail=engines[0]["engines"]["head"]),
        lambda engines: engines.append(engines[0]),
    ],
)
def test_engines_in_a_manifest_are_checked(bundle: Bundle, change: Callable[[Any], None]) -> None:
    build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)))

    def alter(body: Any) -> None:
        for name in [name for name in body["files"] if name.startswith(ENGINES)]:
            del body["files"][name]
        change(body["engines"])

    sign_bundle(bundle.path, alter)
    with pytest.raises(BundleFormatError):
        Bundle.open(bundle.path)


def test_a_manifest_without_engines_is_read(bundle: Bundle) -> None:
    sign_bundle(bundle.path, lambda body: body.pop("engines"))
    assert Bundle.open(bundle.path).manifest.engines == ()
    content = (bundle.path / MANIFEST).read_bytes()
    assert Manifest.from_json(content).engines == ()
