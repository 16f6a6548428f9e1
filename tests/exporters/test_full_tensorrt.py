"""What of full TensorRT is decided before a build: pinned kernel times, its own GPU, its graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig
from sdt_deploy.engines import EngineSet
from sdt_deploy.errors import ConfigError
from sdt_deploy.exporters import engine_plan, engine_worker
from sdt_deploy.exporters.engine_plan import plan_jobs
from sdt_deploy.exporters.restore import restore
from sdt_deploy.exporters.tensorrt import BatchLimits, build_engines
from sdt_deploy.exporters.verify import verify_graph
from sdt_deploy.gpu import Driver, Gpu
from tests.samples import CONFIGS, ExportedModel

Exported = Callable[[str], ExportedModel]
HOPPER = Driver(gpus=(Gpu(name="H100", compute_capability="9.0"),), cuda_version="13.0")


@pytest.fixture(autouse=True)
def full_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT and an H100, as far as a plan asks for them."""
    monkeypatch.setattr(trt, "checked_version", lambda chosen: "11.4.0.106")
    monkeypatch.setattr(engine_plan, "driver", lambda: HOPPER)


def test_a_pinned_timing_cache_is_in_the_key_and_has_to_exist(
    exported: Exported, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))
    engines = EngineSet(
        flavour="tensorrt",
        version="11.4.0.106",
        compute_capabilities=("9.0",),
        profiles=plan_profiles(BatchLimits(max_seqlen=33)),
        attention="decomposed",
        workspace_mb=None,
        engines={},
    )
    times = tmp_path / "times"
    config = BuildConfig(flavour="tensorrt", timing_cache=times, pin_timing_cache=True)
    with pytest.raises(ConfigError, match=r"times cannot be read.*without --pin-timing-cache"):
        build_engines(bundle, config)
    keys = set()
    for content in (b"a", b"b"):
        times.write_bytes(content)
        pinned = engine_plan.pinned_times(config)
        keys |= {job.key for job in plan_jobs(bundle, engines, ("head",), pinned=pinned)}
    free = BuildConfig(flavour="tensorrt", timing_cache=times)
    assert engine_plan.pinned_times(free) is None
    keys |= {job.key for job in plan_jobs(bundle, engines, ("head",))}
    assert len(keys) == 3


def test_full_tensorrt_builds_for_its_own_gpu_only(exported: Exported) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    config = BuildConfig(flavour="tensorrt", compute_capabilities=("8.9",))
    with pytest.raises(ConfigError, match=r"runs the engines, 9.0 here, not for 8.9; tensorrt-rtx"):
        build_engines(bundle, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_for_8_6_say_the_same_in_what_its_parser_knows(
    exported: Exported, tmp_path: Path, name: str
) -> None:
    """Opset 17, no part of a shape, and axes as attributes; the export's own check still passes."""
    # A copy: the rewritten graph links the weights, and others share what was exported.
    bundle = Bundle.open(shutil.copytree(exported(name).bundle, tmp_path / "bundle"))
    model = restore(bundle)
    made = tmp_path / "made"
    made.mkdir()
    for graph, spec in bundle.manifest.graphs.items():
        if graph == "single":
            continue
        path = engine_worker.adapted(bundle.file(spec.file), made, None, legacy=True)
        proto = onnx.load(path, load_external_data=False)
        assert [each.version for each in proto.opset_import] == [17]
        for node in proto.graph.node:
            assert node.op_type != "Shape" or not node.attribute
            assert node.op_type != "ReduceMax" or len(node.input) == 1
        verify_graph(path, graph, spec.layers, model, bundle.manifest.export)
