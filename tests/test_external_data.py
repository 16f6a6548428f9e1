"""A graph that names a file for its weights is not believed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sdt_deploy.bundle import WEIGHTS, Bundle
from sdt_deploy.errors import BundleIntegrityError
from sdt_deploy.external_data import external_tensors
from tests.samples import GOLDEN, sign_bundle


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "/etc/passwd", "only weights.bin"),
        ("location", "../weights.bin", "only weights.bin"),
        ("location", "folder/../weights.bin", "only weights.bin"),
        ("location", "link", "only weights.bin"),
        ("location", "entry.onnx", "only weights.bin"),
        ("location", "*/_ORT_MEM_ADDR_/*", "only weights.bin"),
        ("location", "", "only weights.bin"),
        ("location", "a\0b", "only weights.bin"),
        ("offset", "999999999999", "weights.bin has"),
        ("offset", str(2**63 - 8), "weights.bin has"),
        ("offset", str(2**64 - 8), "no sizes in bytes"),
        ("offset", "-4096", "no sizes in bytes"),
        ("offset", "²", "no sizes in bytes"),
        ("length", "999999999999", "weights.bin has"),
        ("length", "", "no sizes in bytes"),
        ("checksum", "0", "for location, offset and length"),
    ],
)
def test_places_outside(tmp_path: Path, key: str, value: str, message: str) -> None:
    """With hashes and digest that are right, as who makes a bundle can have them."""
    bundle = Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))
    (bundle.parent / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes())
    proto = onnx.load(str(bundle / "stage-01.onnx"), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.external_data)
    entries = [entry for entry in tensor.external_data if entry.key == key]
    (entries or [tensor.external_data.add(key=key)])[0].value = value
    (bundle / "stage-01.onnx").write_bytes(proto.SerializeToString())
    sign_bundle(bundle)
    (bundle / "link").symlink_to(bundle.parent / WEIGHTS)  # not listed: a link in a list is refused
    for check_files in (True, False):
        with pytest.raises(BundleIntegrityError, match=message):
            Bundle.open(bundle, check_files=check_files)


def _outside(name: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, dtype=np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": f"at {name}", "offset": "0", "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_every_place_that_may_hold_a_tensor_is_seen() -> None:
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=_outside("attribute in a subgraph"))],
        "inner",
        [],
        [],
        initializer=[_outside("initializer of a subgraph")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner)
    node.attribute.append(helper.make_attribute("many", [_outside("list of tensors")]))
    node.attribute.append(helper.make_attribute("graphs", [inner]))
    sparse = helper.make_sparse_tensor(_outside("values"), _outside("indices"), [3])
    node.attribute.append(helper.make_attribute("sparse", sparse))
    node.attribute.append(helper.make_attribute("sparses", [sparse]))
    graph = helper.make_graph([node], "g", [], [], initializer=[_outside("initializer")])
    graph.sparse_initializer.append(sparse)
    model = helper.make_model(graph)
    model.functions.add(name="f", domain="d").node.append(
        helper.make_node("Constant", [], ["c"], value=_outside("function"))
    )
    model.functions[0].attribute_proto.append(
        helper.make_attribute("default", _outside("default of a function"))
    )
    model.training_info.add().algorithm.initializer.append(_outside("training"))
    model.training_info[0].initialization.initializer.append(_outside("start of training"))
    seen = [tensor.location for tensor in external_tensors(model.SerializeToString())]
    assert set(seen) == {
        f"at {name}"
        for name in (
            "attribute in a subgraph",
            "initializer of a subgraph",
            "list of tensors",
            "values",
            "indices",
            "initializer",
            "function",
            "default of a function",
            "training",
            "start of training",
        )
    }
    assert len(seen) == 4 + 1 + 1 + 3 * 2 + 4


def test_the_scan_agrees_with_onnx() -> None:
    for path in sorted(GOLDEN.glob("*.onnx")):
        graph = onnx.load(str(path), load_external_data=False).graph
        expected = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.external_data
        }
        found = {t.name: t for t in external_tensors(path.read_bytes())}
        assert found.keys() == expected.keys()
        for name, entries in expected.items():
            assert str(found[name].offset) == entries["offset"]
            assert str(found[name].length) == entries["length"]


def test_endless_nesting_is_refused() -> None:
    graph = b""
    for _ in range(100):  # GraphProto.node.attribute.g
        for field in (6, 5, 1):
            graph = bytes([field << 3 | 2]) + _varint(len(graph)) + graph
    with pytest.raises(ValueError, match="nested too deeply"):
        list(external_tensors(b"\x3a" + _varint(len(graph)) + graph))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@given(st.binary(max_size=60), st.data())
def test_any_bytes(content: bytes, data: st.DataObject) -> None:
    graph = bytearray((GOLDEN / "entry.onnx").read_bytes())
    at = data.draw(st.integers(0, len(graph)))
    graph[at : at + data.draw(st.integers(0, 60))] = content
    for candidate in (content, bytes(graph)):
        with contextlib.suppress(ValueError):
            list(external_tensors(candidate))
