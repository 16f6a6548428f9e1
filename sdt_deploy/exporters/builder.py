"""Builds an ONNX graph node by node, where tracing cannot: sizes inside depend on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.exporters.onnx import element_type

IR_VERSION = 10
"""Of the file; the tracer writes the same."""


class GraphBuilder:
    """Collects the nodes, constants and parameters of one graph. Values are known by their names.

    Args:
        parameters: what :meth:`parameter` may name. Only their shapes and types are read; the
            writer of the weights fills them in.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray]) -> None:
        self._parameters = parameters
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, called ``name`` if that matters; return its name."""
        output = name or f"{op.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def several(self, n_outputs: int, op: str, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node with several outputs; return their names."""
        outputs = [f"{op.lower()}_{len(self._nodes)}_{i}" for i in range(n_outputs)]
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **attributes))
        return outputs

    def split(self, value: str, parts: int, axis: int = 0) -> list[str]:
        """Cut ``value`` into equal parts."""
        return self.several(parts, "Split", value, axis=axis, num_outputs=parts)

    def constant(self, values: npt.ArrayLike, dtype: str = "int64") -> str:
        """Return a constant; equal ones exist once."""
        array = np.asarray(values, dtype=dtype)
        key = dtype, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = name = f"constant_{len(self._constants)}"
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def parameter(self, name: str) -> str:
        """Return the parameter ``name``, which has to exist."""
        if name not in self._initializers:
            array = self._parameters[name]
            self._initializers[name] = onnx.TensorProto(
                name=name, dims=array.shape, data_type=element_type(array.dtype.name)
            )
        return name

    def has(self, name: str) -> bool:
        """Tell whether there is a parameter ``name``."""
        return name in self._parameters

    def model(
        self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, opset: int
    ) -> onnx.ModelProto:
        """Return the graph as a model with these inputs and outputs."""
        graph = helper.make_graph(
            self._nodes,
            "graph",
            [_value(spec) for spec in inputs],
            [_value(spec) for spec in outputs],
            initializer=list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=IR_VERSION,
            producer_name="sdt-deploy",
        )


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, element_type(spec.dtype), spec.axes)
