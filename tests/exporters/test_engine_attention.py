"""Fused and packed attention in engines: the graphs that TensorRT gets, and what it builds."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig
from sdt_deploy.errors import BuildError, ConfigError, ExportError
from sdt_deploy.exporters import engine_plan
from sdt_deploy.exporters.cases import stage_case
from sdt_deploy.exporters.engine_graphs import (
    decomposed_attention,
    masked_attention,
    packed_attention,
)
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.tensorrt import build_engines
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.testing import memory_bundle
from tests.exporters.building import ADA, built_graphs, reopened
from tests.runtime.ragged import TRT_Attention
from tests.samples import CONFIGS, TOLERANCE, ExportedModel, random_model, sign_bundle
from tests.test_cli import call

Fused = Callable[[str], ExportedModel]
LIMITS = BatchLimits(max_seqlen=24, max_batch=8, max_padded_tokens=192)


ADAPTED = {
    "masked": masked_attention,
    "packed": packed_attention,
    "decomposed": decomposed_attention,
}


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
@pytest.mark.parametrize("form", ADAPTED)
@pytest.mark.parametrize("lengths", [[9], [1, 12, 5], [4, 20, 7, 7, 2]])
def test_adapted_stages_agree_with_the_oracle(
    fused: Fused, name: str, form: str, lengths: list[int]
) -> None:
    """Sequences without active tokens, and rows and places of a bucket that nothing fills."""
    sample = fused(name)
    path = sample.bundle / "stage-01.onnx"
    proto = ADAPTED[form](onnx.load(path))
    left = [node for node in proto.graph.node if node.op_type == "Attention"]
    assert bool(left) == (form == "masked")
    assert not any(len(node.input) > 4 for node in left)
    rng = np.random.default_rng(sum(lengths))
    inputs, expected = stage_case(sample.model, (1, 2), "fused", np.array(lengths), rng)
    evaluator = ReferenceEvaluator(proto, new_ops=[TRT_Attention])
    (wanted,) = expected["updated_states"].detach().numpy()
    for padded in (inputs, _in_a_larger_bucket(inputs)):
        ((found,),) = evaluator.run(None, padded)
        np.testing.assert_allclose(found[: len(wanted)], wanted, rtol=0, atol=TOLERANCE)


def _in_a_larger_bucket(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """More rows, places and sequences than there are tokens; indices hold 0 there."""
    gather, scatter = inputs["gather_index"], inputs["scatter_index"]
    longest = gather.shape[1]
    rows = scatter // longest * (longest + 3) + scatter % longest
    made = {
        **inputs,
        "gather_index": np.pad(gather, ((0, 2), (0, 3))),
        "scatter_index": np.pad(rows, (0, 11)),
        "hidden_states": np.pad(
            inputs["hidden_states"], ((0, 0), (0, 11), (0, 0)), constant_values=7.0
        ),
        "key_lengths": np.pad(inputs["key_lengths"], (0, 2)),
    }
    if "context_states" in inputs:
        made["context_states"] = np.pad(inputs["context_states"], ((0, 2), (0, 1), (0, 0)))
    return made


def test_where_no_kernel_does_all_of_attention_it_is_decomposed(
    fused: Fused, tmp_path: Path
) -> None:
    """In float32, that is; each engine says what it got."""
    bundle = Bundle.open(shutil.copytree(fused("active-lm").bundle, tmp_path / "bundle"))
    build_engines(bundle, ADA, LIMITS)
    engines = reopened(bundle)
    assert engines.attention == "fused"
    assert {name: spec.attention for name, spec in engines.engines.items()} == {
        "entry": None,
        "head": None,
        **dict.fromkeys(("stage-00", "stage-01", "stage-02", "dense", "masked"), "decomposed"),
    }
    reason = engines.engines["dense"].attention_reason
    assert reason is not None
    assert "not supported by a dedicated kernel" in reason
    assert engines.engines["head"].attention_reason is None


def test_fused_attention_that_cannot_be_built_is_decomposed(tmp_path: Path) -> None:
    """With heads of 12 the library has a kernel, and fails inside."""
    bundle = one_layer(tmp_path, 12, ExportConfig(precision="float16", attention="fused"))
    steps: list[str] = []
    config = dataclasses.replace(ADA, graphs=("stage-00", "masked"))
    report = build_engines(bundle, config, LIMITS, progress=lambda *step: steps.append(step[0]))
    assert report.hint is None
    for spec in reopened(bundle).engines.values():
        assert spec.attention == "decomposed"
        assert "MyelinCheckException" in str(spec.attention_reason)
    assert any("masked (2 of 2): decomposed attention, as fused could" in step for step in steps)
    text = call("inspect", bundle.path)
    assert "could not be built, decomposed was, in stage-00, masked: IBuilder::" in text


def test_a_graph_that_fails_in_both_forms_says_both(fused: Fused, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(fused("active-lm").bundle, tmp_path / "bundle"))
    path = bundle.path / "stage-00.onnx"
    proto = onnx.load(path, load_external_data=False)
    next(
        node for node in proto.graph.node if node.op_type == "LayerNormalization"
    ).op_type = "Sharpmax"
    onnx.save(proto, path)
    sign_bundle(bundle.path)
    config = dataclasses.replace(ADA, graphs=("stage-00",))
    with pytest.raises(BuildError) as error:
        build_engines(Bundle.open(bundle.path), config, LIMITS)
    _, fused_lines, decomposed_lines = re.split("with .* attention:\n", str(error.value))
    assert "Sharpmax" in fused_lines
    assert "Sharpmax" in decomposed_lines


def test_a_narrow_bundle_without_fused_attention_is_told_of_it(tmp_path: Path) -> None:
    bundle = one_layer(tmp_path, 8, ExportConfig(precision="float16"))
    report = build_engines(bundle, dataclasses.replace(ADA, graphs=("head",)), LIMITS)
    assert report.hint is not None
    assert "--precision float16 --attention fused" in report.hint
    known = trt.features(trt.flavour("tensorrt"), "10.13.3")
    assert engine_plan.fused_hint(bundle.manifest, known) is None  # it has no such operator
    export = dataclasses.replace(bundle.manifest.export, precision="float32")
    wide = dataclasses.replace(bundle.manifest, export=export)
    assert engine_plan.fused_hint(wide, trt.features(trt.flavour("tensorrt"), "11.4.0")) is None


def one_layer(directory: Path, head_dim: int, export_config: ExportConfig) -> Bundle:
    config = CONFIGS["all-embedding"][0]
    config = config.replace(n_layers=1, thresholds=(), d_model=head_dim * config.n_heads)
    export(Checkpoint(model=random_model(config, seed=3)), directory / "bundle", export_config)
    return Bundle.open(directory / "bundle")


def test_fused_attention_in_float16(tmp_path: Path) -> None:
    bundle = one_layer(tmp_path, 32, ExportConfig(precision="float16", attention="fused"))
    build_engines(bundle, ADA, LIMITS)
    assert list(reopened(bundle).engines) == built_graphs(bundle)
    got = {name: spec.attention for name, spec in reopened(bundle).engines.items()}
    assert [got[name] for name in ("stage-00", "dense", "masked")] == ["fused"] * 3
    assert not list((bundle.path / "engines").glob("*.onnx"))


def test_packed_attention_is_read_and_has_no_kernel(
    fused: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX 1.7.1 parses the stage; behind the check's back it says what is missing."""
    bundle = Bundle.open(shutil.copytree(fused("all-embedding").bundle, tmp_path / "bundle"))
    config = dataclasses.replace(ADA, attention="packed", graphs=("head", "stage-00", "dense"))
    with pytest.raises(ConfigError, match=r"has no packed attention, tensorrt 11\.1"):
        build_engines(bundle, config, LIMITS)
    known = trt.features(trt.flavour("tensorrt-rtx"), "1.7.1")
    able = dataclasses.replace(known, packed_attention=True)
    monkeypatch.setattr(trt, "features", lambda chosen, found: able)
    with pytest.raises(BuildError, match="no fused packed attention kernel") as error:
        build_engines(bundle, config, LIMITS)
    assert "--attention packed --no-cache --graph stage-00" in str(error.value)
    engines = reopened(bundle)
    assert engines.attention == "packed"
    assert {name: spec.attention for name, spec in engines.engines.items()} == {
        "head": None,
        "dense": "decomposed",
    }


