"""The model as one graph: dense, and sparse without compaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdt_deploy.exporters.layers import FusedLayer, Mask, PackedLayer, key_bias
from sdt_deploy.exporters.modules import GraphModule, PackedHead, float32, int32, scores_of
from sdt_deploy.exporters.repeated import call_layer
from sdt_deploy.model.blocks import standings
from sdt_deploy.model.transformer import SparseDepthTransformer


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
        self.inputs = tuple(int32(name, "batch", "seq") for name in names)
        axes = ("batch",) if config.head.per_sequence else ("batch", "seq")
        self.outputs = (float32("output", *axes, config.output_width),)

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

    def through(self, number: int, states: Tensor, see: Tensor | Mask) -> Tensor:
        """Apply a layer to all rows of a padded batch, as :meth:`embed` returns them."""
        if isinstance(see, Mask):
            updated: Tensor = self.layers[number](states, None, None, see)
            return updated
        return call_layer(number, states, see)

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
        for number in range(len(self.layers)):
            states = self.through(number, states, see)
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
        self.inputs = (*self.inputs, float32("thresholds", model.config.n_layers))
        self.outputs = (*self.outputs, scores_of(model.config, "batch", "seq"))

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
        scores = self.scorer(ids, embedded).reshape(*input_ids.shape, *self.outputs[-1].axes[2:])
        standing = standings(scores, mask) if self.by_capacity and not self.per_layer else scores
        candidates, found = mask, [scores]
        if self.fused:  # all at once: on a GPU every operator costs a launch
            every = mask.unsqueeze(-1) & (scores.unsqueeze(-1) > thresholds)
            whole = every.split(1, dim=-1)
        for i in range(len(self.layers)):
            if self.per_layer:
                if i:
                    scores = self.scorer(ids, states).reshape(found[0].shape)
                standing = scores[..., i]
                found.append(standing)
                if self.by_capacity:
                    standing = standings(torch.where(candidates, standing, -1.0), mask)
            passes = standing > thresholds[i]
            active = whole[i].squeeze(-1) if self.fused else candidates & passes
            if self.per_layer and self.exits:
                candidates = active
            if self.context == "active":
                see = self.sight(active, states.dtype, scattered=True)
            updated = self.through(i, states, see)
            rows = active.unsqueeze(-1) if self.fused else active.reshape(-1, 1)
            states = torch.where(rows, updated, states)
        if self.per_layer:
            scores = torch.stack(found[1:], dim=-1)
        return self.finish(states, mask), scores
