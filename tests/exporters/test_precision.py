"""Half precision: what is computed in it, what is not, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sdt_deploy.bundle import STATES, Bundle
from sdt_deploy.config import TOLERANCES, ExportConfig, Precision
from sdt_deploy.errors import BackendError, ExportError, VerificationError
from sdt_deploy.exporters.layers import HeadLayout, PackedLayer, Sight, key_bias
from sdt_deploy.exporters.onnx import parameters_of
from sdt_deploy.exporters.partition import PackedHead, partition
from sdt_deploy.exporters.restore import restore
from sdt_deploy.exporters.verify import verify_graph
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.verification import verify_bundle
from tests.samples import (
    CONFIGS,
    ExportedModel,
    quantile_thresholds,
    random_batch,
    random_model,
)

Once = Callable[[str, Callable[[Path], None]], Path]
Exported = Callable[[str], ExportedModel]
Half = Callable[[str, Precision], tuple[SparseDepthTransformer, Path]]
HALF: tuple[Precision, ...] = ("float16", "bfloat16")
HALF_TYPES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
FLOAT_TYPES = HALF_TYPES | {onnx.TensorProto.FLOAT}

EVERY_FLOAT16: list[tuple[str, Precision]] = [
    (name, "float16") for name in CONFIGS if name != "dense-twin"
]
EVERY_CASE: list[tuple[str, Precision]] = [
    *EVERY_FLOAT16,
    ("all-embedding", "bfloat16"),
    ("active-lm", "bfloat16"),
]
"""The type of the weights is all that differs, so bfloat16 takes part in two: both contexts, norm
placements and kinds of head."""

NEVER_HALF = {
    *("Softmax", "LayerNormalization", "Sigmoid", "Tanh"),
    *("ReduceSum", "ReduceMean", "ReduceL2", "Sqrt", "Pow", "Clip", "Max"),
}
"""Score, norms, softmax, pooling and normalisation, whole or in pieces."""


class Typed:
    """A graph whose every tensor has a type, and what each tensor is made from."""

    def __init__(self, path: Path) -> None:
        proto = onnx.load(str(path), load_external_data=False)
        self.graph = onnx.shape_inference.infer_shapes(proto, check_type=True).graph
        graph = self.graph
        self.types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in [*graph.input, *graph.output, *graph.value_info]:
            self.types[value.name] = value.type.tensor_type.elem_type
        self.maker = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants |= {n.output[0] for n in graph.node if n.op_type == "Constant"}

    def of(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.op_type == op_type]

    def types_of(self, node: onnx.NodeProto) -> set[int]:
        """Types of everything that goes in or out; a tensor without one is an error."""
        return {self.types[name] for name in [*node.input, *node.output] if name}

    def is_half(self, node: onnx.NodeProto) -> bool:
        return bool(self.types_of(node) & HALF_TYPES)

    def before(self, name: str) -> set[str]:
        """Every tensor that ``name`` depends on."""
        found, left = set(), [name]
        while left:
            tensor = left.pop()
            if tensor and tensor not in found:
                found.add(tensor)
                left += self.maker[tensor].input if tensor in self.maker else []
        return found


@pytest.mark.parametrize(("name", "precision"), EVERY_CASE)
def test_score_norms_and_softmax_are_never_half(
    half: Half, name: str, precision: Precision
) -> None:
    """Read off the graphs: a run on the CPU would not show it."""
    model, path = half(name, precision)
    manifest = Bundle.open(path).manifest
    seen = set()
    for spec in manifest.graphs.values():
        graph = Typed(path / spec.file)
        for node in graph.graph.node:
            graph.types_of(node)
            seen.add(node.op_type)
            constant = [name in graph.constants for name in node.input]
            where = f"{spec.name}: {node.op_type} {node.name}"
            if node.op_type in NEVER_HALF:
                assert not graph.is_half(node), where
            if node.op_type == "Div" and not constant[1]:  # by a norm or a number of tokens
                assert not graph.is_half(node), where
            if node.op_type == "Add" and not any(constant):  # a residual sum feeds a norm
                assert not graph.is_half(node), where
        if "scores" in {tensor.name for tensor in spec.outputs}:
            before = graph.before("scores")
            assert not {graph.types[tensor] for tensor in before} & HALF_TYPES
            assert ("scorer.weight" in before) == (model.config.probe == "linear")
        if "output" in {tensor.name for tensor in spec.outputs}:
            assert graph.types["output"] == onnx.TensorProto.FLOAT
    assert {"Softmax", "LayerNormalization"} <= seen
    assert ("Sigmoid" in seen) == (model.config.probe == "linear")


@pytest.mark.parametrize(("name", "precision"), EVERY_CASE)
def test_products_and_states_are_half(half: Half, name: str, precision: Precision) -> None:
    """Or the bundle would be one of float32 in disguise."""
    model, path = half(name, precision)
    bundle = Bundle.open(path)
    wanted = getattr(onnx.TensorProto, precision.upper())
    head = sum(part is not None for part in (model.head.dense, model.head.projection))
    for spec in bundle.manifest.graphs.values():
        layers = spec.layers or ((0, 2) if spec.name in ("dense", "masked") else (0, 0))
        graph = Typed(path / spec.file)
        products = graph.of("MatMul")
        assert all(graph.types_of(node) == {wanted} for node in products), spec.name
        of_head = 0 if spec.layers or spec.name == "entry" else head
        assert len(products) == 8 * (layers[1] - layers[0]) + of_head, spec.name
        for tensor in (*spec.inputs, *spec.outputs):
            assert (tensor.dtype == precision) == (tensor.name in STATES)
    weights = {
        tensor.name: tensor.data_type
        for spec in bundle.manifest.graphs.values()
        for tensor in onnx.load(str(path / spec.file), load_external_data=False).graph.initializer
    }
    assert weights["embeddings.token.weight"] == onnx.TensorProto.FLOAT
    assert weights["layers.0.attention_norm.weight"] == onnx.TensorProto.FLOAT
    assert weights["layers.0.feed_forward.up.weight"] == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_pays_nothing(exported: Exported, name: str) -> None:
    bundle = Bundle.open(exported(name).bundle)
    for spec in bundle.manifest.graphs.values():
        graph = Typed(bundle.path / spec.file)
        assert not set(graph.types.values()) & HALF_TYPES
        for node in graph.of("Cast"):
            assert not graph.types_of(node) <= FLOAT_TYPES, f"{spec.name}: {node.name}"


@pytest.mark.parametrize(("name", "precision"), EVERY_FLOAT16)
def test_a_session_runs_float16(half: Half, name: str, precision: Precision) -> None:
    model, path = half(name, precision)
    bundle = Bundle.open(path)
    assert all(0 < spec.max_abs_error < 0.1 for spec in bundle.manifest.graphs.values())
    batch = random_batch(model.config, [1, 9, 4, 17], seed=3)
    thresholds = quantile_thresholds(model, batch, [0.2, 0.6])
    with Session.open(bundle) as session:
        verify_bundle(bundle, session)
        for run in ("sparse", "masked", "dense"):
            limits = None if run == "dense" else thresholds
            oracle = model.as_dense() if run == "dense" else model
            found = session.run_batch(batch, path=run, thresholds=limits)  # type: ignore[arg-type]
            ids, cu, types = batch.input_ids, batch.cu_seqlens, batch.token_type_ids
            expected = oracle_output(oracle, ids, cu, types, thresholds=limits)
            np.testing.assert_array_equal(found.depths, expected.depths)
            assert found.output.dtype == np.float32
            tolerance = TOLERANCES["float16"] * np.abs(expected.output).max()
            np.testing.assert_allclose(found.output, expected.output, rtol=0, atol=tolerance)
            if found.scores is not None:
                np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "precision"), EVERY_CASE)
def test_restore(half: Half, name: str, precision: Precision) -> None:
    """Weights of products come back rounded, all others as they were."""
    model, path = half(name, precision)
    restored = restore(Bundle.open(path)).state_dict()
    for key, tensor in model.state_dict().items():
        product = "attention." in key or "feed_forward." in key or "head.dense" in key
        if product or "head.projection" in key:
            assert not torch.equal(restored[key], tensor)
            tensor = tensor.to(getattr(torch, precision)).float()
        assert torch.equal(restored[key], tensor), key


def test_the_cpu_refuses_bfloat16(half: Half) -> None:
    _, path = half("all-embedding", "bfloat16")
    with pytest.raises(BackendError, match=r"no bfloat16 kernels.*--precision float32"):
        Session.open(path)


@pytest.mark.parametrize(
    ("name", "precision"), [("all-embedding", precision) for precision in HALF]
)
def test_verification_notices_a_wrong_graph(half: Half, name: str, precision: Precision) -> None:
    """The tolerance of half precision is wider, not blind."""
    model, path = half(name, precision)
    for part, layers, parameter in (
        ("entry", None, "scorer.weight"),
        ("stage-01", (1, 2), "layers.1.attention.value.weight"),
        ("dense", None, "layers.1.feed_forward.down.weight"),
    ):
        file = path / f"{part}.onnx"
        verify_graph(file, part, layers, model, ExportConfig(precision=precision))
        altered = random_model(model.config, seed=len(name))
        with torch.no_grad():
            altered.get_parameter(parameter).mul_(1.5)
        with pytest.raises(VerificationError, match=f"graph {part} deviates.*{precision}"):
            verify_graph(file, part, layers, altered, ExportConfig(precision=precision))


def test_weights_beyond_float16_are_refused() -> None:
    model = random_model(CONFIGS["active-lm"][0], 0)
    with torch.no_grad():
        model.blocks[0].feed_forward.up.weight[3, 5] = 1e5
    for precision, fits in (("float16", False), ("bfloat16", True)):
        config = ExportConfig(precision=precision)  # type: ignore[arg-type]
        module = next(p.module for p in partition(model, config) if p.name == "stage-00")
        if fits:
            assert parameters_of(module)
            continue
        with pytest.raises(ExportError, match=r"up\.weight holds weights beyond .* float16"):
            parameters_of(module)


@torch.no_grad()
def test_sums_that_float16_cannot_hold() -> None:
    """A residual sum, a mean and a norm above 65504 come out finite and right."""
    model = random_model(CONFIGS["all-embedding"][0], 0)
    layer, head = model.blocks[0], model.head
    for linear in (layer.attention.query, layer.attention.key, layer.attention.value):
        linear.weight.mul_(1e-4)  # products stay in range, sums do not
    layer.attention.output.bias.fill_(4e4)
    layer.attention.output.bias[::2] = -4e4
    states = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    states = states + layer.attention.output.bias
    visible = torch.ones(1, 7, dtype=torch.bool)
    layout = HeadLayout(layer.attention.n_heads, batch=1)
    packed, bias = (
        PackedLayer(layer, torch.float16),
        key_bias(visible, layout.n_heads, torch.float16),
    )
    rows = states[0].half()
    found = packed(rows, rows, Sight(layout, layout, bias))
    expected = layer(rows.float()[None], visible)[0]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
    packed_head = PackedHead(head, torch.float16)
    pooled = packed_head.pool(packed_head.normed(rows)[None], visible)
    output = head(rows.float()[None], visible)
    torch.testing.assert_close(packed_head.project(pooled), output)
    assert head.config.normalize
