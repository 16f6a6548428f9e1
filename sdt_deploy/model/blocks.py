"""The parts of the reference model, written plainly over padded tensors ``[batch, seq, ...]``.

Nothing here compacts or reorders tokens: these modules define what every exported graph and every
runtime path must compute.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdt_deploy.config import ModelConfig


class Embeddings(nn.Module):
    """Token, position and token type embeddings, summed, then an optional LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_offset = config.position_offset
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_positions + config.position_offset, config.d_model)
        self.token_type = (
            nn.Embedding(config.n_token_types, config.d_model) if config.n_token_types else None
        )
        self.norm = nn.LayerNorm(config.d_model, config.eps) if config.embedding_norm else None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor | None
    ) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: ``[..., ]`` integers.
            position_ids: same shape; place in the sequence, from 0.
            token_type_ids: same shape, or None for zeros.

        Returns:
            Hidden states ``[..., d_model]``.
        """
        hidden = self.token(input_ids) + self.position(position_ids + self.position_offset)
        if self.token_type is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros_like(input_ids)
            hidden = hidden + self.token_type(token_type_ids)
        return hidden if self.norm is None else self.norm(hidden)


class Scorer(nn.Module):
    """Scores tokens with a linear probe: ``sigmoid(weight · state + bias)``, in float32.

    Pinned tokens score 1, and so does every token of a model without a probe. With routing
    ``per_layer`` there is a probe for each layer, and scores and logits have one more axis, as long
    as there are layers.
    """

    pinned_token_ids: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = config.probe == "linear"
        self.pins = bool(config.pinned_token_ids)
        if self.linear:
            probes = (config.n_layers,) if config.routing == "per_layer" else ()
            self.weight = nn.Parameter(torch.empty(config.d_model, *probes))
            self.bias = nn.Parameter(torch.zeros(probes))
            nn.init.normal_(self.weight, std=1 / math.sqrt(config.d_model))
        pinned = torch.tensor(config.pinned_token_ids, dtype=torch.int32)
        self.register_buffer("pinned_token_ids", pinned, persistent=False)

    def forward(self, input_ids: Tensor, embedded: Tensor) -> Tensor:
        """Return the scores ``[...]`` float32 of tokens ``[...]`` embedded as ``[..., d_model]``.

        A multiplication and a sum over the last axis rather than a matrix product: its rounding
        does not depend on how many tokens are scored together, so neither does a token's depth.
        Several probes are a matrix product: states of inner layers depend on that anyway.
        """
        if not self.linear:
            # All ones; a graph that asked for a shape could not be captured on a GPU.
            return (input_ids >= 0).float()
        scores = torch.sigmoid(self.logits(embedded))
        if not self.pins:
            return scores
        pinned = (input_ids.unsqueeze(-1).int() == self.pinned_token_ids).any(dim=-1)
        if self.weight.ndim == 2:
            pinned = pinned.unsqueeze(-1)
        return torch.where(pinned, 1.0, scores)

    def logits(self, embedded: Tensor) -> Tensor:
        """Return ``weight · embedding + bias``, ``[...]`` float32, whatever the token."""
        if self.weight.ndim == 2:
            return embedded.float() @ self.weight.float() + self.bias.float()
        product = embedded.float() * self.weight.float()
        return product.sum(dim=-1) + self.bias.float()


def standings(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Return where each token stands among those of its sequence, ``[batch, seq]`` float32.

    The token of rank ``r`` (from 0, by falling score, ties by position) among ``n`` stands at
    ``1 - (r + 1/2) / n``, the first at 1. So a share ``c`` of the tokens, rounded and at least one
    of them, stands above ``1 - c`` (expert-choice routing of Mixture-of-Depths, Raposo et al.,
    2024, with one score for all layers).

    Args:
        scores: ``[batch, seq]`` float32.
        attention_mask: ``[batch, seq]`` bool, True for tokens; padding has no standing.
    """
    mine, others = scores.unsqueeze(2), scores.unsqueeze(1)
    places = torch.arange(scores.shape[1], device=scores.device)
    before = (places.unsqueeze(0) < places.unsqueeze(1)).unsqueeze(0)
    ahead = ((others > mine) | ((others == mine) & before)) & attention_mask.unsqueeze(1)
    rank = ahead.to(torch.int32).sum(dim=2).float()
    n_tokens = attention_mask.to(torch.int32).sum(dim=1, keepdim=True).float()
    return torch.where(rank > 0, 1.0 - (rank + 0.5) / n_tokens, 1.0)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al., 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.causal = config.causal
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def seen(self, visible: Tensor, places: Tensor | None = None) -> Tensor:
        """Return ``[batch, 1, 1 or seq, seq]`` bool, which keys each query sees.

        Args:
            visible: ``[batch, seq]`` bool, the tokens that may be seen as keys.
            places: ``[batch, seq]``, where each token stands in its sequence; None: in order.
        """
        keys = visible[:, None, None, :]
        if not self.causal:
            return keys
        if places is None:
            places = torch.arange(visible.shape[1], device=visible.device).expand_as(visible)
        return keys & (places[:, None, None, :] <= places[:, None, :, None])

    def forward(self, hidden: Tensor, visible: Tensor, places: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            hidden: ``[batch, seq, d_model]``.
            visible: ``[batch, seq]`` bool, the tokens that may be seen as keys.
            places: see :meth:`seen`.

        Returns:
            ``[batch, seq, d_model]``; rows of sequences without a visible token mean nothing.
        """
        mixed = self.weights(hidden, visible, places) @ self._heads(self.value(hidden))
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def weights(self, hidden: Tensor, visible: Tensor, places: Tensor | None = None) -> Tensor:
        """Return how much each token takes from each, ``[batch, n_heads, seq, seq]``.

        Queries before keys; see :meth:`forward` for the arguments.
        """
        query, key = self._heads(self.query(hidden)), self._heads(self.key(hidden))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        seen = self.seen(visible, places)
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to ``[..., d_model]``."""
        inner = self.up(hidden)
        if self.activation == "relu":
            return self.down(F.relu(inner))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(F.gelu(inner, approximate=approximate))


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a LayerNorm before or after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.d_model, config.eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, config.eps)

    def forward(self, hidden: Tensor, visible: Tensor, places: Tensor | None = None) -> Tensor:
        """Update every token of ``hidden [batch, seq, d_model]``; keys are the ``visible`` ones.

        ``places``: see :meth:`Attention.seen`.
        """
        if self.pre_norm:
            hidden = hidden + self.attention(self.attention_norm(hidden), visible, places)
            return hidden + self.feed_forward(self.feed_forward_norm(hidden))
        hidden = self.attention_norm(hidden + self.attention(hidden, visible, places))
        return self.feed_forward_norm(hidden + self.feed_forward(hidden))


