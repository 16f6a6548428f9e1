"""Engines on a GPU: `pytest -m gpu tests/gpu`. What is not installed is skipped by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig
from sdt_deploy.diagnosis import diagnose
from sdt_deploy.errors import BackendError, ConfigError
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import driver
from sdt_deploy.runtime.session import Session
from tests.samples import CONFIGS, ExportedModel, assert_parity, random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(driver().problem), reason=f"{driver().problem}"),
]
Exported = Callable[[str], ExportedModel]
LIMITS = BatchLimits(max_seqlen=29, max_batch=8, max_padded_tokens=232)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("flavour", trt.FLAVOURS)
def test_parity_with_the_oracle(
    exported: Exported, tmp_path: Path, name: str, flavour: str
) -> None:
    pytest.importorskip(trt.flavour(flavour).module)
    supported = trt.flavour(flavour).compute_capabilities
    if supported is not None and driver().gpus[0].compute_capability not in supported:
        pytest.skip(f"{flavour} does not run on {driver().gpus[0].name}")
    sample = exported(name)
    bundle = Bundle.open(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    build_engines(bundle, BuildConfig(flavour=flavour), LIMITS)  # type: ignore[arg-type]
    with Session.open(bundle.path, backend=flavour) as session:
        for seed, lengths in enumerate(([1], [20, 3], [7, 12, 1, 20, 20, 2, 5], [29] * 9)):
            batch = random_batch(sample.model.config, list(lengths), seed=seed)
            for path in ("sparse", "masked"):
                assert_parity(session, sample.model, batch, path=path)


def test_rtx_refuses_a_gpu_that_it_does_not_run_on(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    here = driver().gpus[0].compute_capability
    supported = trt.flavour("tensorrt-rtx").compute_capabilities
    assert supported is not None
    if here in supported:
        pytest.skip(f"TensorRT-RTX runs on {driver().gpus[0].name}")
    bundle = Bundle.open(shutil.copytree(exported("active-lm").bundle, tmp_path / "bundle"))
    with pytest.raises(ConfigError, match=f"not {here}; take --target tensorrt there"):
        build_engines(bundle, BuildConfig(flavour="tensorrt-rtx"), LIMITS)
    build_engines(
        bundle, BuildConfig(flavour="tensorrt-rtx", compute_capabilities=("8.9",)), LIMITS
    )
    with pytest.raises(BackendError, match="does not run on it at all"):
        Session.open(bundle.path, backend="tensorrt-rtx")
    (row,) = [row for row in diagnose() if row.backend == "tensorrt-rtx"]
    assert row.builds
    assert not row.runs
    assert here in row.remark
