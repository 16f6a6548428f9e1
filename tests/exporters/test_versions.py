"""Builds by versions of TensorRT that are not here: worker and polygraphy are real, the rest fake.

See :mod:`tests.exporters.fake_builder`. The engines run in sessions, with fakes of the version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig, Precision
from sdt_deploy.engines import EngineSet, read_engine
from sdt_deploy.errors import BuildError, ConfigError
from sdt_deploy.exporters import engine_plan
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import Driver, Gpu
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.backends import tensorrt as backend_module
from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend
from sdt_deploy.runtime.session import Session
from tests.exporters.building import built_graphs
from tests.exporters.fake_builder import CRASHING, FAILING, BuildingLibrary, built, graph_of
from tests.runtime.fake_tensorrt import SIGNATURES, VERSIONS
from tests.samples import CONFIGS, ExportedModel, assert_parity, random_batch, random_model

Exported = Callable[[str], ExportedModel]
Fake = Callable[[str], BuildingLibrary]
HERE = Path(__file__).parent
HOPPER = Driver(gpus=(Gpu(name="H100", compute_capability="9.0"),), cuda_version="13.0")
LIMITS = BatchLimits(max_seqlen=20, max_batch=3, max_padded_tokens=40)
FULL = BuildConfig(flavour="tensorrt")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Install a version of TensorRT and an H100, for this process and those that build."""

    def install(number: str) -> BuildingLibrary:
        library = BuildingLibrary(number)
        monkeypatch.setenv("FAKE_TENSORRT", number)
        monkeypatch.setenv(
            "PYTHONPATH", os.pathsep.join([str(HERE / "fakes"), str(HERE.parents[1])])
        )
        monkeypatch.setattr(trt, "installed_version", lambda chosen: VERSIONS[number])
        monkeypatch.setattr(trt, "load", lambda chosen: library)
        for module in (engine_plan, backend_module):
            monkeypatch.setattr(module, "driver", lambda: HOPPER)
        return library

    return install


def copied(found: ExportedModel, directory: Path) -> Bundle:
    return Bundle.open(shutil.copytree(found.bundle, directory / "bundle"))


def asked_of(bundle: Bundle, engines: EngineSet) -> dict[str, SimpleNamespace]:
    return {name: built(read_engine(bundle.path, spec)) for name, spec in engines.engines.items()}


def assert_runs(bundle: Bundle, model: SparseDepthTransformer) -> None:
    """Sessions on the engines agree with the oracle."""
    bundle = Bundle.open(bundle.path)
    with Session(bundle, TensorRtBackend(bundle, "tensorrt", device="cpu")) as session:
        for seed, lengths in enumerate(([9, 2], [1, 13, 6], [20, 20])):
            batch = random_batch(model.config, lengths, seed)
            for path in ("sparse", "masked", "dense"):
                if path == "sparse" or len(lengths) == 2:  # whole models run in no parts
                    assert_parity(session, model, batch, path=path)


BUILT = ("8.6", "10.0", "11.4")
"""Of these versions the others differ in what ``test_features`` sees."""


@pytest.mark.parametrize("number", VERSIONS)
def test_features(number: str) -> None:
    """What a version is said to have is what its bindings have."""
    members = SIGNATURES[number]["members"]
    found = trt.features(trt.flavour("tensorrt"), VERSIONS[number])
    flags = members["NetworkDefinitionCreationFlag"]["__members__"]
    assert found.legacy == ("STRONGLY_TYPED" not in flags)
    assert ("bfloat16" in found.precisions) == ("BF16" in members["DataType"])
    assert found.pins_times == (
        "ERROR_ON_TIMING_CACHE_MISS" in members["BuilderFlag"]["__members__"]
    )
    assert found.fused_attention == ("add_attention" in members["INetworkDefinition"])
    forms = members.get("AttentionIOForm", {}).get("__members__", {})
    assert found.packed_attention == ("PACKED_NHD" in forms)
    assert trt.reports_progress(BuildingLibrary(number)) == ("IProgressMonitor" in members)


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
@pytest.mark.parametrize("number", BUILT)
def test_a_bundle_is_built_and_run(
    fake: Fake, exported: Exported, tmp_path: Path, number: str, name: str
) -> None:
    library, found = fake(number), exported(name)
    bundle = copied(found, tmp_path)
    steps: list[str] = []
    report = build_engines(bundle, FULL, LIMITS, progress=lambda what, *_: steps.append(what))
    assert list(report.engines.engines) == built_graphs(bundle)
    assert report.engines.version == VERSIONS[number]
    assert any("Building Engine" in step for step in steps) == (number != "8.6")
    for spec in report.engines.engines.values():
        assert spec.scratch_bytes is not None  # its GPU is here
        assert spec.layers
    assert_runs(bundle, found.model)
    assert {graph for graph, _, _ in library.calls} >= {"entry", "stage-00", "dense", "masked"}


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("number", BUILT)
def test_what_a_version_is_asked_for(
    fake: Fake, tmp_path: Path, number: str, precision: Precision
) -> None:
    """Before version 10 flags allow narrow types and layers are held; then the graph decides."""
    fake(number)
    config = CONFIGS["all-embedding"][0].replace(n_layers=2, thresholds=())
    model = random_model(config, 1)
    export(Checkpoint(model=model), tmp_path / "bundle", ExportConfig(precision=precision))
    bundle = Bundle.open(tmp_path / "bundle")
    wanted = BuildConfig(flavour="tensorrt", workspace_mb=64)
    report = build_engines(bundle, wanted, LIMITS)
    legacy, narrow = number == "8.6", precision == "float16"
    for name, asked in asked_of(bundle, report.engines).items():
        flags = ["FP16", "OBEY_PRECISION_CONSTRAINTS"] if legacy and narrow else []
        assert asked.flags == flags, name  # and not TF32
        typed = "EXPLICIT_BATCH" if legacy else "STRONGLY_TYPED"
        assert asked.network_flags == [typed]
        assert ("PROFILE_SHARING_0806" in asked.preview_features) == legacy
        assert (asked.layers_held > 0) == (legacy and narrow)
        assert asked.pools == {"WORKSPACE": 64 << 20}
        assert asked.max_aux_streams == 0
    caches = [asked.timing_cache for asked in asked_of(bundle, report.engines).values()]
    assert caches == ["+" * n for n in range(len(caches))], "each build knows the times of the last"


