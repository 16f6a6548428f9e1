"""The whole loop in one graph computes what the oracle computes, on active rows only."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.exporters import single
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.onnx import parameters_of
from sdt_deploy.exporters.partition import MaskedGraph, partition
from sdt_deploy.exporters.single import single_graph
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.ort import ensure_thread_pool, runtime
from sdt_deploy.runtime.padded import padded_arrays
from sdt_deploy.runtime.session import Session
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    capacity_thresholds,
    cut_points,
    lengths_lists,
    model_configs,
    quantile_thresholds,
    random_batch,
    random_model,
    seeds,
)


def built(model: SparseDepthTransformer) -> onnx.ModelProto:
    """The graph with its weights inside."""
    module = list(partition(model, ExportConfig(), single_file=True))[-1].module
    assert isinstance(module, MaskedGraph)
    proto = single_graph(module, model.config, opset=ExportConfig().opset)
    weights = parameters_of(module)
    for tensor in proto.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    assert weights.keys() <= {tensor.name for tensor in proto.graph.initializer}
    onnx.checker.check_model(proto)
    return proto


def opened(proto: onnx.ModelProto) -> Any:
    ensure_thread_pool()
    options = runtime().SessionOptions()
    options.use_per_session_threads = False  # where there is a pool, every session uses it
    return runtime().InferenceSession(proto.SerializeToString(), options)


@given(
    data=st.data(),
    drawn=model_configs(selections=("threshold", "capacity")),
    lengths=lengths_lists,
    seed=seeds,
    dense=st.booleans(),
    gemm=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_any_model(
    data: st.DataObject,
    drawn: tuple[ModelConfig, ExportConfig],
    lengths: list[int],
    seed: int,
    dense: bool,
    gemm: bool,
) -> None:
    config, _ = drawn
    assume(config.d_model >= 8)  # norms of two values magnify rounding without bounds
    if dense:
        config = config.replace(probe="none", pinned_token_ids=(), selection="threshold")
    model = random_model(config, seed % 10_000)
    with mock.patch.object(single, "GEMM_BELOW", config.d_model + gemm):
        proto = built(model)
    assert any(node.op_type == "Gemm" for node in proto.graph.node) == gemm
    session = opened(proto)
    batch = random_batch(config, lengths, seed)
    everyone, nobody = [0.0] * config.n_layers, [1.0] * config.n_layers
    for wanted in (everyone, nobody, data.draw(cut_points(config.n_layers))):
        thresholds: tuple[float, ...] | None = quantile_thresholds(model, batch, wanted)
        if config.selection == "capacity":
            thresholds = capacity_thresholds(model, batch, wanted)
        assume(thresholds is not None)
        assert thresholds is not None
        inputs, _ = padded_arrays(config, batch, thresholds, "single")
        output, scores = session.run(None, inputs)
        expected = oracle_output(
            model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids, thresholds=thresholds
        )
        if not config.head.per_sequence:
            output = batch.packed(output)
        np.testing.assert_allclose(output, expected.output, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(batch.packed(scores), expected.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["active-lm", "all-embedding"])
def test_only_active_rows_are_computed(name: str) -> None:
    config, _ = CONFIGS[name]
    model = random_model(config, 3)
    proto = built(model)
    inner = [
        node.output[0]
        for node in proto.graph.node
        if node.op_type in ("Gemm", "MatMul") and node.input[1].endswith("feed_forward.up.weight")
    ]
    mixed = [
        node.output[0]
        for node in proto.graph.node
        if node.op_type in ("Gemm", "MatMul") and node.input[1].endswith("output.weight")
    ]
    for value in (*inner, *mixed):
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    batch = random_batch(config, [7, 20, 1, 13], 4)
    thresholds = quantile_thresholds(model, batch, [0.1, 0.5, 0.8])
    inputs, _ = padded_arrays(config, batch, thresholds, "single")
    found = opened(proto).run([*inner, *mixed], inputs)
    depths = oracle_output(
        model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids, thresholds=thresholds
    ).depths
    expected = [int((depths > i).sum()) for i in range(config.n_layers)]
    assert [len(rows) for rows in found] == expected * 2
    assert expected[0] > expected[1] > expected[2] > 0


def test_only_standard_operators() -> None:
    for config, _ in CONFIGS.values():
        proto = built(random_model(config, 0))
        assert {node.domain for node in proto.graph.node} == {""}
        assert [entry.domain for entry in proto.opset_import] == [""]


@pytest.mark.parametrize(
    "config", [ExportConfig(precision="float16"), ExportConfig(attention="fused")]
)
def test_graphs_for_gpus_have_no_single_file(config: ExportConfig, tmp_path: Path) -> None:
    checkpoint = Checkpoint(model=random_model(CONFIGS["active-lm"][0], 0), provenance={})
    with pytest.raises(ConfigError, match=r"float32 or int8.*--no-single-file"):
        export(checkpoint, tmp_path / "bundle", config, single_file=True)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["active-lm", "all-embedding"])
def test_all_products_of_the_layers_can_be_quantised(name: str, tmp_path: Path) -> None:
    config, _ = CONFIGS[name]
    checkpoint = Checkpoint(model=random_model(config, 3), provenance={})
    export(checkpoint, tmp_path / "bundle", ExportConfig(quantization="int8"))
    graph = onnx.load(tmp_path / "bundle" / "single.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 6 * config.n_layers
    assert not any(node.op_type == "Gemm" for node in graph.node)
    batch = random_batch(config, [7, 20, 1, 13], 4)
    thresholds = quantile_thresholds(checkpoint.model, batch, [0.1, 0.5, 0.8])
    with Session.open(tmp_path / "bundle") as session:
        runs = [
            session.run_batch(batch, thresholds=thresholds, path=path)
            for path in ("single", "sparse")
        ]
    single, sparse = runs
    np.testing.assert_array_equal(single.depths, sparse.depths)
    # Both quantise the same rows with the same scales; where float32 differs in its last digit a
    # value may fall into the next of 255 steps.
    error = np.linalg.norm(single.output - sparse.output) / np.linalg.norm(sparse.output)
    assert error < 0.05
