"""What TensorRT 8.6 is told to compute in float32 where its builder may take float16."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import Precision
from sdt_deploy.exporters import engine_worker
from sdt_deploy.exporters.engine_graphs import value_types
from sdt_deploy.exporters.engine_types import LayerTensors, float32_tensors, keep_float32
from sdt_deploy.model.transformer import SparseDepthTransformer
from tests.exporters.fake_network import (
    FLOATING,
    ILayer,
    INetworkDefinition,
    ITensor,
    LayerType,
    parsed,
)
from tests.runtime.fake_tensorrt import Checked, DataType

LIBRARY = SimpleNamespace(DataType=DataType)
Half = Callable[[str, Precision], tuple[SparseDepthTransformer, Path]]


def copied(half: Half, name: str, directory: Path) -> Bundle:
    """A copy of a float16 bundle: the rewritten graphs link its weights, and others share it."""
    return Bundle.open(shutil.copytree(half(name, "float16")[1], directory / "bundle"))


def layer(kind: str, *names: str) -> LayerTensors:
    return LayerTensors(kind=kind, names=names)


def test_tensors_of_the_parser_have_the_type_of_what_they_meet() -> None:
    """Over several layers, in any order, and not past a cast or a known float16."""
    types = {"x": "float16", "wide": "float32", "y": "float16", "n": "int64"}
    layers = [
        layer("MATRIX_MULTIPLY", "x", "weight", "y"),
        layer("CONSTANT", "weight"),
        layer("ELEMENTWISE", "wide", "bias rows", "own"),
        layer("SHUFFLE", "bias", "bias rows"),
        layer("CONSTANT", "bias"),
        layer("CAST", "own", "narrowed"),
        layer("SHUFFLE", "narrowed", "y"),
    ]
    wide = float32_tensors(layers, types)
    assert wide == {"wide", "bias rows", "own", "bias"}
    assert float32_tensors(layers, {"x": "float16"}) == set()
    # A float16 value is never widened, even where a layer mixes them.
    assert float32_tensors([layer("SELECT", "wide", "x")], types) == {"wide"}


def test_types_of_a_graph() -> None:
    node = helper.make_node("Cast", ["x"], ["inner"], to=TensorProto.FLOAT16)
    last = helper.make_node("Shape", ["inner"], ["y"])
    graph = helper.make_graph(
        [node, last],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [1])],
        [helper.make_tensor("w", TensorProto.FLOAT16, [1], [1.0])],
    )
    assert value_types(helper.make_model(graph)) == {
        "x": "float32",
        "inner": "float16",
        "y": "int64",
        "w": "float16",
    }


def test_a_comparison_has_a_precision_and_no_type_of_its_output() -> None:
    scores, held = ITensor("scores", DataType.FLOAT), ITensor("held", DataType.BOOL)
    threshold = ITensor("own", DataType.FLOAT)
    compared = ILayer(LayerType.OTHER, [scores, threshold], [held])
    constant = ILayer(LayerType.CONSTANT, [], [threshold])
    network = INetworkDefinition([compared, constant])
    types = {"scores": "float32", "held": "bool"}
    keep_float32(LIBRARY, types, Checked(network, "8.6"))
    assert compared.asked is constant.asked is DataType.FLOAT
    assert compared.output_types == {}
    assert constant.output_types == {0: DataType.FLOAT}


def test_a_precision_of_its_own_is_kept_unless_the_layer_writes_float32() -> None:
    table, row = ITensor("table", DataType.FLOAT), ITensor("row", DataType.FLOAT)
    held = ITensor("held", DataType.BOOL)
    gathered = ILayer(LayerType.OTHER, [table, ITensor("ids", DataType.INT32)], [row])
    compared = ILayer(LayerType.OTHER, [row], [held])
    gathered.by_itself, compared.by_itself = DataType.INT32, DataType.BOOL
    network = INetworkDefinition([gathered, compared])
    keep_float32(LIBRARY, {"table": "float32", "row": "float32"}, Checked(network, "8.6"))
    assert gathered.asked is DataType.FLOAT
    assert gathered.output_types == {0: DataType.FLOAT}
    assert compared.asked is None


@pytest.mark.parametrize("name", ["active-lm", "all-embedding", "active-grouped"])
def test_layers_are_as_precise_as_the_graph(half: Half, tmp_path: Path, name: str) -> None:
    """What is float32 there is so in every layer; the builder may choose for the rest."""
    bundle = copied(half, name, tmp_path)
    for graph, spec in bundle.manifest.graphs.items():
        if graph == "single" or graph.startswith(("project", "update", "decode-")):
            continue
        path = engine_worker.adapted(bundle.file(spec.file), tmp_path, None, legacy=True)
        proto = onnx.load(path, load_external_data=False)
        types = value_types(proto)
        assert {output for node in proto.graph.node for output in node.output} <= set(types)
        network = parsed(proto, types)
        engine_worker.float32_keeper(LIBRARY, path)(network=Checked(network, "8.6"))
        seen = set()
        for each in network.layers:
            tensors = [t for t in (*each.inputs, *each.outputs) if t and t.dtype in FLOATING]
            if each.type is LayerType.CAST:
                # Rounded anyway, or exact.
                assert each.asked is None
                assert each.inputs[0] is not None
                assert tensors[-1:] != each.outputs or each.inputs[0].dtype is not DataType.INT32
                continue
            wide = [t for t in tensors if t.dtype is DataType.FLOAT]
            assert not wide or wide == tensors, "the types of a layer are mixed"
            wanted = bool(wide) and each.type is not LayerType.SHAPE
            assert (each.asked is DataType.FLOAT) == wanted, (graph, [t.name for t in tensors])
            for index, tensor in enumerate(each.outputs):
                assert (index in each.output_types) == (wanted and tensor in wide)
            seen.add(wanted)
        assert True in seen, graph
        assert False in seen or graph == "entry"
