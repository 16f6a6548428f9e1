"""The model cut into the modules that become ONNX graphs.

Every module names its inputs and outputs with their axes as
:class:`~sdt_deploy.bundle.TensorSpec`; exporter, manifest and runtime all read that one list.
Parameters are copies of the oracle's; only the form of the computation differs (see
:mod:`sdt_deploy.exporters.layers`).

Everything up to the scores is float32 in every precision, and so are pooling, normalisation and
outputs. The states between graphs have the precision of the export.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdt_deploy.bundle import ATTENTION_LAYOUTS, FORMAT_VERSION, GraphSpec, TensorSpec
from sdt_deploy.combinations import can_generate, check_combination
from sdt_deploy.config import ExportConfig, ModelConfig, Precision
from sdt_deploy.exporters.baselines import DenseGraph, MaskedGraph
from sdt_deploy.exporters.decoding import DecodeGraph
from sdt_deploy.exporters.layers import (
    FusedLayer,
    HeadLayout,
    PackedLayer,
    Sight,
    gather_rows,
    narrowed,
    not_later,
    within,
)
from sdt_deploy.exporters.modules import (
    GraphModule,
    PackedHead,
    Probes,
    float32,
    int32,
    scores_of,
    states_of,
    torch_dtype,
)
from sdt_deploy.exporters.pieces import piece_graphs
from sdt_deploy.exporters.repeated import LayerGraph
from sdt_deploy.model.blocks import Scorer
from sdt_deploy.model.transformer import SparseDepthTransformer


def _layout(config: ModelConfig, length: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        int32("gather_index", "batch", config.n_heads, length),
        int32("scatter_index", "n_tokens", config.n_heads),
    )


def _bias(config: ModelConfig, length: str, *outer: int) -> TensorSpec:
    return float32("key_bias", *outer, "batch", config.n_heads, length, 1)


class EntryGraph(GraphModule):
    """Ids to hidden states and scores."""

    def __init__(
        self, model: SparseDepthTransformer, precision: Precision, axes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.dtype = torch_dtype(precision)
        self.embeddings = model.embeddings
        self.scorer = model.scorer
        config = model.config
        self.has_places = config.rotary is None
        names = ["position_ids"] * self.has_places + ["token_type_ids"] * (config.n_token_types > 0)
        self.inputs = tuple(int32(name, *axes) for name in ("input_ids", *names))
        self.outputs = (
            states_of("hidden_states", *axes, config.d_model, precision=precision),
            scores_of(config, *axes),
        )

    def forward(self, input_ids: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """Embed and score tokens, packed, or for fused stages in the places of a padded batch.

        ``rest``: positions, unless they are rotary, and token types, if there are any.
        """
        position_ids = rest[0] if self.has_places else None
        types = rest[-1] if len(rest) > self.has_places else None
        embedded = self.embeddings(input_ids, position_ids, types)
        return embedded.to(self.dtype), self.scorer(input_ids, embedded)


class StageGraph(GraphModule):
    """A run of layers; with ``scorer`` it also scores its rows, for the layers that follow."""

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        config: ModelConfig,
        precision: Precision,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.n_heads = config.n_heads
        self.causal = config.causal
        self.rotary = config.rotary is not None
        self.scorer = None if scorer is None else Probes(scorer)
        states = states_of("updated_states", "n_tokens", config.d_model, precision=precision)
        self.outputs = (states, *(scores_of(config, "n_tokens"),) * (scorer is not None))

    def scored(self, states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the outputs."""
        return states if self.scorer is None else (states, self.scorer(states))


