"""The whole sparse loop as one ONNX graph, for engines without our runtime around them.

The graph takes and gives what ``masked`` does, but computes active rows only. Tokens become rows
sorted by falling score, so the active rows of every layer are the first ones. Inside its sequence a
token's place is its rank, so the active tokens of a sequence hold its first places. Therefore one
grid ``[batch, seq]`` of row numbers serves all layers: a layer takes the first columns, as many as
its longest sequence has active tokens, and hides the places whose row is not active.

The order of tokens inside a sequence is lost on the way; only causal attention would need it.

At small sizes time goes with the number of nodes, and the form follows from that
(``docs/decisions/009-single-file.md``). Below, ``L`` is the number of layers and ``h`` of heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

from sdt_deploy.config import ModelConfig
from sdt_deploy.exporters.baselines import MaskedGraph
from sdt_deploy.exporters.builder import GraphBuilder
from sdt_deploy.exporters.onnx import parameters_of

HIDDEN = float(np.finfo(np.float32).min / 2)
"""Bias of a key that is not seen: so small that its weight is 0, without reaching an infinity."""
GEMM_BELOW = 128
"""Models narrower than this have a product and its bias as one node. On many rows that is slower,
but with so few operations the number of nodes decides; ``docs/decisions/009-single-file.md``."""
_END = 2**62
"""As the end of a slice: all the rest."""
_BOOL, _FLOAT, _INT32, _INT64 = (
    onnx.TensorProto.BOOL,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
)


def single_graph(
    module: MaskedGraph, config: ModelConfig, *, opset: int, to_quantize: bool = False
) -> onnx.ModelProto:
    """Build the graph.

    Args:
        module: the same function in float32; gives parameters, inputs and outputs.
        config: of the model.
        opset: of the file, 18 or newer.
        to_quantize: all products of the layers are MatMul nodes, as
            :func:`sdt_deploy.exporters.quantization.quantize` takes them.
    """
    with_gemm = config.d_model < GEMM_BELOW and not to_quantize
    builder = _SingleGraph(config, GraphBuilder(parameters_of(module)), with_gemm=with_gemm)
    builder.build()
    return builder.add.model(module.inputs, module.outputs, opset=opset)


@dataclass(frozen=True, kw_only=True)
class _Route:
    """Names of the values that place the rows; lists have an entry for each layer."""

    states: str
    """``[n_rows, d_model]``, the embedded tokens; padding comes last."""
    row_of: str
    """``[batch, seq]``, the row of each token."""
    n_active: list[str]
    """``[1]`` each, active rows."""
    width: list[str]
    """``[1]`` each, the largest number of active tokens in a sequence."""
    scatter_index: list[str]
    """``[n_rows]`` each, the flat place of each row in ``[batch, width]``."""
    gather_index: list[str]
    """``[1, batch, h, seq]`` each, the slice of queries (and, with context ``active``, of keys and
    values) at each place; slices are as long as a head."""
    key_bias: list[str]
    """``[…, batch, 1, 1, seq]`` each, 0 or :data:`HIDDEN`."""
    context_index: str = ""
    """``[batch, h, seq]`` (context ``all``), the slice of keys and values at each place."""


class _SingleGraph:
    def __init__(self, config: ModelConfig, builder: GraphBuilder, *, with_gemm: bool) -> None:
        self.config = config
        self.with_gemm = with_gemm
        self.add = builder
        self.sees_all = config.context == "all"
        self.start = builder.constant([0])
        self.flat = builder.constant([-1])
        self.one = builder.constant(1)

    def build(self) -> None:
        add, config = self.add, self.config
        route = self.route(self.entry())
        states, row_of, finished = route.states, route.row_of, []
        if self.sees_all:
            n_tokens = self.n_tokens()
            states = add("Slice", states, self.start, add("Reshape", n_tokens, self.flat))
            row_of = add("Min", row_of, add("Sub", n_tokens, self.one))
        for i in range(config.n_layers):
            rest = add("Slice", states, route.n_active[i], add.constant([_END]))
            updated = self.layer(i, states, route)
            if self.sees_all:
                states = add("Concat", updated, rest, axis=0)
            else:
                states = updated
                finished.append(rest)
        if not self.sees_all:
            states = add("Concat", states, *reversed(finished), axis=0)
        self.head(states, row_of)

    def entry(self) -> str:
        """Embed ``[batch, seq, d_model]`` and score; the scores are an output of the graph."""
        add, config = self.add, self.config
        positions = add("CumSum", "attention_mask", self.one, exclusive=1)
        if config.position_offset:
            offset = add.constant(config.position_offset, "int32")
            positions = add("Add", positions, offset)
        tokens = add("Gather", add.parameter("embeddings.token.weight"), "input_ids")
        places = add("Gather", add.parameter("embeddings.position.weight"), positions)
        states = add("Add", tokens, places)
        if config.n_token_types:
            types = add.parameter("embeddings.token_type.weight")
            states = add("Add", states, add("Gather", types, "token_type_ids"))
        if config.embedding_norm:
            states = self.norm(states, "embeddings.norm")
        if config.probe == "none":
            ones = onnx.numpy_helper.from_array(np.ones(1, dtype=np.float32))
            add("ConstantOfShape", add("Shape", "input_ids"), value=ones, name="scores")
            return states
        # A sum rather than a product, as in the oracle: its rounding does not depend on the batch.
        product = add("Mul", states, add.parameter("scorer.weight"))
        logits = add("ReduceSum", product, self.flat, keepdims=0)
        logits = add("Add", logits, add.parameter("scorer.bias"))
        if not config.pinned_token_ids:
            add("Sigmoid", logits, name="scores")
            return states
        ids = add("Unsqueeze", "input_ids", self.flat)
        equal = add("Equal", ids, add.parameter("scorer.pinned_token_ids"))
        found = add("ReduceMax", add("Cast", equal, to=_INT32), self.flat, keepdims=0)
        pinned = add("Cast", found, to=_BOOL)
        add("Where", pinned, add.constant(1.0, "float32"), add("Sigmoid", logits), name="scores")
        return states

    def n_tokens(self) -> str:
        """Count the tokens of the batch: a scalar."""
        mask = self.add("Cast", "attention_mask", to=_INT64)
        return self.add("ReduceSum", mask, self.add.constant([0, 1]), keepdims=0)

    def route(self, embedded: str) -> _Route:
        """Sort the tokens and make the indices of all layers at once."""
        add, n_layers = self.add, self.config.n_layers
        is_token = add("Cast", "attention_mask", to=_BOOL)
        scores = add("Where", is_token, "scores", add.constant(-math.inf, "float32"))
        seq = add("Shape", scores, start=1, end=2)
        if self.config.selection == "capacity":
            scores = self.standings(scores, is_token, seq)
        # Rows: tokens by falling score, those of equal score in their order, padding last.
        flat = add("Reshape", scores, self.flat)
        _, order = add.several(2, "TopK", flat, add("Shape", flat), axis=0)
        count = add("Range", add.constant(0), add("Size", scores), self.one)
        row_of = add("ScatterElements", order, order, count)
        row_of = add("Reshape", row_of, add("Shape", "input_ids"))
        # Places: the rows of each sequence in rising order.
        grid, _ = add.several(2, "TopK", row_of, seq, axis=1, largest=0)
        places = add("Reshape", grid, self.flat)
        place_of = add("ScatterElements", places, places, count)
        states = add("Reshape", embedded, add.constant([-1, self.config.d_model]))
        states = add("Gather", states, order)
        # Counts: active tokens by layer and sequence [L, batch].
        limits = add("Unsqueeze", "thresholds", add.constant([1, 2]))
        active = add("Cast", add("Greater", scores, limits), to=_INT64)
        counts = add("ReduceSum", active, add.constant([2]), keepdims=0)
        n_active = add("ReduceSum", counts, add.constant([1]), keepdims=0)
        width = add("ReduceMax", counts, add.constant([1]), keepdims=0)
        # The place of a row in a grid of [batch, width]: sequence · width + rank.
        first = add("Mul", add("Div", order, seq), add("Unsqueeze", width, add.constant([1])))
        scatter = add("Reshape", add("Add", first, add("Mod", place_of, seq)), self.flat)
        by_layer = add("Unsqueeze", n_active, add.constant([1, 2, 3]))
        keys = add("Unsqueeze", grid, add.constant([1, 2]))
        grid = add("Unsqueeze", grid, add.constant([1]))
        gather = self.slices(grid, by_layer)
        if self.sees_all:
            n_tokens = self.n_tokens()
            key_bias = [self.key_bias(keys, n_tokens)] * n_layers
            context_index = self.slices(grid, n_tokens)
        else:
            by_layer = add("Unsqueeze", by_layer, add.constant([1]))
            key_bias = add.split(self.key_bias(keys, by_layer), n_layers)
            context_index = ""
        return _Route(
            states=states,
            row_of=row_of,
            n_active=add.split(n_active, n_layers),
            width=add.split(width, n_layers),
            scatter_index=add.split(scatter, n_layers),
            gather_index=add.split(gather, n_layers),
            key_bias=key_bias,
            context_index=context_index,
        )

    def standings(self, scores: str, is_token: str, seq: str) -> str:
        """Rank the tokens of each sequence, see :func:`sdt_deploy.model.blocks.standings`."""
        add = self.add
        half, whole = (add.constant(x, "float32") for x in (0.5, 1.0))
        _, order = add.several(
            2, "TopK", scores, seq, axis=1
        )  # of equal ones the first comes first
        places = add("Range", add.constant(0), add("Squeeze", seq), self.one)
        places = add("Expand", places, add("Shape", scores))
        rank = add("Cast", add("ScatterElements", order, order, places, axis=1), to=_FLOAT)
        lengths = add("ReduceSum", add("Cast", is_token, to=_FLOAT), add.constant([1]), keepdims=1)
        standing = add("Sub", whole, add("Div", add("Add", rank, half), lengths))
        standing = add("Where", add("Less", rank, half), whole, standing)
        return add("Where", is_token, standing, add.constant(-math.inf, "float32"))

    def key_bias(self, grid: str, n_rows: str) -> str:
        """Hide the places whose row is not among the first ``n_rows``."""
        constant = self.add.constant
        seen = self.add("Less", grid, n_rows)
        return self.add("Where", seen, constant(0.0, "float32"), constant(HIDDEN, "float32"))

    def slices(self, grid: str, n_rows: str) -> str:
        """Turn rows ``[batch, 1, seq]`` into the slices of their heads ``[…, batch, h, seq]``.

        Hidden places get a row that exists.
        """
        add, n_heads = self.add, self.config.n_heads
        clamped = add("Min", grid, add("Sub", n_rows, self.one))
        heads = add.constant(np.arange(n_heads)[:, None])
        return add("Add", add("Mul", clamped, add.constant(n_heads)), heads)

    def layer(self, i: int, states: str, route: _Route) -> str:
        """Update the active rows, the first of ``states``; return these only."""
        add, config, prefix = self.add, self.config, f"layers.{i}."
        is_pre = config.norm_placement == "pre"
        n_active = route.n_active[i]
        active = add("Slice", states, self.start, n_active)
        context = states if self.sees_all else active
        if is_pre:
            context = self.norm(context, f"{prefix}attention_norm")
        mixed = self.attention(i, context, active, route)
        active = add("Add", active, self.linear(mixed, f"{prefix}output"))
        if not is_pre:
            active = self.norm(active, f"{prefix}attention_norm")
        inner = self.norm(active, f"{prefix}feed_forward_norm") if is_pre else active
        inner = self.linear(inner, f"{prefix}feed_forward.up")
        if config.activation == "relu":
            inner = add("Relu", inner)
        elif config.activation == "gelu_tanh":
            scale, weight, half = (
                add.constant(x, "float32") for x in (math.sqrt(2 / math.pi), 0.044715, 0.5)
            )
            cube = add("Mul", add("Mul", add("Mul", inner, inner), inner), weight)
            tanh = add("Tanh", add("Mul", add("Add", cube, inner), scale))
            tanh = add("Add", tanh, add.constant(1.0, "float32"))
            inner = add("Mul", add("Mul", inner, tanh), half)
        else:  # the form that ONNX Runtime knows as one operator
            root, half = (add.constant(x, "float32") for x in (math.sqrt(2), 0.5))
            erf = add("Add", add("Erf", add("Div", inner, root)), add.constant(1.0, "float32"))
            inner = add("Mul", add("Mul", inner, erf), half)
        active = add("Add", active, self.linear(inner, f"{prefix}feed_forward.down"))
        return active if is_pre else self.norm(active, f"{prefix}feed_forward_norm")

    def attention(self, i: int, context: str, active: str, route: _Route) -> str:
        """Mix the values of ``context`` for the active rows: ``[n_active, d_model]``."""
        add, config, prefix = self.add, self.config, f"layers.{i}."
        head_dim = config.d_model // config.n_heads
        wide = add.constant([3])
        index = add("Slice", route.gather_index[i], self.start, route.width[i], wide)
        bias, context_index = route.key_bias[i], route.context_index
        if not self.sees_all:
            bias = add("Slice", bias, self.start, route.width[i], add.constant([4]))
            context_index = index
        elif config.norm_placement == "pre":
            active = add("Slice", context, self.start, route.n_active[i])

        def spread(rows: str, name: str, index: str) -> str:
            product = self.linear(rows, f"{prefix}{name}")
            return add("Gather", add("Reshape", product, add.constant([-1, head_dim])), index)

        query = spread(active if self.sees_all else context, "query", index)
        key, value = (spread(context, name, context_index) for name in ("key", "value"))
        query = add("Mul", query, add.constant(1 / math.sqrt(head_dim), "float32"))
        swapped = [0, 1, 3, 2] if self.sees_all else [0, 1, 2, 4, 3]
        logits = add("MatMul", query, add("Transpose", key, perm=swapped))
        weights = add("Softmax", add("Add", logits, bias), axis=-1)
        mixed = add("Transpose", add("MatMul", weights, value), perm=[0, 1, 3, 2, 4])
        mixed = add("Reshape", mixed, add.constant([-1, config.d_model]))
        rows = add("Slice", route.scatter_index[i], self.start, route.n_active[i])
        return add("Gather", mixed, rows)

    def head(self, states: str, row_of: str) -> None:
        """Compute the output of the graph from the last states of all rows."""
        add, head = self.add, self.config.head
        if head.pooling == "cls":
            row_of = add("Gather", row_of, add.constant(0), axis=1)
        states = add("Gather", states, row_of)
        if self.config.final_norm:
            states = self.norm(states, "head.norm")
        if head.pooling == "mean":
            mask, axis = add("Cast", "attention_mask", to=_FLOAT), add.constant([1])
            weighted = add("Mul", states, add("Unsqueeze", mask, add.constant([2])))
            total = add("ReduceSum", weighted, axis, keepdims=0)
            states = add("Div", total, add("ReduceSum", mask, axis, keepdims=1))
        if head.dense_tanh:
            states = add("Tanh", self.linear(states, "head.dense"))
        if add.has("head.projection.weight"):
            states = self.projection(states)
        if head.normalize:
            squares = add("ReduceSum", add("Mul", states, states), self.flat, keepdims=1)
            norm = add("Max", add("Sqrt", squares), add.constant(1e-12, "float32"))
            states = add("Div", states, norm)
        add("Identity", states, name="output")

    def projection(self, states: str) -> str:
        """Project to logits; a bias is one more row of the weight, multiplied by 1.

        Logits are the widest values of the graph: adding to them would be another pass.
        """
        add, weight = self.add, self.add.parameter("head.projection.weight")
        if not self.config.head.bias:
            return add("MatMul", states, weight)
        bias = add("Unsqueeze", add.parameter("head.projection.bias"), self.start)
        ends = [0, 0, 0, 1] if self.config.head.per_sequence else [0, 0, 0, 0, 0, 1]
        padded = add("Pad", states, add.constant(ends), add.constant(1.0, "float32"))
        return add("MatMul", padded, add("Concat", weight, bias, axis=0))

    def norm(self, rows: str, name: str) -> str:
        """LayerNorm over the last axis."""
        weight, bias = self.add.parameter(f"{name}.weight"), self.add.parameter(f"{name}.bias")
        return self.add("LayerNormalization", rows, weight, bias, axis=-1, epsilon=self.config.eps)

    def linear(self, rows: str, name: str) -> str:
        """``rows [n, in] @ weight + bias``."""
        weight, bias = self.add.parameter(f"{name}.weight"), self.add.parameter(f"{name}.bias")
        if self.with_gemm:
            return self.add("Gemm", rows, weight, bias)
        return self.add("Add", self.add("MatMul", rows, weight), bias)
