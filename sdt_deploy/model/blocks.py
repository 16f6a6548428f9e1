"""The parts of the reference model, written plainly over padded tensors ``[batch, seq, ...]``.

Nothing here compacts or reorders tokens: these modules define what every exported graph and every
runtime path must compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdt_deploy.config import ModelConfig


def norm(config: ModelConfig) -> nn.Module:
    """Make a norm over the last axis of states."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.d_model, config.eps)


class Embeddings(nn.Module):
    """Token, position and token type embeddings, summed, then an optional norm.

    With rotary positions it has no position table: layers turn queries and keys instead.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_offset = config.position_offset
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = None
        if config.rotary is None:
            n_places = config.max_positions + config.position_offset
            self.position = nn.Embedding(n_places, config.d_model)
        self.token_type = (
            nn.Embedding(config.n_token_types, config.d_model) if config.n_token_types else None
        )
        self.norm = norm(config) if config.embedding_norm else None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor:
        """Embed tokens.

        Args:
            input_ids: ``[..., ]`` integers.
            position_ids: same shape; place in the sequence, from 0; None: rotary positions.
            token_type_ids: same shape, or None for zeros.

        Returns:
            Hidden states ``[..., d_model]``.
        """
        hidden = self.token(input_ids)
        if self.position is not None and position_ids is not None:
            hidden = hidden + self.position(position_ids + self.position_offset)
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
            self.weight = nn.Parameter(torch.empty(config.d_model, *config.score_axes))
            self.bias = nn.Parameter(torch.zeros(config.score_axes))
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


def turned(heads: Tensor, positions: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Apply rotary positions (Su et al., 2021): turn number ``j`` with number ``head_dim / 2 + j``.

    Args:
        heads: ``[..., n_heads, head_dim]``.
        positions: ``[...]`` integers, the place of each token in its sequence, from 0.
        frequencies: ``[head_dim / 2]``, radians a position.
    """
    speeds = torch.tensor(frequencies, dtype=torch.float32, device=heads.device)
    angles = positions[..., None, None].float() * speeds
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al., 2017).

    Keys and values may have fewer heads than queries (Ainslie et al., 2023): each then serves as
    many of these, in order.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_key_heads
        self.causal = config.causal
        self.frequencies: tuple[float, ...] = ()
        """Of rotary positions; none: there are none."""
        if config.rotary is not None:
            self.frequencies = config.rotary.frequencies(config.head_width)
        width = config.n_heads * config.head_width
        kv_width = config.n_key_heads * config.head_width
        bias = config.attention_bias
        self.query = nn.Linear(config.d_model, width, bias=bias)
        self.key = nn.Linear(config.d_model, kv_width, bias=bias)
        self.value = nn.Linear(config.d_model, kv_width, bias=bias)
        self.output = nn.Linear(width, config.d_model, bias=bias)

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
        value = self._shared(self.value(hidden).unflatten(-1, (self.n_kv_heads, -1)))
        mixed = self.weights(hidden, visible, places) @ value.transpose(1, 2)
        return self.output(mixed.transpose(1, 2).flatten(-2))

    def weights(self, hidden: Tensor, visible: Tensor, places: Tensor | None = None) -> Tensor:
        """Return how much each token takes from each, ``[batch, n_heads, seq, seq]``.

        Queries before keys; see :meth:`forward` for the arguments.
        """
        query = self.query(hidden).unflatten(-1, (self.n_heads, -1))
        key = self.key(hidden).unflatten(-1, (self.n_kv_heads, -1))
        if self.frequencies:
            if places is None:
                places = torch.arange(hidden.shape[1], device=hidden.device).expand_as(visible)
            query = turned(query, places, self.frequencies)
            key = turned(key, places, self.frequencies)
        query, key = query.transpose(1, 2), self._shared(key).transpose(1, 2)
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        seen = self.seen(visible, places)
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1)

    def _shared(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=-2)


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, which a third one may multiply.

    Gated, it is ``down(activation(gate(x)) · up(x))`` (Shazeer, 2020).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        bias = config.feed_forward_bias
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=bias) if config.gated else None
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., d_model]`` to ``[..., d_model]``."""
        if self.gate is None:
            return self.down(self.activated(self.up(hidden)))
        return self.down(self.activated(self.gate(hidden)) * self.up(hidden))

    def activated(self, inner: Tensor) -> Tensor:
        """Apply the activation, element by element."""
        if self.activation == "relu":
            return F.relu(inner)
        if self.activation == "silu":
            return F.silu(inner)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return F.gelu(inner, approximate=approximate)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm before or after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm_placement == "pre"
        self.attention = Attention(config)
        self.attention_norm = norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = norm(config)

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
        self.norm = norm(config) if config.final_norm else None
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
