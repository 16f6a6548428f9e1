"""Graphs as TensorRT takes them; inputs and outputs stay the same.

TensorRT's parser accepts the key lengths of ONNX's ``Attention`` and ignores them (TensorRT-RTX
1.7.1), so that an engine would also attend to padding. :func:`masked_attention` turns the lengths
into a mask, :func:`decomposed_attention` does without that operator. :func:`packed_attention` turns
padded attention into TensorRT's own ragged one. :func:`legacy_graph` is for the parser of 8.6, and
:func:`value_types` for its builder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sdt_deploy.errors import ExportError

REVISION = 1
"""Of what this module and :mod:`.engine_types` do to a graph; a part of the engines' keys."""
_MASK, _LENGTHS = 3, 6
"""Places of mask and key lengths among the inputs of ``Attention``."""


def has_attention(proto: onnx.ModelProto) -> bool:
    """Tell whether there is an ``Attention`` operator."""
    return any(node.op_type == "Attention" for node in proto.graph.node)


def can_be_packed(proto: onnx.ModelProto) -> bool:
    """Tell whether the graph is a stage with fused attention."""
    inputs = {value.name for value in proto.graph.input}
    return has_attention(proto) and {"gather_index", "scatter_index"} <= inputs


def masked_attention(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which a mask says which keys are seen, ``[batch, 1, 1, n_keys]`` bool.

    The build fails where TensorRT has no kernel for all of attention.
    """
    add = _Rewriter(proto)
    for node in proto.graph.node:
        node = add.copy(node)
        if node.op_type == "Attention" and _has_lengths(node):
            node.input[_MASK] = _seen(add, node)
            del node.input[_MASK + 1 :]
        add.nodes.append(node)
    return add.finished()


def decomposed_attention(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which attention is two products and a softmax, in float32.

    TensorRT-RTX 1.7.1 does so itself where it has no kernel and may (``TRT_decomposable``), but not
    where it has one that it then cannot build, as with heads of 12.
    """
    add = _Rewriter(proto)
    for node in proto.graph.node:
        if node.op_type == "Attention":
            _products(add, node)
        else:
            add.nodes.append(add.copy(node))
    return add.finished()


def packed_attention(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a stage whose queries are packed by sequence, without any padding.

    TensorRT wants the rows of a sequence next to each other and cumulative lengths. Both are
    computed from ``gather_index [batch, max_seqlen]`` and ``scatter_index [n_tokens]``: a place
    holds a row if that row says so too; places without one hold row 0. Keys are packed alike where
    they are the same rows (``context="active"``); else they stay padded, with lengths. Rows behind
    the last one are garbage, as they are on input.

    ``TRT_Attention`` takes the query ``[n_tokens, n_heads, head_dim]``, key, value, mask,
    cumulative query lengths and key lengths, and does not scale. That was learned from NvInfer.h
    11.1 and from the parser of TensorRT-RTX 1.7.1, which has no kernel for it.

    Raises:
        ExportError: if the graph is no stage with fused attention.
    """
    if not can_be_packed(proto):
        raise ExportError("only stages with fused attention can be packed")
    add = _Rewriter(proto)
    (attention,) = (node for node in proto.graph.node if node.op_type == "Attention")
    made_by = {node.output[0]: node for node in proto.graph.node}
    # What was laid out with padding, and the packed rows that it was made from.
    spread = {
        name: made_by[name].input[0]
        for name in attention.input[:3]
        if name in made_by and made_by[name].input[1:] == ["gather_index"]
    }
    flattened = next(n.output[0] for n in proto.graph.node if attention.output[0] in n.input)
    slot = ""
    for node in proto.graph.node:
        if node.output[0] in (*spread, flattened):
            continue
        if node is attention:
            slot = _ragged(add, attention, spread, output=flattened)
            continue
        node = add.copy(node)
        if node.input[0] == flattened:  # the Gather that brings rows back
            node.input[1] = slot
        add.nodes.append(node)
    return add.finished()


def legacy_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in opset 17 that TensorRT 8.6 reads as it is meant.

    Its parser ignores what it does not know: the range of ``Shape``, and the axes of ``ReduceMax``
    where they are an input, as they are since opset 18.
    """
    add = _Rewriter(proto)
    constants = {each.name: each for each in proto.graph.initializer}
    for node in proto.graph.node:
        node = add.copy(node)
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Shape" and attributes:
            places = list(range(attributes["start"], attributes["end"]))
            whole = add.shape(node.input[0])
            add("Gather", whole, add.integers(places), output=node.output[0])
            continue
        if node.op_type == "ReduceMax" and len(node.input) > 1:
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            del node.attribute[:]
            keepdims = attributes.get("keepdims", 1)
            node.attribute.append(helper.make_attribute("keepdims", keepdims))
            node.attribute.append(helper.make_attribute("axes", axes))
        add.nodes.append(node)
    made = add.finished()
    del made.opset_import[:]
    made.opset_import.append(helper.make_opsetid("", 17))
    return made


def value_types(proto: onnx.ModelProto) -> dict[str, str]:
    """Return the type of each value of a graph, as numpy calls it; weights need not be loaded."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {each.name: each.type.tensor_type.elem_type for each in values}
    types |= {each.name: each.data_type for each in graph.initializer}
    return {
        name: helper.tensor_dtype_to_np_dtype(element_type).name
        for name, element_type in types.items()
    }


def _has_lengths(attention: onnx.NodeProto) -> bool:
    return len(attention.input) > _LENGTHS and bool(attention.input[_LENGTHS])


def _seen(add: _Rewriter, attention: onnx.NodeProto) -> str:
    """Add the mask of the keys that are seen, ``[batch, 1, 1, n_keys]`` bool."""
    n_keys = add.size(attention.input[1], 1)
    places = add("Range", add.integers(0), n_keys, add.integers(1))
    lengths = add("Unsqueeze", attention.input[_LENGTHS], add.integers([1, 2, 3]))
    return add("Less", places, lengths)


def _products(add: _Rewriter, attention: onnx.NodeProto) -> None:
    """Add what computes the output of ``attention``."""
    query, key, value = attention.input[:3]
    n_heads = helper.get_node_attr_value(attention, "q_num_heads")

    def by_head(name: str, *, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        return add(
            "Transpose", add("Reshape", name, add.integers([0, 0, n_heads, -1])), perm=list(perm)
        )

    queries = by_head(query)
    head_dim = add("Cast", add.size(queries, 3), to=TensorProto.FLOAT)
    wide = add("Div", add("Cast", queries, to=TensorProto.FLOAT), add("Sqrt", head_dim))
    logits = add("MatMul", add("CastLike", wide, query), by_head(key, perm=(0, 2, 3, 1)))
    logits = add("Cast", logits, to=TensorProto.FLOAT)
    if _has_lengths(attention):
        hidden = add.constant(np.finfo(np.float32).min / 2, TensorProto.FLOAT)
        logits = add("Where", _seen(add, attention), logits, hidden)
    weights = add("CastLike", add("Softmax", logits, axis=-1), query)
    mixed = add("Transpose", add("MatMul", weights, by_head(value)), perm=[0, 2, 1, 3])
    add("Reshape", mixed, add.integers([0, 0, -1]), output=attention.output[0])


def _ragged(
    add: _Rewriter, attention: onnx.NodeProto, spread: Mapping[str, str], *, output: str
) -> str:
    """Add ragged attention; return the place of each row in its ``output [n_tokens, d_model]``."""
    query, key, value = attention.input[:3]
    n_heads = helper.get_node_attr_value(attention, "q_num_heads")
    width, element_type = add.states()
    head_dim = width // n_heads
    order, slot, cumulative = _packing(add, "key_lengths" if key in spread else None)

    def rows(name: str) -> str:
        ordered = add("Gather", spread[name], order, axis=0)
        return add("Reshape", ordered, add.integers([0, n_heads, head_dim]))

    def padded(name: str) -> str:
        by_head = add("Reshape", name, add.integers([0, 0, n_heads, head_dim]))
        return add("Transpose", by_head, perm=[0, 2, 1, 3])

    scaled = add("Mul", rows(query), add.constant(1 / math.sqrt(head_dim), element_type))
    if key in spread:
        form, lengths, keys = "packed_nhd", cumulative, (rows(key), rows(value))
    else:
        form, keys = "padded_bhnd", (padded(key), padded(value))
        lengths = add("Cast", "key_lengths", to=TensorProto.INT32)
    forms = {"query_form": "packed_nhd", "kv_form": form}
    mixed = add("TRT_Attention", scaled, *keys, "", cumulative, lengths, **forms)
    add("Reshape", mixed, add.integers([0, width]), output=output)
    return slot


def _packing(add: _Rewriter, counts: str | None) -> tuple[str, str, str]:
    """Compute how rows are packed by sequence.

    Args:
        add: takes the nodes.
        counts: ``[batch]`` int64, rows of each sequence; None: count them.

    Returns:
        ``order [n_tokens]``, the row at each packed place; ``slot [n_tokens]``, the packed place of
        each row, both int64; ``cumulative [batch + 1]`` int32.
    """
    zero, one = add.integers(0), add.integers(1)
    batch, longest = add.size("gather_index", 0), add.size("gather_index", 1)
    n_tokens = add.size("scatter_index", 0)
    place_of = add("Cast", "scatter_index", to=TensorProto.INT64)
    row_at = add("Reshape", add("Cast", "gather_index", to=TensorProto.INT64), add.integers([-1]))
    if counts is None:
        places = add("Range", zero, add("Mul", batch, longest), one)
        held = add("Equal", add("Gather", place_of, row_at, axis=0), places)
        grid = add("Reshape", add("Cast", held, to=TensorProto.INT64), add.shape("gather_index"))
        counts = add("ReduceSum", grid, add.integers([1]), keepdims=0)
    ends = add("CumSum", counts, zero)
    bounds = add("Concat", add.integers([0]), ends, axis=0)
    packed = add("Range", zero, n_tokens, one)
    behind = add("GreaterOrEqual", add("Unsqueeze", packed, add.integers([1])), ends)
    passed = add(
        "ReduceSum", add("Cast", behind, to=TensorProto.INT64), add.integers([1]), keepdims=0
    )
    sequence = add("Min", passed, add("Sub", batch, one))
    within = add("Sub", packed, add("Gather", bounds, sequence, axis=0))
    within = add("Min", within, add("Sub", longest, one))
    order = add("Gather", row_at, add("Add", add("Mul", sequence, longest), within), axis=0)
    own = add("Div", place_of, longest)
    start = add("Gather", bounds, own, axis=0)
    slot = add("Add", start, add("Sub", place_of, add("Mul", own, longest)))
    return order, slot, add("Cast", bounds, to=TensorProto.INT32)


class _Rewriter:
    """Collects the nodes of a changed graph; called with an operator it adds one."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self._constants: dict[bytes, onnx.TensorProto] = {}
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        name = output or f"engine_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def copy(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Return a copy that may be changed; it is not added."""
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        return copied

    def constant(self, value: npt.ArrayLike, element_type: int) -> str:
        """Return a constant; equal ones exist once."""
        array = np.array(value, dtype=helper.tensor_dtype_to_np_dtype(element_type))
        tensor = numpy_helper.from_array(array)
        key = tensor.SerializeToString()
        if key not in self._constants:
            tensor.name = f"engine_constant_{len(self._constants)}"
            self._constants[key] = tensor
        return self._constants[key].name

    def integers(self, value: int | Sequence[int]) -> str:
        """Return an int64 constant."""
        return self.constant(value, TensorProto.INT64)

    def states(self) -> tuple[int, int]:
        """Return width and element type of the hidden states."""
        (states,) = (value for value in self._proto.graph.input if value.name == "hidden_states")
        return states.type.tensor_type.shape.dim[-1].dim_value, states.type.tensor_type.elem_type

    def shape(self, name: str) -> str:
        """Return the shape of a tensor."""
        return self("Shape", name)

    def size(self, name: str, axis: int) -> str:
        """Return the size of an axis, a scalar."""
        return self("Squeeze", self("Shape", name, start=axis, end=axis + 1))

    def finished(self) -> onnx.ModelProto:
        """Return the graph with the collected nodes."""
        made = onnx.ModelProto()
        made.CopyFrom(self._proto)
        del made.graph.node[:]
        made.graph.node.extend(self.nodes)
        made.graph.initializer.extend(self._constants.values())
        return made
