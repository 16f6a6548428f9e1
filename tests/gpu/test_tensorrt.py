"""Engines on a GPU: `pytest -m gpu tests/gpu`. What is not installed is skipped by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, EngineFlavour, ExportConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.exporters.engine_accuracy import compare_engines
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import driver
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.runtime.session import Session
from tests.gpu import rtx_refusal
from tests.samples import (
    CONFIGS,
    ExportedModel,
    assert_parity,
    deviation,
    in_threads,
    random_batch,
    random_model,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(driver().problem), reason=f"{driver().problem}"),
]
Exported = Callable[[str], ExportedModel]
LIMITS = BatchLimits(max_seqlen=29, max_batch=8, max_padded_tokens=232)
LENGTHS = ([1], [20, 3], [7, 12, 1, 20, 20, 2, 5], [29] * 9)


def skip_where_it_does_not_run(flavour: str) -> None:
    pytest.importorskip(trt.flavour(flavour).module)
    supported = trt.flavour(flavour).compute_capabilities
    if supported is not None and driver().gpus[0].compute_capability not in supported:
        pytest.skip(f"{flavour} does not run on {driver().gpus[0].name}")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("flavour", trt.FLAVOURS)
def test_parity_with_the_oracle(
    exported: Exported, tmp_path: Path, name: str, flavour: EngineFlavour
) -> None:
    skip_where_it_does_not_run(flavour)
    sample = exported(name)
    bundle = Bundle.open(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    build_engines(bundle, BuildConfig(flavour=flavour), LIMITS)
    reopened = Bundle.open(bundle.path)
    for spec in reopened.manifest.engines[0].engines.values():
        assert spec.layers
        assert spec.scratch_bytes is not None
    errors = compare_engines(reopened, reopened.manifest.engines[0])
    assert list(errors) == [graph for graph in bundle.manifest.graphs if graph != "single"]
    with Session.open(bundle.path, backend=flavour) as session:
        for seed, lengths in enumerate(LENGTHS):
            batch = random_batch(sample.model.config, list(lengths), seed=seed)
            for path in ("sparse", "masked", "dense"):
                if path == "sparse" or LIMITS.max_batch >= len(lengths):  # dense has no parts
                    assert_parity(session, sample.model, batch, path=path)


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        (ExportConfig(precision="float16"), 2e-2),
        (ExportConfig(attention="fused"), 2e-4),
        (ExportConfig(attention="fused", precision="float16"), 2e-2),
    ],
    ids=["float16", "fused", "fused-float16"],
)
@pytest.mark.parametrize("flavour", trt.FLAVOURS)
def test_other_forms_agree_with_the_oracle(
    tmp_path: Path, name: str, form: ExportConfig, tolerance: float, flavour: EngineFlavour
) -> None:
    """Half precision and fused attention, which runs in the loop for devices."""
    skip_where_it_does_not_run(flavour)
    chosen = trt.flavour(flavour)
    found = trt.features(chosen, pytest.importorskip(chosen.module).__version__)
    if form.attention == "fused" and not found.fused_attention:
        pytest.skip("this version has no fused attention")
    model = random_model(CONFIGS[name][0], seed=5)
    export(Checkpoint(model=model, provenance={}), tmp_path / "bundle", form)
    bundle = Bundle.open(tmp_path / "bundle")
    build_engines(bundle, BuildConfig(flavour=flavour), LIMITS)
    reopened = Bundle.open(bundle.path)
    compare_engines(reopened, reopened.manifest.engines[0])
    flips = 0
    with Session.open(bundle.path, backend=flavour) as session:
        for seed, lengths in enumerate(LENGTHS):
            batch = random_batch(model.config, list(lengths), seed=seed)
            for path in ("sparse", "masked"):
                error, n_flips = deviation(model, batch, session.run_batch(batch, path=path))
                assert error < tolerance, (lengths, path)
                flips += n_flips
    assert flips == 0, "scores are float32 in every form"


@pytest.mark.parametrize("flavour", trt.FLAVOURS)
def test_streams_and_threads(exported: Exported, tmp_path: Path, flavour: EngineFlavour) -> None:
    """Threads with streams of their own have contexts and scratch memory of their own."""
    torch = pytest.importorskip("torch")
    skip_where_it_does_not_run(flavour)
    sample = exported("all-embedding")
    bundle = Bundle.open(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    build_engines(bundle, BuildConfig(flavour=flavour), LIMITS)
    with Session.open(bundle.path, backend=flavour) as session:

        def work(seed: int) -> None:
            batch = random_batch(sample.model.config, [9, 29, 4, 17], seed=seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert_parity(session, sample.model, batch)

        in_threads(8, work)


def test_rtx_refuses_a_gpu_that_it_does_not_run_on(exported: Exported) -> None:
    """It ends in errors that name the GPU, and not in a crash, the library's own refusal too."""
    pytest.importorskip("tensorrt_rtx")
    gpu, supported = driver().gpus[0], trt.flavour("tensorrt-rtx").compute_capabilities
    assert supported is not None
    if gpu.compute_capability in supported:
        pytest.skip(f"TensorRT-RTX runs on {gpu.name}")
    steps = rtx_refusal.steps(exported("active-lm").bundle)
    assert steps["made"]["engines"] == ["entry", "head", "stage-00"]
    assert steps["open"]["error"] == "BackendError"
    for part in (
        "are for compute capability 8.9",
        f"this GPU, {gpu.name}, has {gpu.compute_capability}",
        "does not run on it at all; use tensorrt",
    ):
        assert part in steps["open"]["message"]
    assert steps["doctor"]["builds"]
    assert not steps["doctor"]["runs"]
    assert (
        f"{gpu.name} has compute capability {gpu.compute_capability}" in steps["doctor"]["remark"]
    )
    assert steps["load"]["error"] == "BackendError"
    assert "stage-00" in steps["load"]["message"]
    assert len(steps["load"]["message"].splitlines()) > 1, "the library's reason is missing"
    assert steps["build"]["error"] == "BuildError"
    assert "9.0" in steps["build"]["message"]


def test_rtx_does_not_build_for_this_gpu(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    here = driver().gpus[0].compute_capability
    if here in (trt.flavour("tensorrt-rtx").compute_capabilities or ()):
        pytest.skip(f"TensorRT-RTX builds for {driver().gpus[0].name}")
    bundle = Bundle.open(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))
    with pytest.raises(ConfigError, match=f"not {here}; take --target tensorrt there"):
        build_engines(bundle, BuildConfig(flavour="tensorrt-rtx"), LIMITS)
