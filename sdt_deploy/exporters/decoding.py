"""Graphs for generation: one layer that sees the keys and values of earlier tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdt_deploy.config import ModelConfig
from sdt_deploy.exporters.layers import HeadLayout, PackedLayer, Sight, not_later
from sdt_deploy.exporters.modules import GraphModule, Probes, float32, int32, scores_of
from sdt_deploy.model.blocks import Scorer


class DecodeGraph(GraphModule):
    """One layer over new rows, and the keys and values that it makes for later ones.

    Keys and values come from ``past_keys`` and ``past_values``, and from ``context_states``, the
    rows that the layer has made none of yet; these include the rows that it updates.
    """

    def __init__(
        self, layer: PackedLayer, config: ModelConfig, scorer: Scorer | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_key_heads
        self.rotary = config.rotary is not None
        self.scorer = None if scorer is None else Probes(scorer)
        d_model, keys = config.d_model, config.n_key_heads * config.head_width
        seen = ("batch", config.n_key_heads, "max_context_seqlen")
        self.inputs = (
            float32("hidden_states", "n_tokens", d_model),
            int32("gather_index", "batch", config.n_heads, "max_seqlen"),
            int32("scatter_index", "n_tokens", config.n_heads),
            float32("context_states", "n_context", d_model),
            float32("past_keys", "n_past", keys),
            float32("past_values", "n_past", keys),
            int32("context_gather_index", *seen),
            float32("key_bias", *seen, 1),
            int32("query_places", "batch", "max_seqlen"),
            *(int32("position_ids", "n_tokens"),) * self.rotary,
            *(int32("context_position_ids", "n_context"),) * self.rotary,
        )
        self.outputs = (
            float32("updated_states", "n_tokens", d_model),
            float32("keys", "n_context", keys),
            float32("values", "n_context", keys),
            *(scores_of(config, "n_tokens"),) * (scorer is not None),
        )

    def forward(
        self,
        hidden_states: Tensor,
        gather_index: Tensor,
        scatter_index: Tensor,
        context_states: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        context_gather_index: Tensor,
        key_bias: Tensor,
        query_places: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """Update the new rows; see :class:`sdt_deploy.runtime.caches.LayerCache`."""
        layer = self.layers[0]
        assert isinstance(layer, PackedLayer)
        positions, around = rest if self.rotary else (None, None)
        keys, values = layer.keys_and_values(layer.normed(context_states), around)
        sight = Sight(
            HeadLayout(self.n_heads, gather_index=gather_index, scatter_index=scatter_index),
            HeadLayout(self.n_kv_heads, gather_index=context_gather_index),
            key_bias,
            not_later(key_bias.shape[-2], query_places),
            positions,
            around,
        )
        mixed = layer.attend(
            layer.normed(hidden_states),
            torch.cat([past_keys, keys]),
            torch.cat([past_values, values]),
            sight,
        )
        states = layer.finish(hidden_states, mixed)
        scores = () if self.scorer is None else (self.scorer(states),)
        return states, keys, values, *scores