class Head(nn.Module):
    """Final norm and output projection, see :class:`sdt_deploy.config.HeadConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        head = config.head
        self.config = head
        self.norm = nn.LayerNorm(config.d_model, config.eps) if config.final_norm else None
        self.dense = nn.Linear(config.d_model, config.d_model) if head.dense_tanh else None
        self.projection = (
            nn.Linear(config.d_model, config.output_width, bias=head.bias)
            if head.kind in ("lm", "classify")
            else None
        )

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the final norm to ``[..., d_model]``."""
        return hidden if self.norm is None else self.norm(hidden)

    def project(self, rows: Tensor) -> Tensor:
        """Turn normed (and, for heads per sequence, pooled) rows into output rows."""
        if self.dense is not None:
            rows = torch.tanh(self.dense(rows))
        if self.projection is not None:
            rows = self.projection(rows)
        return F.normalize(rows, dim=-1) if self.config.normalize else rows

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute outputs.

        Args:
            hidden: ``[batch, seq, d_model]``, the last state of every token.
            attention_mask: ``[batch, seq]`` bool, True for tokens, False for padding.

        Returns:
            ``[batch, seq, width]``, or ``[batch, width]`` for heads per sequence.
        """
        hidden = self.normed(hidden)
        if not self.config.per_sequence:
            return self.project(hidden)
        if self.config.pooling == "cls":
            return self.project(hidden[:, 0])
        weight = attention_mask[..., None].to(hidden.dtype)
        return self.project((hidden * weight).sum(dim=1) / weight.sum(dim=1))
