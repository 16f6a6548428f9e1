"""The oracle: a depth-sparse transformer and its dense twin, over padded tensors with masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdt_deploy.config import ModelConfig, check_thresholds
from sdt_deploy.model.blocks import Embeddings, Head, Scorer, TransformerLayer, standings


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a forward pass of the oracle returns."""

    output: Tensor
    """``[batch, seq, width]``, or ``[batch, width]`` for heads per sequence."""
    hidden_states: Tensor
    """``[batch, seq, d_model]``, last state of every token, before the final norm."""
    scores: Tensor
    """``[batch, seq]`` float32."""
    depths: Tensor
    """``[batch, seq]`` int32, layers a token passed through; 0 for padding."""


class DenseTransformer(nn.Module):
    """Every token through every layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.n_layers))
        self.head = Head(config)

    @property
    def blocks(self) -> list[TransformerLayer]:
        """The layers in order."""
        return [layer for layer in self.layers if isinstance(layer, TransformerLayer)]

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Embed right-padded ``input_ids [batch, seq]``; returns ``[batch, seq, d_model]``."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.embeddings(input_ids, positions.expand_as(input_ids), token_type_ids)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: ``[batch, seq]`` integers, padded on the right.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            token_type_ids: ``[batch, seq]`` integers, or None for zeros.
        """
        hidden = self.embed(input_ids, token_type_ids)
        for layer in self.blocks:
            hidden = layer(hidden, attention_mask)
        return ModelOutput(
            output=self.head(hidden, attention_mask),
            hidden_states=hidden,
            scores=torch.ones(input_ids.shape, device=hidden.device),
            depths=attention_mask.int() * self.config.n_layers,
        )


class SparseDepthTransformer(DenseTransformer):
    """Scores every token once on its embedding; layer ``i`` changes those above threshold ``i``.

    With ``selection="capacity"`` it is their :func:`~sdt_deploy.model.blocks.standings` that are
    compared with the thresholds.

    A token that is not active in a layer keeps its state. With ``context="active"`` it is also
    invisible to the active ones, with ``context="all"`` they see its last state.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.scorer = Scorer(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        thresholds: Sequence[float] | None = None,
        depths: Tensor | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: ``[batch, seq]`` integers, padded on the right.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            token_type_ids: ``[batch, seq]`` integers, or None for zeros.
            thresholds: instead of those of the config.
            depths: ``[batch, seq]`` integers; use these instead of what the scores say.
        """
        embedded = self.embed(input_ids, token_type_ids)
        scores = self.scorer(input_ids, embedded)
        if depths is None:
            depths = self.depths(scores, attention_mask, thresholds)
        depths = torch.where(attention_mask, depths, 0).int()

        hidden = embedded
        for i, layer in enumerate(self.blocks):
            active = depths > i
            visible = active if self.config.context == "active" else attention_mask
            hidden = torch.where(active[..., None], layer(hidden, visible), hidden)
        return ModelOutput(
            output=self.head(hidden, attention_mask),
            hidden_states=hidden,
            scores=scores,
            depths=depths,
        )

    def depths(
        self, scores: Tensor, attention_mask: Tensor, thresholds: Sequence[float] | None = None
    ) -> Tensor:
        """Return ``[batch, seq]``, the layers that each token passes through; 0 for padding.

        Args:
            scores: ``[batch, seq]`` float32.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            thresholds: instead of those of the config.
        """
        if thresholds is None:
            thresholds = self.config.thresholds
        check_thresholds(tuple(thresholds), self.config.n_layers)
        if self.config.selection == "capacity":
            scores = standings(scores, attention_mask)
        limits = torch.tensor(thresholds, dtype=torch.float32, device=scores.device)
        return torch.where(attention_mask, (scores[..., None] > limits).sum(dim=-1), 0)

    def as_dense(self) -> DenseTransformer:
        """Return the dense twin; it shares this model's parameters."""
        with torch.device("meta"):
            twin = DenseTransformer(self.config)
        twin.embeddings, twin.layers, twin.head = self.embeddings, self.layers, self.head
        return twin.train(self.training)