@pytest.mark.parametrize(
    ("flavour", "version", "exported", "asked", "message"),
    [
        ("tensorrt", "11.1.0", "decomposed", "packed", "export it with --attention fused"),
        ("tensorrt", "11.0.0", "fused", "packed", "has no packed attention"),
        ("tensorrt", "10.13.3", "fused", "padded", "has no fused attention"),
        ("tensorrt", "8.6.1", "fused", "padded", "export the bundle with --attention decomposed"),
        ("tensorrt-rtx", "1.7.1", "fused", "packed", "has no packed attention"),
    ],
)
def test_attention_that_a_version_lacks(
    flavour: str, version: str, exported: str, asked: str, message: str
) -> None:
    model = random_model(CONFIGS["active-lm"][0], 1)
    bundle = memory_bundle(model, ExportConfig(attention=exported))  # type: ignore[arg-type]
    config = dataclasses.replace(ADA, attention=asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        engine_plan.set_attention(config, bundle.manifest, trt.flavour(flavour), version)


def test_attention_that_a_version_has() -> None:
    model = random_model(CONFIGS["active-lm"][0], 1)
    chosen = trt.flavour("tensorrt")
    for exported, asked, got in (
        ("decomposed", "padded", "decomposed"),
        ("fused", "padded", "fused"),
        ("fused", "packed", "packed"),
    ):
        bundle = memory_bundle(model, ExportConfig(attention=exported))  # type: ignore[arg-type]
        config = dataclasses.replace(ADA, attention=asked)  # type: ignore[arg-type]
        found = engine_plan.set_attention(config, bundle.manifest, chosen, "11.4.0")
        assert found == got
        graphs = bundle.manifest.graphs
        assert engine_plan.graph_attention(graphs["stage-00"], found) == got
        assert engine_plan.graph_attention(graphs["entry"], found) is None
        whole = "fused" if got == "packed" else got
        assert engine_plan.graph_attention(graphs["dense"], found) == whole


def test_only_stages_can_be_packed(fused: Fused, exported: Fused) -> None:
    for path in (
        fused("active-lm").bundle / "dense.onnx",
        exported("active-lm").bundle / "stage-00.onnx",
    ):
        with pytest.raises(ExportError, match="only stages with fused attention"):
            packed_attention(onnx.load(path, load_external_data=False))
