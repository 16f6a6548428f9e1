"""What a layer in fused form does before and after its attention, each in one graph for all layers.

Layers have the same topology, so their parameters are inputs of these graphs. An engine then opens
two graphs instead of two for each layer, and keeps the scratch memory of two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sdt_deploy.bundle import PROJECT, UPDATE, TensorSpec
from sdt_deploy.config import ModelConfig, Precision
from sdt_deploy.exporters.layers import FusedLayer
from sdt_deploy.exporters.modules import GraphModule, states_of
from sdt_deploy.exporters.products import PackedLinear

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


class Projection(nn.Module):
    """Queries of the active rows, and keys and values of what they see.

    Queries come without bias: what attends adds it as it loads them.
    """

    def __init__(self, layer: FusedLayer) -> None:
        super().__init__()
        self.attention_norm = layer.attention_norm if layer.pre_norm else None
        self.query, self.key_value = layer.query.without_bias(), layer.key.beside(layer.value)

    def forward(self, states: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project ``states``, and ``context`` or the states again."""
        queries = self._normed(states)
        return self.query(queries), self.key_value(
            queries if context is None else self._normed(context)
        )

    def _normed(self, states: Tensor) -> Tensor:
        return states if self.attention_norm is None else self.attention_norm(states)


class Update(nn.Module):
    """The output projection and the feed-forward.

    What the feed-forward makes of the rows is the widest there is, so both forms of it are outputs:
    a runtime binds them to one buffer of its own, in which the activation runs in place.
    """

    def __init__(self, layer: FusedLayer) -> None:
        super().__init__()
        self.pre_norm = layer.pre_norm
        self.attention_norm = None if layer.pre_norm else layer.attention_norm
        self.output, self.feed_forward = layer.output, layer.feed_forward
        self.feed_forward_norm = layer.feed_forward_norm

    def forward(self, states: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update ``states`` by what attention has ``mixed`` for them.

        Also returns ``[1, n_tokens, d_ff]`` the product of the feed-forward's first layer, without
        bias, and what its activation makes of the sum.
        """
        if self.attention_norm is None:
            states = states + self.output(mixed)
            product, inner = self._inner(self.feed_forward_norm(states))
            return states + self.feed_forward.down(inner), product, inner
        states = _sum_normed(states, mixed, self.output, self.attention_norm)
        product, inner = self._inner(states)
        down = self.feed_forward.down
        return _sum_normed(states, inner, down, self.feed_forward_norm), product, inner

    def _inner(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        feed_forward = self.feed_forward
        product = rows @ feed_forward.up.weight
        return product, feed_forward.activated(feed_forward.up.biased(product))


def _sum_normed(states: Tensor, rows: Tensor, linear: PackedLinear, norm: Any) -> Tensor:
    """Return ``norm(states + linear(rows))``, the sums and the norm as one operator.

    It is ONNX Runtime's own, which it fuses these to by itself, except where the bias of the
    product is no constant. It exports only, and does not run in torch.
    """
    product = rows @ linear.weight
    found: Tensor = torch.onnx.ops.symbolic(
        f"{CONTRIB}::SkipLayerNormalization",
        (product, states, norm.weight, norm.bias, linear.bias),
        {"epsilon": norm.eps},
        dtype=states.dtype,
        shape=states.shape,
        version=1,
    )
    return found


class PieceGraph(GraphModule):
    """A part of a layer, whose parameters are the last inputs, by their names in the part.

    Args:
        part: of any layer; its parameters have the precision of the export.
        inputs: what it takes besides.
        outputs: what it returns.
    """

    def __init__(
        self, part: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        super().__init__()
        self._part = (part,)  # no submodule: its parameters are not the graph's
        self._n_states = len(inputs)
        parameters = tuple(
            TensorSpec(
                name=name,
                axes=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
            )
            for name, parameter in part.named_parameters()
        )
        self.inputs, self.outputs = (*inputs, *parameters), outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the part with these parameters."""
        states, parameters = tensors[: self._n_states], tensors[self._n_states :]
        names = [spec.name for spec in self.inputs[self._n_states :]]
        given = dict(zip(names, parameters, strict=True))
        found: tuple[Tensor, ...] = functional_call(self._part[0], given, states)
        return found


def piece_graphs(
    layer: FusedLayer, config: ModelConfig, precision: Precision
) -> dict[str, PieceGraph]:
    """Return both graphs by name; ``layer`` is any one."""
    states = partial(states_of, precision=precision)
    packed: tuple[str | int, ...] = (1, "n_tokens", config.d_model)
    wide: tuple[str | int, ...] = (1, "n_tokens", config.d_ff)
    places: tuple[str | int, ...] = ("batch", "max_context_seqlen", config.d_model)
    sees_all = config.context == "all"
    seen = places if sees_all else packed
    rows = states("hidden_states", *packed)
    projected = states("query", *packed), states("key_value", *seen[:-1], 2 * config.d_model)
    inner = states("up_product", *wide), states("inner_states", *wide)
    context = (states("context_states", *places),) * sees_all
    return {
        PROJECT: PieceGraph(Projection(layer), (rows, *context), projected),
        UPDATE: PieceGraph(
            Update(layer),
            (rows, states("mixed_states", *packed)),
            (states("updated_states", *packed), *inner),
        ),
    }
