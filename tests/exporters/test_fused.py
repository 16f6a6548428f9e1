"""Graphs with fused attention: what their operators compute in, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sdt_deploy.bundle import UPDATE, Bundle, TensorSpec
from sdt_deploy.config import FUSED_OPSET, Activation, ExportConfig, Precision
from sdt_deploy.exporters.export import export
from sdt_deploy.exporters.pieces import CONTRIB
from sdt_deploy.exporters.restore import restore
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.ort import bind_arrays, open_session
from tests.samples import CONFIGS, ExportedModel, random_batch, random_model

Fused = Callable[[str], ExportedModel]
PREFIXES = ("dense", "masked", "stage")
FLOAT = onnx.TensorProto.FLOAT


@pytest.mark.parametrize("name", CONFIGS)
def test_one_attention_operator_for_each_layer(fused: Fused, name: str) -> None:
    sample = fused(name)
    n_layers = sample.model.config.n_layers
    for spec in Bundle.open(sample.bundle).manifest.graphs.values():
        model = onnx.load(str(sample.bundle / spec.file), load_external_data=False)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets.pop("") == FUSED_OPSET
        # A sum, a bias and a norm as one operator, whose bias is no constant.
        assert not opsets or (spec.name, opsets) == (UPDATE, {CONTRIB: 1})
        kinds = [node.op_type for node in model.graph.node]
        layers = 1 if spec.layers else n_layers * spec.name.startswith(PREFIXES)
        assert kinds.count("Attention") == layers, spec.name
        assert not {"Softmax", "Shape", "Range"} & set(kinds), spec.name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_can_be_had_back(fused: Fused, name: str) -> None:
    """Biases that were dropped or moved make no difference, those of the keys included."""
    sample = fused(name)
    restored = restore(Bundle.open(sample.bundle))
    batch = random_batch(sample.model.config, [5, 1, 11], seed=5)
    expected, found = (
        oracle_output(model, batch.input_ids, batch.cu_seqlens, batch.token_type_ids)
        for model in (sample.model, restored)
    )
    np.testing.assert_array_equal(found.depths, expected.depths)
    np.testing.assert_allclose(found.output, expected.output, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("all-embedding", "gelu"), ("active-lm", "relu"), ("active-lm", "gelu_tanh")],
)
def test_the_activation_works_in_place(name: str, activation: Activation, tmp_path: Path) -> None:
    """As ONNX Runtime fuses it: the feed-forward's product and what becomes of it in one buffer."""
    config = CONFIGS[name][0].replace(n_layers=1, thresholds=(), activation=activation)
    form = ExportConfig(attention="fused")
    export(Checkpoint(model=random_model(config, seed=3)), tmp_path / "bundle", form)
    bundle = Bundle.open(tmp_path / "bundle")
    spec, rng = bundle.manifest.graphs[UPDATE], np.random.default_rng(0)

    def arrays(tensors: tuple[TensorSpec, ...]) -> dict[str, np.ndarray]:
        shapes = {t.name: [57 if axis == "n_tokens" else axis for axis in t.axes] for t in tensors}
        return {n: rng.standard_normal(shape).astype("f4") for n, shape in shapes.items()}

    inputs, apart = arrays(spec.inputs), arrays(spec.outputs)
    shared = {**apart, "updated_states": inputs["hidden_states"]}
    shared["inner_states"] = shared["up_product"] = np.empty_like(apart["inner_states"])
    session = open_session(bundle.file(spec.file))
    bind_arrays(session, inputs, apart)()
    bind_arrays(session, inputs, shared)()
    for found in ("updated_states", "inner_states"):
        np.testing.assert_array_equal(shared[found], apart[found])
    assert (apart["up_product"] != apart["inner_states"]).any()


def test_states_whose_squares_float16_cannot_hold(tmp_path: Path) -> None:
    """As trained models have, in few channels: graphs norm in float32, and so must their check."""
    model = random_model(CONFIGS["all-embedding"][0].replace(n_layers=2, thresholds=()), seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward_norm.weight[5] = 300.0
    config = ExportConfig(precision="float16", attention="fused")
    export(Checkpoint(model=model), tmp_path / "bundle", config)
    assert Bundle.open(tmp_path / "bundle").manifest.graphs["stage-00"].max_abs_error < 1.0


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_norms_and_scores_are_float32_inside(precision: Precision, tmp_path: Path) -> None:
    """Read off the graphs: a run on the CPU would not show it."""
    model = random_model(CONFIGS["all-embedding"][0].replace(n_layers=2, thresholds=()), seed=3)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.key.bias.normal_()
            block.attention.value.bias.normal_()
    config = ExportConfig(precision=precision, attention="fused")
    export(Checkpoint(model=model), tmp_path / "bundle", config)
    seen = 0
    for spec in Bundle.open(tmp_path / "bundle").manifest.graphs.values():
        proto = onnx.load(str(tmp_path / "bundle" / spec.file), load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(proto, check_type=True).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            types[value.name] = value.type.tensor_type.elem_type
        for node in graph.node:
            if node.op_type == "LayerNormalization":
                stash = {a.name: a.i for a in node.attribute}.get("stash_type", FLOAT)
                assert stash == FLOAT, f"{spec.name}: {node.name}"
                seen += 1
            elif node.op_type in ("Sigmoid", "Tanh", "ReduceSum", "Sqrt", "Pow", "Clip"):
                used = {types[name] for name in (*node.input, *node.output) if name}
                assert not used & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        for tensor in spec.outputs:
            if tensor.name in ("scores", "output"):
                assert types[tensor.name] == FLOAT
    assert seen >= 3 * 2 * 2  # stages, dense, masked: two layers with two norms
