"""Comparing engines with the oracle. Runners of polygraphy for ONNX Runtime stand for engines."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from polygraphy.backend.onnxrt import OnnxrtRunner

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig
from sdt_deploy.engines import EngineSpec
from sdt_deploy.errors import BackendError, ConfigError
from sdt_deploy.exporters.engine_accuracy import compare, compare_engines
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.gpu import driver
from sdt_deploy.ort import open_session
from sdt_deploy.testing import memory_bundle
from tests.exporters.building import ADA, reopened
from tests.samples import CONFIGS, TOLERANCE, ExportedModel, random_model
from tests.test_cli import call


@pytest.mark.parametrize("attention", ["decomposed", "fused"])
def test_engines_are_judged_as_graphs_are(
    exported: Callable[[str], ExportedModel],
    fused: Callable[[str], ExportedModel],
    tmp_path: Path,
    attention: str,
) -> None:
    sample = (fused if attention == "fused" else exported)("all-embedding")
    bundle = Bundle.open(shutil.copytree(sample.bundle, tmp_path / "bundle"))
    graphs = ("entry", "stage-00", "stage-01", "head", "masked")
    report = build_engines(bundle, dataclasses.replace(ADA, graphs=graphs))

    def right(bundle: Bundle, spec: EngineSpec) -> Any:
        return OnnxrtRunner(open_session(bundle.path / f"{spec.graph}.onnx"))

    errors, problems = compare(bundle, report.engines, graphs, right)
    assert not problems
    assert list(errors) == list(graphs)
    assert all(error < TOLERANCE for error in errors.values())

    def wrong(bundle: Bundle, spec: EngineSpec) -> Any:
        name = spec.graph.replace("stage-01", "stage-02")
        return OnnxrtRunner(open_session(bundle.path / f"{name}.onnx"))

    errors, problems = compare(bundle, report.engines, graphs, wrong)
    assert list(errors) == [name for name in graphs if name != "stage-01"]
    (problem,) = problems
    assert "graph stage-01 deviates by" in problem
    assert "the engine of tensorrt-rtx for 8.9" in problem


def test_an_engine_that_cannot_be_loaded(bundle: Bundle) -> None:
    """Here there is no driver; the library's reason is in the error."""
    if driver().gpus:
        pytest.skip("there is a GPU here")
    build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)))
    with pytest.raises(BackendError, match=r"ended with 1:(.|\n)*CUDA"):
        compare_engines(Bundle.open(bundle.path), reopened(bundle))


def test_the_command_says_why_it_cannot(bundle: Bundle, tmp_path: Path) -> None:
    if driver().gpus:
        pytest.skip("there is a GPU here")
    options = ("--target", "tensorrt-rtx", "--compute-capability", "8.9", "--graph", "head")
    cache = ("--cache", tmp_path / "cache")
    error = call("build-engine", bundle.path, *options, *cache, "--compare", code=2)
    assert "tensorrt-rtx engines need a GPU" in error
    assert list(reopened(bundle).engines) == ["head"]


def test_bfloat16_is_refused() -> None:
    model = random_model(CONFIGS["active-lm"][0], seed=1)
    bundle = memory_bundle(model, ExportConfig(precision="bfloat16"))
    with pytest.raises(ConfigError, match="compare the session: sdt-deploy verify"):
        compare_engines(bundle, SimpleNamespace(flavour="tensorrt"))  # type: ignore[arg-type]