class ActiveStageGraph(StageGraph):
    """A run of layers with ``context="active"``: active tokens see each other only."""

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        config: ModelConfig,
        precision: Precision,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(layers, config, precision, scorer)
        grouped = len(layers) > 1
        self.inputs = (
            states_of("hidden_states", "n_tokens", config.d_model, precision=precision),
            *_layout(config, "max_seqlen"),
            _bias(config, "max_seqlen", *(len(layers),) * grouped),
            *(int32("position_ids", "n_tokens"),) * self.rotary,
            *(int32("remaining_depth", "n_tokens"),) * grouped,
        )

    def forward(
        self,
        hidden_states: Tensor,
        gather_index: Tensor,
        scatter_index: Tensor,
        key_bias: Tensor,
        *rest: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Update the active rows; see :class:`sdt_deploy.runtime.routing.RouteStep`."""
        states, bias = hidden_states, narrowed(key_bias, hidden_states.dtype)
        layout = HeadLayout(self.n_heads, gather_index=gather_index, scatter_index=scatter_index)
        causal = not_later(key_bias.shape[-2]) if self.causal else None
        positions = rest[0] if self.rotary else None
        sight = Sight(layout, layout, bias, causal, positions, positions)
        if len(self.layers) == 1:
            return self.scored(self.layers[0](states, states, sight))
        for i, layer in enumerate(self.layers):
            updated = layer(states, states, replace(sight, bias=bias[i]))
            states = torch.where((rest[-1] > i).unsqueeze(-1), updated, states)
        return self.scored(states)


class AllStageGraph(StageGraph):
    """A run of layers with ``context="all"``: active tokens also see others' last states."""

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        config: ModelConfig,
        precision: Precision,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(layers, config, precision, scorer)
        grouped = len(layers) > 1
        self.inputs = (
            states_of("hidden_states", "n_tokens", config.d_model, precision=precision),
            *_layout(config, "max_seqlen"),
            states_of("context_states", "n_context", config.d_model, precision=precision),
            int32("context_gather_index", "batch", config.n_heads, "max_context_seqlen"),
            _bias(config, "max_context_seqlen"),
            *(int32("query_places", "batch", "max_seqlen"),) * config.causal,
            *(int32("position_ids", "n_tokens"),) * self.rotary,
            *(int32("context_position_ids", "n_context"),) * self.rotary,
            *(int32("remaining_depth", "n_tokens"),) * grouped,
            *(int32("refresh_index", "n_context"),) * grouped,
        )

    def forward(
        self,
        hidden_states: Tensor,
        gather_index: Tensor,
        scatter_index: Tensor,
        context_states: Tensor,
        context_gather_index: Tensor,
        key_bias: Tensor,
        *rest: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Update the active rows; see :class:`sdt_deploy.runtime.routing.RouteStep`."""
        states, context = hidden_states, context_states
        bias = narrowed(key_bias, states.dtype)
        causal = not_later(key_bias.shape[-2], rest[0]) if self.causal else None
        positions, around = rest[1:3] if self.rotary else (None, None)
        remaining_depth, refresh_index = rest[-2:] if len(self.layers) > 1 else (None, None)
        layout = HeadLayout(self.n_heads, gather_index=gather_index, scatter_index=scatter_index)
        context_layout = HeadLayout(self.n_heads, gather_index=context_gather_index)
        sight = Sight(layout, context_layout, bias, causal, positions, around)
        for i, layer in enumerate(self.layers):
            if i == 0 or remaining_depth is None or refresh_index is None:
                states = layer(states, context, sight)
                continue
            context = gather_rows(torch.cat([context_states, states]), refresh_index)
            updated = layer(states, context, sight)
            states = torch.where((remaining_depth > i).unsqueeze(-1), updated, states)
        return self.scored(states)


class FusedStageGraph(GraphModule):
    """One layer in fused form; see :class:`sdt_deploy.runtime.device_loop.DeviceLoop`."""

    def __init__(self, layer: FusedLayer, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.sees_all = config.context == "all"
        d_model = config.d_model
        context = ("context_states", "batch", "max_context_seqlen", d_model)
        self.inputs = (
            states_of("hidden_states", 1, "n_tokens", d_model, precision=precision),
            int32("gather_index", "batch", "max_seqlen"),
            int32("scatter_index", "n_tokens"),
            *(states_of(*context, precision=precision) for _ in range(self.sees_all)),
            TensorSpec(name="key_lengths", axes=("batch",), dtype="int64"),
        )
        self.outputs = (states_of("updated_states", 1, "n_tokens", d_model, precision=precision),)

    def forward(
        self, hidden_states: Tensor, gather_index: Tensor, scatter_index: Tensor, *rest: Tensor
    ) -> Tensor:
        """Update the active rows; ``rest``: the context, if there is one, and its lengths."""
        context = rest[0] if self.sees_all else None
        return self.layers[0](hidden_states, (gather_index, scatter_index), context, rest[-1])


class FusedHeadGraph(GraphModule):
    """Last hidden states of a padded batch to outputs."""

    def __init__(self, head: PackedHead, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.head = head
        padded, pooling = ("batch", "max_seqlen"), config.head.pooling
        states = states_of("hidden_states", *padded, config.d_model, precision=precision)
        self.inputs = (states, *(int32("attention_mask", *padded),) * (pooling == "mean"))
        rows = padded[:1] if config.head.per_sequence else padded
        self.outputs = (float32("output", *rows, config.output_width),)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute outputs, pooled over the tokens that ``attention_mask`` names."""
        mask = None if attention_mask is None else attention_mask > 0
        return self.head.of_padded(hidden_states, mask)


class HeadGraph(GraphModule):
    """Last hidden states to outputs."""

    def __init__(self, head: PackedHead, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.head = head
        states = states_of("hidden_states", "n_tokens", config.d_model, precision=precision)
        if not config.head.per_sequence:
            self.inputs = (states,)
        elif config.head.pooling == "cls":
            self.inputs = (states, int32("first_index", "batch"))
        else:
            self.inputs = (
                states,
                int32("gather_index", "batch", "max_seqlen"),
                int32("lengths", "batch"),
            )
        rows = "batch" if config.head.per_sequence else "n_tokens"
        self.outputs = (float32("output", rows, config.output_width),)

    def forward(
        self, hidden_states: Tensor, index: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Compute outputs; ``index`` gathers a sequence's rows, or its first one for CLS."""
        if index is None:
            return self.head.project(self.head.normed(hidden_states))
        if lengths is None:
            return self.head.project(self.head.normed(gather_rows(hidden_states, index)))
        padded = gather_rows(self.head.normed(hidden_states), index)
        return self.head.project(self.head.pool(padded, within(lengths, index.shape[1])))


@dataclass(frozen=True, kw_only=True)
class GraphPart:
    """One graph to export."""

    name: str
    module: GraphModule
    topology: str
    """Parts of equal topology differ in their weights only, and are traced once."""
    layers: tuple[int, int] | None = None
    """First layer and one past the last (stages only)."""
    repeated: GraphModule | None = None
    """One layer, where ``module`` calls one for each; traced by itself, once for all parts."""

    def spec(
        self, config: ExportConfig, *, graph_sha256: str, max_abs_error: float = 0.0
    ) -> GraphSpec:
        """Describe the graph, which is to lie in ``{name}.onnx``."""
        layout = ATTENTION_LAYOUTS[FORMAT_VERSION][config.attention]
        return GraphSpec(
            name=self.name,
            file=f"{self.name}.onnx",
            inputs=self.module.inputs,
            outputs=self.module.outputs,
            graph_sha256=graph_sha256,
            max_abs_error=max_abs_error,
            attention_layout=None if self.layers is None else layout,
            layers=self.layers,
        )


def partition(
    model: SparseDepthTransformer, config: ExportConfig, *, single_file: bool = False
) -> Iterator[GraphPart]:
    """Yield the parts of ``model`` in the order of the manifest: entry, stages, head, baselines.

    What fused stages have in common, in pieces, follows the stages.

    With ``single_file`` the whole loop in one graph follows, and for models that can generate the
    layers over a cache. The single graph has the function and the weights of
    ``masked``; :mod:`sdt_deploy.exporters.single` builds it instead of tracing it.

    Raises:
        ConfigError: if nothing could run such a bundle.
    """
    check_combination(model.config, config, single_file=single_file)
    precision, dtype = config.precision, torch_dtype(config.precision)
    head = PackedHead(model.head, dtype)
    fused = [FusedLayer(layer, dtype) for layer in model.blocks if config.attention == "fused"]
    packed = [PackedLayer(layer, dtype) for layer in model.blocks if not fused]
    axes = ("batch", "max_seqlen") if fused else ("n_tokens",)
    yield GraphPart(name="entry", module=EntryGraph(model, precision, axes), topology="entry")
    stage = ActiveStageGraph if model.config.context == "active" else AllStageGraph
    for i, (first, stop) in enumerate(config.stage_layers(model.config.n_layers)):
        module: GraphModule
        if fused:
            module = FusedStageGraph(fused[first], model.config, precision)
        else:
            scores = model.config.routing == "per_layer" and stop < model.config.n_layers
            scorer = model.scorer if scores else None
            module = stage(packed[first:stop], model.config, precision, scorer)
        name, topology = f"stage-{i:02d}", f"stage of {stop - first}"
        if len(module.outputs) > 1:
            topology = f"{topology}, scored"
        yield GraphPart(name=name, module=module, topology=topology, layers=(first, stop))
    for piece, cut in piece_graphs(fused[0], model.config, precision).items() if fused else ():
        yield GraphPart(name=piece, module=cut, topology=piece)
    last = (FusedHeadGraph if fused else HeadGraph)(head, model.config, precision)
    yield GraphPart(name="head", module=last, topology="head")
    layer = LayerGraph((fused or packed)[0], model.config.d_model, causal=model.config.causal)
    for name, baseline in (("dense", DenseGraph), ("masked", MaskedGraph)):
        whole = baseline(model, fused or packed, head)
        yield GraphPart(name=name, module=whole, topology=name, repeated=layer)
    if single_file:
        yield GraphPart(name="single", module=MaskedGraph(model, packed, head), topology="single")
    if can_generate(model.config):
        for number, one in enumerate(packed):
            scored = model.config.routing == "per_layer" and number + 1 < len(packed)
            decode = DecodeGraph(one, model.config, model.scorer if scored else None)
            topology = "decode, scored" if scored else "decode"
            yield GraphPart(name=f"decode-{number:02d}", module=decode, topology=topology)
