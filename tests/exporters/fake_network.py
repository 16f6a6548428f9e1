"""Networks as TensorRT 8.6 makes them of graphs, as far as the precision of their layers goes.

Its parser names tensors after the graph's values, gives constants and what layers of its own make
names that the graph does not have, and has int32 for int64. Members and signatures are those of the
real library, see :mod:`tests.runtime.fake_tensorrt`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import onnx

from tests.runtime.fake_tensorrt import Checked, DataType

VERSION = "8.6"
TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "int64": DataType.INT32,
    "int32": DataType.INT32,
    "bool": DataType.BOOL,
}
FLOATING = DataType.FLOAT, DataType.HALF
WITH_A_CONSTANT = {"Add", "Mul", "Div", "LayerNormalization"}
"""Whose constants are broadcast by a layer of the parser's own."""


class LayerType(enum.Enum):
    CONSTANT = 0
    SHUFFLE = 1
    CAST = 2
    SHAPE = 3
    OTHER = 4


class ITensor:
    is_shape_tensor = False

    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...] = ()) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape


class ILayer:
    """``asked`` is None until a precision is set; until then ``by_itself`` is the precision."""

    def __init__(
        self,
        kind: LayerType,
        inputs: Sequence[ITensor | None],
        outputs: Sequence[ITensor],
        version: str = VERSION,
    ) -> None:
        self.version = version
        self.type = kind
        self.name = outputs[0].name
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        tensors = [each for each in (*inputs, *outputs) if each is not None]
        computes = any(each.dtype in FLOATING for each in tensors)
        self.by_itself = DataType.FLOAT if computes else DataType.INT32
        self.asked: DataType | None = None
        self.output_types: dict[int, DataType] = {}

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def precision(self) -> DataType:
        return self.asked or self.by_itself

    @property
    def precision_is_set(self) -> bool:
        return self.asked is not None

    @precision.setter
    def precision(self, value: DataType) -> None:
        floats = any(each.dtype in FLOATING for each in self.outputs)
        assert floats or self.by_itself in FLOATING, "a layer of integers has no other precision"
        assert self.type is not LayerType.SHAPE
        self.asked = value

    def get_input(self, index: int) -> Any:
        tensor = self.inputs[index]
        return None if tensor is None else Checked(tensor, self.version)

    def get_output(self, index: int) -> Any:
        return Checked(self.outputs[index], self.version)

    def set_output_type(self, index: int, dtype: DataType) -> None:
        assert self.outputs[index].dtype in FLOATING, "only a floating-point output has a choice"
        self.output_types[index] = dtype


class INetworkDefinition:
    def __init__(self, layers: Sequence[ILayer], version: str = VERSION) -> None:
        self.version = version
        self.layers = list(layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Any:
        return Checked(self.layers[index], self.version)

    __getitem__ = get_layer


def parsed(
    proto: onnx.ModelProto, types: dict[str, str], version: str = VERSION
) -> INetworkDefinition:
    """Return the network of a graph; ``types`` has all of its values."""
    layers: list[ILayer] = []
    tensors = {
        value.name: ITensor(value.name, TYPES[types[value.name]]) for value in _values(proto)
    }
    constants = {each.name for each in proto.graph.initializer}

    def own(kind: LayerType, source: ITensor | None, dtype: DataType) -> ITensor:
        made = ITensor(f"(Unnamed Layer* {len(layers)}) [{kind.name}]_output", dtype)
        # Without a source it is a constant; an input that was left out is None.
        layers.append(ILayer(kind, [] if source is None else [source, None], [made], version))
        return made

    for name in constants:
        tensors[name] = own(LayerType.CONSTANT, None, TYPES[types[name]])
    for node in proto.graph.node:
        inputs = [tensors[name] if name else None for name in node.input]
        outputs = [ITensor(name, TYPES[types[name]]) for name in node.output]
        tensors |= {tensor.name: tensor for tensor in outputs}
        if node.op_type in WITH_A_CONSTANT:
            inputs = [
                own(LayerType.SHUFFLE, tensor, tensor.dtype)
                if tensor is not None and name in constants
                else tensor
                for name, tensor in zip(node.input, inputs, strict=True)
            ]
        if node.op_type == "Softmax":
            assert inputs[0] is not None
            flat = own(LayerType.SHUFFLE, inputs[0], inputs[0].dtype)
            mixed = own(LayerType.OTHER, flat, flat.dtype)
            layers.append(ILayer(LayerType.SHUFFLE, [mixed], outputs, version))
            continue
        kind = {"Cast": LayerType.CAST, "Shape": LayerType.SHAPE}.get(node.op_type, LayerType.OTHER)
        layers.append(ILayer(kind, inputs, outputs, version))
    return INetworkDefinition(layers, version)


def _values(proto: onnx.ModelProto) -> Sequence[Any]:
    return (*proto.graph.input, *proto.graph.initializer)
