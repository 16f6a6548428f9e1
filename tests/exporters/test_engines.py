"""Engines are really built here, ahead of time, by TensorRT-RTX; none is run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdt_deploy.buckets import BatchLimits, input_shapes, plan_profiles
from sdt_deploy.bundle import WEIGHTS, Bundle
from sdt_deploy.config import ExportConfig, Precision
from sdt_deploy.engines import ENGINES, EngineSet, read_engine
from sdt_deploy.errors import BuildError, ConfigError
from sdt_deploy.exporters import engine_plan, tensorrt
from sdt_deploy.exporters.engine_cache import EngineCache
from sdt_deploy.exporters.engine_plan import plan_jobs
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import Driver, Gpu
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from tests.exporters.building import (
    ADA,
    built_graphs,
    files_of,
    no_build,
    reopened,
    stages_only,
)
from tests.samples import CONFIGS, ExportedModel, random_model

Exported = Callable[[str], ExportedModel]


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


def other_file(bundle: Bundle, name: str) -> Bundle:
    files = {**bundle.manifest.files, name: {**bundle.manifest.files[name], "sha256": "0" * 64}}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))


def other_export(bundle: Bundle, **changes: Any) -> Bundle:
    export = dataclasses.replace(bundle.manifest.export, **changes)
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, export=export))


HOPPER = Driver(gpus=(Gpu(name="H100", compute_capability="9.0"),), cuda_version="13.0")
H200 = Driver(gpus=(Gpu(name="H200", compute_capability="9.0"),), cuda_version="13.0")
CHANGES: dict[str, dict[str, Any]] = {
    "graph": {"bundle": lambda bundle: other_file(bundle, "stage-00.onnx")},
    "weights": {"bundle": lambda bundle: other_file(bundle, WEIGHTS)},
    "precision": {"bundle": lambda bundle: other_export(bundle, precision="float16")},
    "profiles": {"profiles": plan_profiles(BatchLimits(max_seqlen=24))},
    "attention": {"attention": "fused"},
    "flavour": {"flavour": "tensorrt-rtx"},
    "version": {"version": "11.4.1"},
    "compute_capabilities": {"compute_capabilities": ("8.9",)},
    "several": {"compute_capabilities": ("8.9", "9.0")},
    "workspace_mb": {"workspace_mb": 64},
    "timing_cache": {"pinned": "1" * 64},
    "gpu": {"driver": H200},
    "driver": {"driver": dataclasses.replace(HOPPER, cuda_version="13.1")},
}


@pytest.mark.parametrize("member", CHANGES)
def test_everything_that_matters_is_in_the_key(
    bundle: Bundle, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = EngineSet(
        flavour="tensorrt",
        version="11.4.0",
        compute_capabilities=("9.0",),
        profiles=plan_profiles(BatchLimits(max_seqlen=40)),
        attention="decomposed",
        workspace_mb=None,
        engines={},
    )

    def keys(change: dict[str, Any]) -> dict[str, str]:
        change = dict(change)
        other = change.pop("bundle", lambda same: same)(bundle)
        here, pinned = change.pop("driver", HOPPER), change.pop("pinned", None)
        monkeypatch.setattr(engine_plan, "driver", lambda: here)
        jobs = plan_jobs(other, dataclasses.replace(engines, **change), pinned=pinned)
        return {job.graph: job.key for job in jobs}

    first, changed = keys({}), keys(CHANGES[member])
    assert len(set(first.values())) == len(first)
    assert keys({}) == first
    differing = {graph for graph in first if first[graph] != changed[graph]}
    graphs = {"graph": {"stage-00"}, "attention": {*first} - {"entry", "head"}}
    assert differing == graphs.get(member, {*first})


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precisions(precision: str, tmp_path: Path) -> None:
    config = CONFIGS["all-embedding"][0].replace(n_layers=1, thresholds=(), max_positions=130)
    checkpoint = Checkpoint(model=random_model(config, seed=3), provenance={})
    export(checkpoint, tmp_path / "bundle", ExportConfig(precision=precision))  # type: ignore[arg-type]
    bundle = Bundle.open(tmp_path / "bundle")
    build_engines(bundle, ADA)
    assert list(reopened(bundle).engines) == built_graphs(bundle)
    assert [profile.max_seqlen.max for profile in reopened(bundle).profiles] == [32, 72, 130]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_turing_takes_float16_only(precision: Precision, tmp_path: Path) -> None:
    """The library itself is asked too, behind the check's back, for a real stage."""
    config = CONFIGS["all-embedding"][0].replace(n_layers=1, thresholds=())
    checkpoint = Checkpoint(model=random_model(config, seed=3))
    export(checkpoint, tmp_path / "bundle", ExportConfig(precision=precision))
    bundle = Bundle.open(tmp_path / "bundle")
    turing = dataclasses.replace(ADA, compute_capabilities=("7.5",), graphs=("stage-00",))
    if precision == "float16":
        build_engines(bundle, turing)
        assert list(reopened(bundle).engines) == ["stage-00"]
        return
    message = f"does not build {precision} stages for compute capability 7.5, only float16"
    with pytest.raises(ConfigError, match=message):
        build_engines(bundle, turing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "check_gpus", lambda *_: None)
        with pytest.raises(BuildError, match=r"Turing|sm75") as error:
            build_engines(bundle, turing)
    # The library names a node of what it cannot compile, or none.
    assert ("operator: MatMul (node_" in str(error.value)) == (precision == "float32")


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
    ampere = dataclasses.replace(config, compute_capabilities=("8.6",))
    build_engines(Bundle.open(bundle.path), ampere)
    sets = Bundle.open(bundle.path).manifest.engines
    assert [each.compute_capabilities for each in sets] == [("8.9",), ("8.6",)]
    # New settings replace the set of the same GPU, and its files.
    build_engines(Bundle.open(bundle.path), dataclasses.replace(ampere, workspace_mb=32))
    sets = Bundle.open(bundle.path).manifest.engines
    assert [each.workspace_mb for each in sets] == [None, 32]
    listed = {spec.file for each in sets for spec in each.engines.values()}
    assert {p.relative_to(bundle.path).as_posix() for p in (bundle.path / ENGINES).iterdir()} == (
        listed
    )
