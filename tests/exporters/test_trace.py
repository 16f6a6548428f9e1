"""The exporter refuses what would silently become static."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.errors import ExportError, VerificationError
from sdt_deploy.exporters import verify
from sdt_deploy.exporters.modules import GraphModule
from sdt_deploy.exporters.onnx import WeightsWriter, parameters_of, trace
from sdt_deploy.exporters.partition import partition
from sdt_deploy.exporters.repeated import LayerGraph, with_layers
from tests.samples import random_model


class Toy(GraphModule):
    inputs = (TensorSpec(name="x", axes=("n", 4), dtype="float32"),)
    outputs = (TensorSpec(name="y", axes=("n", 4), dtype="float32"),)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Branching(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale if x.shape[0] == 3 else x


class Pinning(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.zeros(3, 4)) * self.scale


@pytest.mark.parametrize("module", [Branching(), Pinning()])
def test_a_size_that_the_code_fixes_is_an_error(module: GraphModule) -> None:
    with pytest.raises(ExportError):
        trace(module, opset=18)


def test_declared_and_exported_must_agree() -> None:
    module = Toy()
    trace(module, opset=18)
    module.outputs = (TensorSpec(name="y", axes=("n", 5), dtype="float32"),)
    with pytest.raises(ExportError, match="static axis 5"):
        trace(module, opset=18)
    module.outputs = (TensorSpec(name="y", axes=("n", 4), dtype="int32"),)
    with pytest.raises(ExportError, match="not int32"):
        trace(module, opset=18)


def test_a_trace_does_not_depend_on_the_weights() -> None:
    """All-one norm weights of a fresh model would be merged into one constant otherwise."""
    config = ModelConfig(vocab_size=9, d_model=8, n_heads=2, n_layers=2, d_ff=8, max_positions=9)
    fresh = random_model(config, 0)
    for norm in (fresh.blocks[0].attention_norm, fresh.blocks[0].feed_forward_norm):
        torch.nn.init.ones_(norm.weight)
    part = next(p for p in partition(fresh, ExportConfig()) if p.name == "stage-00")
    names = {tensor.name for tensor in trace(part.module, opset=18).graph.initializer}
    assert parameters_of(part.module).keys() <= names


def test_layers_of_a_whole_model_are_traced_once() -> None:
    config = ModelConfig(vocab_size=9, d_model=8, n_heads=2, n_layers=3, d_ff=8, max_positions=9)
    model = random_model(config, 0)
    part = next(p for p in partition(model, ExportConfig()) if p.name == "dense")
    assert part.repeated is not None
    called, layer = trace(part.module, opset=18), trace(part.repeated, opset=18)
    assert [node.op_type for node in called.graph.node].count("Layer") == 3
    whole = with_layers(called, layer)
    kinds = [node.op_type for node in whole.graph.node]
    assert (kinds.count("Layer"), kinds.count("Softmax")) == (0, 3)
    assert [one.domain for one in whole.opset_import] == [""]
    names = [tensor.name for tensor in whole.graph.initializer]
    assert len(names) == len(set(names))
    assert parameters_of(part.module).keys() <= set(names)
    assert kinds.count("Shape") == 3, "what depends on no layer is there once"


def test_a_layer_that_makes_no_rows_is_refused() -> None:
    class Twice(LayerGraph):
        def forward(self, states: Tensor, seen: Tensor) -> Tensor:
            return super().forward(states, seen) + super().forward(states * 2, seen)

    config = ModelConfig(vocab_size=9, d_model=8, n_heads=2, n_layers=1, d_ff=8, max_positions=9)
    part = next(p for p in partition(random_model(config, 0), ExportConfig()) if p.name == "dense")
    assert isinstance(part.repeated, LayerGraph)
    called, layer = trace(part.module, opset=18), part.repeated.layers[0]
    twice = trace(Twice(layer, config.d_model, causal=False), opset=18)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="uses its padded states in Mul"):
        with_layers(called, twice)


def test_weights_that_do_not_fit_the_trace_are_refused() -> None:
    proto = trace(Toy(), opset=18)
    writer = WeightsWriter(io.BytesIO(), location="weights.bin")
    with pytest.raises(ExportError, match="scale"):
        writer.fill(proto, {"scale": np.ones(5, dtype=np.float32)})
    with pytest.raises(ExportError, match="missing in the graph: shift"):
        writer.fill(proto, {"scale": np.ones(4, np.float32), "shift": np.ones(4, np.float32)})


def test_equal_tensors_are_written_once() -> None:
    stream = io.BytesIO()
    writer = WeightsWriter(stream, location="weights.bin")
    array = np.arange(5, dtype=np.float32)
    first, other = writer.add(array), writer.add(array + 1)
    assert writer.add(array.copy()) == first
    assert other[0] == 4096
    content = stream.getvalue()
    assert len(content) == 4096 + 20
    np.testing.assert_array_equal(np.frombuffer(content[4096:], dtype=np.float32), array + 1)


def test_verification_notices_a_wrong_graph(exported, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Compare a bundle's graphs with a model that differs in one weight: every part is caught."""
    sample = exported("all-embedding")
    config = sample.model.config
    assert config.head == HeadConfig(kind="embedding", pooling="mean", normalize=True)
    for name, layers, parameter in (
        ("entry", None, "embeddings.norm.weight"),
        ("entry", None, "scorer.weight"),
        ("stage-01", (1, 2), "layers.1.attention.value.weight"),
        ("dense", None, "layers.2.feed_forward.down.bias"),
        ("masked", None, "layers.0.attention.query.weight"),
    ):
        path = sample.bundle / f"{name}.onnx"
        assert verify.verify_graph(path, name, layers, sample.model, ExportConfig()) < 1e-4
        altered = random_model(config, seed=len("all-embedding"))
        with torch.no_grad():
            altered.get_parameter(parameter).mul_(1.2)
        with pytest.raises(VerificationError, match=f"graph {name} deviates"):
            verify.verify_graph(path, name, layers, altered, ExportConfig())
