"""Whole-model graphs whose layers are traced once.

Tracing takes about a second a layer, and the layers of a model differ in their weights only. So a
whole-model graph is traced with a call in the place of each layer, :func:`call_layer`, and
:func:`with_layers` puts the graph of one layer there.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, nn

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.errors import ExportError
from sdt_deploy.exporters.layers import FusedLayer, HeadLayout, PackedLayer, Sight, not_later
from sdt_deploy.exporters.modules import GraphModule

_DOMAIN, _CALL, _NUMBER = "sdt_deploy", "Layer", "number"
_LAYER = "layers.0."
"""What the names of a layer's parameters begin with in :class:`LayerGraph`."""


class LayerGraph(GraphModule):
    """One layer over all places of a padded batch.

    Args:
        layer: any of the model's.
        d_model: width of the states.
        causal: whether later keys are hidden.
    """

    def __init__(self, layer: PackedLayer | FusedLayer, d_model: int, *, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.fused = isinstance(layer, FusedLayer)
        self.n_heads = layer.n_heads
        self.causal = causal
        self.rotary = isinstance(layer, PackedLayer) and bool(layer.frequencies)
        dtype = str(layer.query.weight.dtype).removeprefix("torch.")
        key_bias = TensorSpec(name="seen", axes=("batch", self.n_heads, "seq", 1), dtype=dtype)
        lengths = TensorSpec(name="seen", axes=("batch",), dtype="int64")
        padded = TensorSpec(name="states", axes=("batch", "seq", d_model), dtype=dtype)
        self.inputs = (padded, lengths if self.fused else key_bias)
        axes = ("batch", "seq") if self.fused else ("n_tokens",)
        self.outputs = (TensorSpec(name="updated_states", axes=(*axes, d_model), dtype=dtype),)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """Update ``states``.

        Args:
            states: ``[batch, seq, d_model]``.
            seen: the bias of :func:`~sdt_deploy.exporters.layers.key_bias`, or for fused layers
                ``[batch]`` int64, how many places of each sequence hold a token.

        Returns:
            The same, for layers that are not fused flattened to ``[batch · seq, d_model]``.
        """
        layer = self.layers[0]
        if self.fused:
            return layer(states, None, None, seen)
        batch, seq = seen.shape[0], seen.shape[-2]
        rows = states.reshape(-1, states.shape[-1])
        layout = HeadLayout(self.n_heads, batch=batch)
        causal = not_later(seq) if self.causal else None
        positions = None
        if self.rotary:
            positions = torch.arange(seq, dtype=torch.int32).expand(batch, seq).reshape(-1)
        sight = Sight(layout, layout, seen, causal, positions, positions)
        return layer(rows, rows, sight)


def call_layer(number: int, states: Tensor, seen: Tensor) -> Tensor:
    """Leave a place for a layer in a graph that is traced; it does not run in torch.

    Args:
        number: of the layer.
        states: ``[batch, seq, d_model]`` for fused layers, else ``[batch · seq, d_model]``.
        seen: as :class:`LayerGraph` takes it.
    """
    updated: Tensor = torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_CALL}",
        (states, seen),
        {_NUMBER: number},
        dtype=states.dtype,
        shape=states.shape,
    )
    return updated


def with_layers(whole: onnx.ModelProto, layer: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``whole`` with the graph of a layer in the place of each call.

    What depends on ``seen`` alone is there once for all layers that see the same.

    Args:
        whole: traced, with calls.
        layer: traced from :class:`LayerGraph`.

    Raises:
        ExportError: if the layer uses its states otherwise than expected.
    """
    states, seen = (value.name for value in layer.graph.input)
    output, nodes = layer.graph.output[0], list(layer.graph.node)
    if len(output.type.tensor_type.shape.dim) == 2:
        nodes, states = _of_rows(nodes, states, seen)
    parameters = [one for one in layer.graph.initializer if one.name.startswith(_LAYER)]
    constants = [one for one in layer.graph.initializer if not one.name.startswith(_LAYER)]
    of_layer = {states, *(one.name for one in parameters)}
    for node in nodes:
        if of_layer.intersection(node.input):
            of_layer.update(node.output)
    filled = onnx.ModelProto()
    filled.CopyFrom(whole)
    del filled.graph.node[:], filled.opset_import[:]
    filled.opset_import.extend(one for one in whole.opset_import if one.domain != _DOMAIN)
    initializers = {one.name: one for one in filled.graph.initializer}
    numbers: dict[str, int] = {}
    for node in whole.graph.node:
        if node.domain != _DOMAIN:
            filled.graph.node.append(node)
            continue
        number, is_new = node.attribute[0].i, node.input[1] not in numbers
        shared = f"seen.{numbers.setdefault(node.input[1], len(numbers))}."
        names = {"": "", states: node.input[0], seen: node.input[1], output.name: node.output[0]}
        names |= {one.name: f"layers.{one.name}" for one in constants}
        for name in {*(name for one in nodes for name in (*one.input, *one.output))} - names.keys():
            own = f"layers.{number}.{name.removeprefix(_LAYER)}"
            names[name] = own if name in of_layer else shared + name
        for one in nodes:
            if is_new or of_layer.intersection(one.input):
                filled.graph.node.append(_renamed(one, names))
        for tensor in (*parameters, *constants):
            initializers.setdefault(names[tensor.name], tensor)
    del filled.graph.initializer[:]
    for name, tensor in initializers.items():
        filled.graph.initializer.append(tensor)
        filled.graph.initializer[-1].name = name
    return filled


def _of_rows(
    nodes: list[onnx.NodeProto], states: str, seen: str
) -> tuple[list[onnx.NodeProto], str]:
    """Return all nodes but the one that makes rows of ``states``, and what the rows are called.

    Sizes are taken from ``seen [batch, n_heads, seq, 1]`` instead of ``[batch, seq, d_model]``.
    """
    left, rows = [], []
    for node in nodes:
        if states not in node.input:
            left.append(node)
        elif node.op_type == "Reshape":
            rows.append(node.output[0])
        elif node.op_type == "Shape" and (axis := _axis(node)) in (0, 1):
            at = 2 * axis
            size = onnx.helper.make_node("Shape", [seen], node.output, start=at, end=at + 1)
            left.append(size)
        else:
            raise ExportError(f"a traced layer uses its padded states in {node.op_type}")
    if len(rows) != 1:
        raise ExportError(f"a traced layer makes rows of its states {len(rows)} times, not once")
    return left, str(rows[0])


def _axis(shape: onnx.NodeProto) -> int | None:
    """Return the axis whose size a Shape node gives; None: not that of one alone."""
    ends = {one.name: one.i for one in shape.attribute}
    start = ends.get("start", 0)
    return start if ends.get("end") == start + 1 else None


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    renamed = onnx.NodeProto()
    renamed.CopyFrom(node)
    renamed.input[:] = [names[name] for name in node.input]
    renamed.output[:] = [names[name] for name in node.output]
    renamed.name = f"node_{renamed.output[0]}"
    return renamed
