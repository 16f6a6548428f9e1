"""The oracle: a depth-sparse transformer and its dense twin, over padded tensors with masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdt_deploy.config import ModelConfig, check_thresholds, compared
from sdt_deploy.model.blocks import Embeddings, Head, Scorer, TransformerLayer, standings


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a forward pass of the oracle returns."""

    output: Tensor
    """``[batch, seq, width]``, or ``[batch, width]`` for heads per sequence."""
    hidden_states: Tensor
    """``[batch, seq, d_model]``, last state of every token, before the final norm."""
    scores: Tensor
    """``[batch, seq]`` float32; with routing ``per_layer`` ``[batch, seq, n_layers]``, of the state
    that came into each layer."""
    depths: Tensor
    """``[batch, seq]`` int32, layers a token passed through; 0 for padding."""
    active: Tensor
    """``[batch, seq, n_layers]`` bool, which layers took a token."""


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
            active=attention_mask[..., None].expand(-1, -1, self.config.n_layers),
        )


class SparseDepthTransformer(DenseTransformer):
    """A layer changes the tokens that it takes; the others keep their state.

    With routing ``once`` every token is scored on its embedding, and layer ``i`` takes those above
    threshold ``i``. With ``per_layer``, layer ``i`` scores the states that enter it; who was not
    taken by an earlier one has left, unless ``leaving="skip"``. With ``selection="capacity"`` it is
    their :func:`~sdt_deploy.model.blocks.standings` that are compared with the thresholds.

    A token that a layer does not take is invisible to the others there with ``context="active"``;
    with ``context="all"`` they see its last state.
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
        active: Tensor | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: ``[batch, seq]`` integers, padded on the right.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            token_type_ids: ``[batch, seq]`` integers, or None for zeros.
            thresholds: instead of those of the config.
            depths: ``[batch, seq]`` integers; use these instead of what the scores say.
            active: ``[batch, seq, n_layers]`` bool, which layers take a token; the same where a
                depth does not say it.
        """
        config = self.config
        per_layer = config.routing == "per_layer"
        layers = torch.arange(config.n_layers, device=input_ids.device)
        hidden = self.embed(input_ids, token_type_ids)
        scores = self.scorer(input_ids, hidden)
        limits = self._limits(thresholds).to(hidden.device)
        if active is None and depths is None and not per_layer:
            depths = self.depths(scores, attention_mask, thresholds)
        if active is None and depths is not None:
            active = depths[..., None] > layers
        taken = attention_mask
        found, scored = [], []
        for i, layer in enumerate(self.blocks):
            if per_layer:
                scored.append(self.scorer(input_ids, hidden)[..., i])
            if active is not None:
                taken = active[..., i] & attention_mask
            else:
                left = taken if config.leaving == "exit" else attention_mask
                taken = self.taken(scored[-1], left, attention_mask, limits[i])
            found.append(taken)
            visible = taken if config.context == "active" else attention_mask
            hidden = torch.where(taken[..., None], layer(hidden, visible), hidden)
        passed = torch.stack(found, dim=-1)
        return ModelOutput(
            output=self.head(hidden, attention_mask),
            hidden_states=hidden,
            scores=torch.stack(scored, dim=-1) if per_layer else scores,
            depths=passed.sum(dim=-1).int(),
            active=passed,
        )

    def taken(
        self, scores: Tensor, candidates: Tensor, attention_mask: Tensor, limit: Tensor
    ) -> Tensor:
        """Return ``[batch, seq]`` bool, the ``candidates`` that a layer takes.

        Args:
            scores: ``[batch, seq]`` float32, of this layer.
            candidates: ``[batch, seq]`` bool; with selection ``capacity`` the others rank last.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            limit: threshold of the layer, a scalar.
        """
        if self.config.selection == "capacity":
            scores = torch.where(candidates, scores, -1.0)
            scores = standings(scores, attention_mask)
        return candidates & (scores > limit)

    def depths(
        self, scores: Tensor, attention_mask: Tensor, thresholds: Sequence[float] | None = None
    ) -> Tensor:
        """Return ``[batch, seq]``, the layers that each token passes through; 0 for padding.

        For routing ``once``, where this follows from the scores.

        Args:
            scores: ``[batch, seq]`` float32.
            attention_mask: ``[batch, seq]`` bool, True for tokens.
            thresholds: instead of those of the config.
        """
        if self.config.selection == "capacity":
            scores = standings(scores, attention_mask)
        limits = self._limits(thresholds).to(scores.device)
        return torch.where(attention_mask, (scores[..., None] > limits).sum(dim=-1), 0)

    def _limits(self, thresholds: Sequence[float] | None) -> Tensor:
        config = self.config
        thresholds = config.thresholds if thresholds is None else thresholds
        check_thresholds(tuple(thresholds), config.n_layers, config.routing)
        return torch.tensor(compared(thresholds), dtype=torch.float32)

    def as_dense(self) -> DenseTransformer:
        """Return the dense twin; it shares this model's parameters."""
        with torch.device("meta"):
            twin = DenseTransformer(self.config)
        twin.embeddings, twin.layers, twin.head = self.embeddings, self.layers, self.head
        return twin.train(self.training)