def test_fused_attention_sees_no_padding(fake: Fake, tmp_path: Path) -> None:
    """The parser drops the key lengths; the graph it gets has a mask instead."""
    fake("11.4")
    model = random_model(CONFIGS["all-embedding"][0], 2)
    export(Checkpoint(model=model), tmp_path / "bundle", ExportConfig(attention="fused"))
    bundle = Bundle.open(tmp_path / "bundle")
    report = build_engines(bundle, FULL, LIMITS)
    assert report.engines.engines["stage-00"].attention == "fused"
    assert_runs(bundle, model)


@pytest.mark.parametrize("number", BUILT)
def test_a_failure_names_the_operator_and_keeps_the_others(
    fake: Fake, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    fake(number)
    monkeypatch.setenv(FAILING, "stage-01")
    bundle = copied(exported("all-embedding"), tmp_path)
    with pytest.raises(BuildError) as caught:
        build_engines(bundle, FULL, LIMITS)
    text = str(caught.value)
    nodes = onnx.load(bundle.path / "stage-01.onnx", load_external_data=False).graph.node
    ends = [f"{node.op_type} ({node.name})" for node in (nodes[0], nodes[-1])]
    assert (
        f"tensorrt {VERSIONS[number]} could not build stage-01:\noperator: {', '.join(ends)}"
        in text
    )
    assert "Could not find any implementation for node {ForeignNode[" in text
    assert "--graph stage-01" in text
    (engines,) = Bundle.open(bundle.path).manifest.engines
    assert set(engines.engines) == {*built_graphs(bundle)} - {"stage-01"}


def test_a_graph_that_ends_the_process_costs_no_other(
    fake: Fake, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("11.4")
    monkeypatch.setenv(CRASHING, "stage-00 dense")
    bundle = copied(exported("all-embedding"), tmp_path)
    with pytest.raises(BuildError) as caught:
        build_engines(bundle, FULL, LIMITS)
    for graph in ("stage-00", "dense"):
        assert f"could not build {graph}:\nthe process that builds engines ended with -11" in str(
            caught.value
        )
        assert f"--graph {graph}" in str(caught.value)
    (engines,) = Bundle.open(bundle.path).manifest.engines
    assert set(engines.engines) == {*built_graphs(bundle)} - {"stage-00", "dense"}


def test_a_library_that_does_not_start_again_keeps_what_was_built(
    fake: Fake, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a driver that is lost with the first crash."""
    fake("11.4")
    monkeypatch.setenv(CRASHING, "stage-00")
    bundle = copied(exported("all-embedding"), tmp_path)

    def lose(what: str, done: int, total: int) -> None:
        if what.startswith("stage-00"):
            monkeypatch.setenv("FAKE_TENSORRT", "no version")

    with pytest.raises(BuildError) as caught:
        build_engines(bundle, FULL, LIMITS, progress=lose)
    assert "could not build stage-00:\nthe process that builds engines ended with -11" in str(
        caught.value
    )
    assert "could not build stage-01:\nthe process that builds engines ended with 1" in str(
        caught.value
    )
    (engines,) = Bundle.open(bundle.path).manifest.engines
    assert set(engines.engines) == {"entry"}


def test_8_6_has_no_bfloat16(fake: Fake, tmp_path: Path) -> None:
    fake("8.6")
    model = random_model(CONFIGS["all-embedding"][0], 2)
    export(Checkpoint(model=model), tmp_path / "bundle", ExportConfig(precision="bfloat16"))
    with pytest.raises(ConfigError, match=r"8\.6\.1 does not build bfloat16; .* --precision"):
        build_engines(Bundle.open(tmp_path / "bundle"), FULL, LIMITS)


def test_packed_attention(fake: Fake, tmp_path: Path) -> None:
    """Stages have the ragged operator, as NvInfer.h describes it; whole models the padded one."""
    model = random_model(CONFIGS["all-embedding"][0], 2)
    export(Checkpoint(model=model), tmp_path / "bundle", ExportConfig(attention="fused"))
    bundle = Bundle.open(tmp_path / "bundle")
    packed = BuildConfig(flavour="tensorrt", attention="packed")
    for number in ("10.14", "8.6"):
        fake(number)
        with pytest.raises(ConfigError, match=r"no packed attention, tensorrt 11\.1"):
            build_engines(bundle, packed, LIMITS)
    fake("10.13")
    with pytest.raises(ConfigError, match=r"no fused attention, tensorrt 10\.14"):
        build_engines(bundle, FULL, LIMITS)
    fake("11.4")
    engines = build_engines(bundle, packed, LIMITS).engines.engines
    operators = {
        name: {
            node.op_type
            for node in onnx.load_from_string(graph_of(read_engine(bundle.path, spec))).graph.node
        }
        for name, spec in engines.items()
    }
    assert "TRT_Attention" in operators["stage-00"]
    assert "Attention" in operators["dense"]
    assert engines["stage-00"].attention == "packed"
    assert engines["dense"].attention == "fused"
    assert_runs(bundle, model)


def test_an_engine_made_by_other_rewriting_is_not_reused(
    fake: Fake, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(exported("all-embedding").bundle)

    def keys(number: str, attention: str) -> set[str]:
        fake(number)
        engines = EngineSet(
            flavour="tensorrt",
            version=VERSIONS[number],
            compute_capabilities=("9.0",),
            profiles=plan_profiles(LIMITS),
            attention=attention,
            workspace_mb=None,
            engines={},
        )
        return {job.key for job in engine_plan.plan_jobs(bundle, engines, ("stage-00", "head"))}

    cases = [("8.6", "decomposed"), ("11.4", "fused"), ("11.4", "decomposed")]
    now = [keys(*case) for case in cases]
    monkeypatch.setattr(engine_plan, "REVISION", -1)
    kept = [len(keys(*case) & before) for case, before in zip(cases, now, strict=True)]
    assert kept == [0, 1, 2]  # of two: 8.6 rewrites all graphs, fused attention stages


@pytest.mark.parametrize("number", BUILT)
def test_a_timing_cache_is_kept_or_only_read(
    fake: Fake, exported: Exported, tmp_path: Path, number: str
) -> None:
    fake(number)
    bundle, times = copied(exported("all-embedding"), tmp_path), tmp_path / "times"
    graphs = ("entry", "head")
    free = BuildConfig(flavour="tensorrt", timing_cache=times, graphs=graphs)
    first = asked_of(bundle, build_engines(bundle, free, LIMITS).engines)
    assert [asked.timing_cache for asked in first.values()] == ["", "+"]  # one reads the other's
    content = times.read_bytes()
    assert content == b"++"
    pinned = BuildConfig(
        flavour="tensorrt", timing_cache=times, pin_timing_cache=True, graphs=graphs
    )
    bundle = Bundle.open(bundle.path)
    before = sorted(path.name for path in tmp_path.iterdir())
    if number == "8.6":  # which has no BuilderFlag.ERROR_ON_TIMING_CACHE_MISS
        with pytest.raises(ConfigError, match="cannot pin times"):
            build_engines(bundle, pinned, LIMITS)
    else:
        second = asked_of(bundle, build_engines(bundle, pinned, LIMITS).engines)
        for asked in second.values():
            assert asked.timing_cache == "++"
            assert asked.flags == ["ERROR_ON_TIMING_CACHE_MISS"]
    assert times.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_fake_takes_only_what_the_library_would(fake: Fake) -> None:
    """The tests above would pass with fakes that take anything."""
    library: Any = fake("11.4")
    logger = trt.logger(library)
    config = library.Builder(logger).create_builder_config()
    with pytest.raises(AttributeError, match="FP16"):
        config.set_flag(library.BuilderFlag.FP16)
    with pytest.raises(TypeError):
        config.set_memory_pool_limit("WORKSPACE", 1)
    with pytest.raises(AttributeError, match="no max_workspace_size"):
        config.max_workspace_size = 1
    network = library.Builder(logger).create_network()
    with pytest.raises(TypeError):
        library.Builder(logger).build_serialized_network(config, network)
    with pytest.raises(AssertionError):
        config.max_aux_streams = "none"
    real = pytest.importorskip("tensorrt_rtx")
    offered = [name for name in dir(library) if name[0].isupper() and name != "VERSIONS"]
    assert [name for name in offered if not hasattr(real, name)] == []
    old: Any = fake("8.6")
    assert not hasattr(old, "IProgressMonitor")
    with pytest.raises(AttributeError):
        old.Builder(trt.logger(old)).create_builder_config().progress_monitor = None
