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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdt_deploy.bundle import ATTENTION_LAYOUTS, FORMAT_VERSION, GraphSpec, TensorSpec
from sdt_deploy.config import ExportConfig, ModelConfig, Precision
from sdt_deploy.exporters.combinations import check_combination
from sdt_deploy.exporters.layers import (
    FusedLayer,
    HeadLayout,
    Mask,
    PackedLayer,
    PackedLinear,
    gather_rows,
    key_bias,
    narrowed,
    within,
)
from sdt_deploy.model.blocks import Head, Scorer, standings
from sdt_deploy.model.transformer import SparseDepthTransformer


class GraphModule(nn.Module):
    """A module that becomes one graph; ``inputs`` are in the order of ``forward``'s arguments."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def _int32(name: str, *axes: str | int) -> TensorSpec:
    return TensorSpec(name=name, axes=axes, dtype="int32")


def _float32(name: str, *axes: str | int) -> TensorSpec:
    return TensorSpec(name=name, axes=axes, dtype="float32")


def _states(name: str, *axes: str | int, precision: Precision) -> TensorSpec:
    return TensorSpec(name=name, axes=axes, dtype=precision)


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the type of states and products."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def _scores(config: ModelConfig, *axes: str) -> TensorSpec:
    probes = (config.n_layers,) if config.routing == "per_layer" else ()
    return _float32("scores", *axes, *probes)


def _layout(config: ModelConfig, length: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        _int32("gather_index", "batch", config.n_heads, length),
        _int32("scatter_index", "n_tokens", config.n_heads),
    )


def _bias(config: ModelConfig, length: str, *outer: int) -> TensorSpec:
    return _float32("key_bias", *outer, "batch", config.n_heads, length, 1)


class PackedHead(nn.Module):
    """The oracle's head with its products in packed form; pooling is the caller's part.

    The products are in ``dtype``, all else is float32, the output too.
    """

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = head.config
        self.dtype = dtype
        self.norm = head.norm
        self.dense = None if head.dense is None else PackedLinear(head.dense, dtype)
        self.projection = None if head.projection is None else PackedLinear(head.projection, dtype)

    def normed(self, rows: Tensor) -> Tensor:
        """Apply the final norm to ``[n_rows, d_model]``; returns float32."""
        rows = rows.float()
        return rows if self.norm is None else self.norm(rows)

    def project(self, rows: Tensor) -> Tensor:
        """Turn normed (and pooled) rows ``[n_rows, d_model]`` into ``[n_rows, width]``."""
        if self.dense is not None:
            rows = torch.tanh(self.dense(rows.to(self.dtype)).float())
        if self.projection is not None:
            rows = self.projection(rows.to(self.dtype)).float()
        if not self.config.normalize:
            return rows
        norm = rows.pow(2).sum(dim=-1, keepdim=True).sqrt()
        return rows / norm.clamp_min(1e-12)

    def pool(self, padded: Tensor, mask: Tensor) -> Tensor:
        """Mean over the places of ``[batch, max_seqlen, d_model]`` where ``mask`` is True."""
        weight = mask.unsqueeze(-1).to(padded.dtype)
        return (padded * weight).sum(dim=1) / weight.sum(dim=1)

    def of_padded(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the outputs of ``states [batch, max_seqlen, d_model]``.

        ``mask [batch, max_seqlen]`` bool is True where there is a token; only means need it.
        """
        if not self.config.per_sequence:
            return self.project(self.normed(states))
        if self.config.pooling == "cls":
            return self.project(self.normed(states.select(1, 0)))
        assert mask is not None
        return self.project(self.pool(self.normed(states), mask))


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
        names = ["input_ids", "position_ids"] + ["token_type_ids"] * (config.n_token_types > 0)
        self.inputs = tuple(_int32(name, *axes) for name in names)
        self.outputs = (
            _states("hidden_states", *axes, config.d_model, precision=precision),
            _scores(config, *axes),
        )

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed and score tokens, packed, or for fused stages in the places of a padded batch."""
        embedded = self.embeddings(input_ids, position_ids, token_type_ids)
        return embedded.to(self.dtype), self.scorer(input_ids, embedded)


class Probes(nn.Module):
    """The probes of all layers, ``sigmoid(states · weight + bias)`` in float32, without pins."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.weight, self.bias = scorer.weight, scorer.bias

    def forward(self, states: Tensor) -> Tensor:
        """Score ``states [n_tokens, d_model]``: ``[n_tokens, n_layers]``."""
        return torch.sigmoid(states.float() @ self.weight + self.bias)


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
        self.scorer = None if scorer is None else Probes(scorer)
        states = _states("updated_states", "n_tokens", config.d_model, precision=precision)
        self.outputs = (states, *(_scores(config, "n_tokens"),) * (scorer is not None))

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
            _states("hidden_states", "n_tokens", config.d_model, precision=precision),
            *_layout(config, "max_seqlen"),
            _bias(config, "max_seqlen", *(len(layers),) * grouped),
            *(_int32("remaining_depth", "n_tokens"),) * grouped,
        )

    def forward(
        self,
        hidden_states: Tensor,
        gather_index: Tensor,
        scatter_index: Tensor,
        key_bias: Tensor,
        remaining_depth: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Update the active rows; see :class:`sdt_deploy.runtime.routing.RouteStep`."""
        states, bias = hidden_states, narrowed(key_bias, hidden_states.dtype)
        layout = HeadLayout(self.n_heads, gather_index=gather_index, scatter_index=scatter_index)
        if remaining_depth is None:
            return self.scored(self.layers[0](states, layout, states, layout, bias))
        for i, layer in enumerate(self.layers):
            updated = layer(states, layout, states, layout, bias[i])
            states = torch.where((remaining_depth > i).unsqueeze(-1), updated, states)
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
            _states("hidden_states", "n_tokens", config.d_model, precision=precision),
            *_layout(config, "max_seqlen"),
            _states("context_states", "n_context", config.d_model, precision=precision),
            _int32("context_gather_index", "batch", config.n_heads, "max_context_seqlen"),
            _bias(config, "max_context_seqlen"),
            *(_int32("remaining_depth", "n_tokens"),) * grouped,
            *(_int32("refresh_index", "n_context"),) * grouped,
        )

    def forward(
        self,
        hidden_states: Tensor,
        gather_index: Tensor,
        scatter_index: Tensor,
        context_states: Tensor,
        context_gather_index: Tensor,
        key_bias: Tensor,
        remaining_depth: Tensor | None = None,
        refresh_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Update the active rows; see :class:`sdt_deploy.runtime.routing.RouteStep`."""
        states, context = hidden_states, context_states
        bias = narrowed(key_bias, states.dtype)
        layout = HeadLayout(self.n_heads, gather_index=gather_index, scatter_index=scatter_index)
        context_layout = HeadLayout(self.n_heads, gather_index=context_gather_index)
        for i, layer in enumerate(self.layers):
            if i == 0 or remaining_depth is None or refresh_index is None:
                states = layer(states, layout, context, context_layout, bias)
                continue
            context = gather_rows(torch.cat([context_states, states]), refresh_index)
            updated = layer(states, layout, context, context_layout, bias)
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
            _states("hidden_states", 1, "n_tokens", d_model, precision=precision),
            _int32("gather_index", "batch", "max_seqlen"),
            _int32("scatter_index", "n_tokens"),
            *(_states(*context, precision=precision) for _ in range(self.sees_all)),
            TensorSpec(name="key_lengths", axes=("batch",), dtype="int64"),
        )
        self.outputs = (_states("updated_states", 1, "n_tokens", d_model, precision=precision),)

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
        states = _states("hidden_states", *padded, config.d_model, precision=precision)
        self.inputs = (states, *(_int32("attention_mask", *padded),) * (pooling == "mean"))
        rows = padded[:1] if config.head.per_sequence else padded
        self.outputs = (_float32("output", *rows, config.output_width),)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute outputs, pooled over the tokens that ``attention_mask`` names."""
        mask = None if attention_mask is None else attention_mask > 0
        return self.head.of_padded(hidden_states, mask)


class HeadGraph(GraphModule):
    """Last hidden states to outputs."""

    def __init__(self, head: PackedHead, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.head = head
        states = _states("hidden_states", "n_tokens", config.d_model, precision=precision)
        if not config.head.per_sequence:
            self.inputs = (states,)
        elif config.head.pooling == "cls":
            self.inputs = (states, _int32("first_index", "batch"))
        else:
            self.inputs = (
                states,
                _int32("gather_index", "batch", "max_seqlen"),
                _int32("lengths", "batch"),
            )
        rows = "batch" if config.head.per_sequence else "n_tokens"
        self.outputs = (_float32("output", rows, config.output_width),)

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


class _PaddedGraph(GraphModule):
    """What the two whole-model baselines share: padded ``[batch, seq]`` in and out."""

    def __init__(
        self,
        model: SparseDepthTransformer,
        layers: Sequence[PackedLayer | FusedLayer],
        head: PackedHead,
    ) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.layers = nn.ModuleList(layers)
        self.fused = isinstance(layers[0], FusedLayer)
        self.head = head
        config = model.config
        self.n_heads = config.n_heads
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.n_token_types > 0)
        self.inputs = tuple(_int32(name, "batch", "seq") for name in names)
        axes = ("batch",) if config.head.per_sequence else ("batch", "seq")
        self.outputs = (_float32("output", *axes, config.output_width),)

    def embed(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return ``[batch · seq, d_model]``, or for fused layers ``[batch, seq, d_model]``."""
        if self.fused:  # operators that keep the names of the axes
            tokens = mask.to(torch.int32)
            positions = tokens.cumsum(dim=1, dtype=torch.int32) - tokens
            return self.embeddings(input_ids, positions, token_type_ids)
        batch, seq = input_ids.shape
        positions = torch.arange(seq, dtype=torch.int32).expand(batch, seq)
        types = None if token_type_ids is None else token_type_ids.reshape(-1)
        return self.embeddings(input_ids.reshape(-1), positions.reshape(-1), types)

    def sight(
        self, visible: Tensor, dtype: torch.dtype, *, scattered: bool = False
    ) -> Tensor | Mask:
        """Say which keys ``visible [batch, seq]`` shows, in the form that the layers take.

        ``scattered``: they need not be the first ones of each sequence.
        """
        if not self.fused:
            return key_bias(visible, self.n_heads, dtype)
        if not scattered:
            return visible.to(torch.int64).sum(dim=1)
        everywhere = visible | ~visible
        return Mask(visible[:, None, None, :] & everywhere[:, None, :, None])

    def through(self, layer: nn.Module, states: Tensor, see: Tensor | Mask) -> Tensor:
        """Apply one layer to all rows of a padded batch, as :meth:`embed` returns them."""
        if self.fused:
            return layer(states, None, None, see)
        assert isinstance(see, Tensor)
        layout = HeadLayout(self.n_heads, batch=see.shape[0])
        return layer(states, layout, states, layout, see)

    def finish(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.fused:
            return self.head.of_padded(states, mask)
        batch, seq = mask.shape
        config = self.head.config
        if not config.per_sequence:
            return self.head.project(self.head.normed(states)).reshape(batch, seq, -1)
        if config.pooling == "cls":
            first = states.reshape(batch, seq, -1).select(1, 0)
            return self.head.project(self.head.normed(first))
        padded = self.head.normed(states).reshape(batch, seq, -1)
        return self.head.project(self.head.pool(padded, mask))


class DenseGraph(_PaddedGraph):
    """The dense baseline: every token through every layer, as one would deploy it today."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Run the dense model on a padded batch."""
        mask = attention_mask > 0
        states = self.embed(input_ids, mask, token_type_ids).to(self.head.dtype)
        see = self.sight(mask, states.dtype)
        for layer in self.layers:
            states = self.through(layer, states, see)
        return self.finish(states, mask)


class MaskedGraph(_PaddedGraph):
    """The sparse model's function without compaction: inactive rows keep their state."""

    def __init__(
        self,
        model: SparseDepthTransformer,
        layers: Sequence[PackedLayer | FusedLayer],
        head: PackedHead,
    ) -> None:
        super().__init__(model, layers, head)
        self.scorer = model.scorer
        self.context = model.config.context
        self.by_capacity = model.config.selection == "capacity"
        self.per_layer = model.config.routing == "per_layer"
        self.exits = model.config.leaving == "exit"
        self.inputs = (*self.inputs, _float32("thresholds", model.config.n_layers))
        self.outputs = (*self.outputs, _scores(model.config, "batch", "seq"))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the sparse model on a padded batch; ``rest``: token types, if any, thresholds."""
        *types, thresholds = rest
        mask = attention_mask > 0
        embedded = self.embed(input_ids, mask, types[0] if types else None)
        ids = input_ids if self.fused else input_ids.reshape(-1)
        states = embedded.to(self.head.dtype)
        see = self.sight(mask, states.dtype)
        candidates, found = mask, []
        for i, layer in enumerate(self.layers):
            if self.per_layer:
                found.append(self.scorer(ids, states)[..., i].reshape(input_ids.shape))
            elif not i:
                found.append(self.scorer(ids, embedded).reshape(input_ids.shape))
            compared = found[-1]
            if self.by_capacity:
                compared = standings(torch.where(candidates, compared, -1.0), mask)
            active = candidates & (compared > thresholds[i])
            if self.per_layer and self.exits:
                candidates = active
            if self.context == "active":
                see = self.sight(active, states.dtype, scattered=True)
            updated = self.through(layer, states, see)
            rows = active.unsqueeze(-1) if self.fused else active.reshape(-1, 1)
            states = torch.where(rows, updated, states)
        scores = torch.stack(found, dim=-1) if self.per_layer else found[0]
        return self.finish(states, mask), scores


@dataclass(frozen=True, kw_only=True)
class GraphPart:
    """One graph to export."""

    name: str
    module: GraphModule
    topology: str
    """Parts of equal topology differ in their weights only, and are traced once."""
    layers: tuple[int, int] | None = None
    """First layer and one past the last (stages only)."""

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

    With ``single_file`` the whole loop in one graph follows. It has the function and the weights of
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
        topology = f"stage of {stop - first}{', scored' if len(module.outputs) > 1 else ''}"
        name = f"stage-{i:02d}"
        yield GraphPart(name=name, module=module, topology=topology, layers=(first, stop))
    last = (FusedHeadGraph if fused else HeadGraph)(head, model.config, precision)
    yield GraphPart(name="head", module=last, topology="head")
    for name, baseline in (("dense", DenseGraph), ("masked", MaskedGraph)):
        yield GraphPart(name=name, module=baseline(model, fused or packed, head), topology=name)
    if single_file:
        whole = MaskedGraph(model, packed, head)
        yield GraphPart(name="single", module=whole, topology="single")
