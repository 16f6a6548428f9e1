"""The forward pass of training: every layer over all tokens, gated by the score of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sdt_deploy.model.blocks import TransformerLayer
from sdt_deploy.model.transformer import SparseDepthTransformer

FAR_BELOW = -1e4
"""Added to the attention logits of tokens that are not to be seen; within bfloat16 and float16."""
Gate = Literal["hard", "straight-through", "soft"]


@dataclass(frozen=True, kw_only=True)
class RoutedOutput:
    """What a training forward returns."""

    hidden_states: Tensor
    """``[batch, seq, d_model]``, last state of every token, before the final norm."""
    depths: Tensor
    """``[batch, seq]`` int32, 0 for padding."""


def pinned_tokens(model: SparseDepthTransformer, input_ids: Tensor) -> Tensor:
    """Return ``[batch, seq]`` bool, the tokens that always pass through all layers."""
    return torch.isin(input_ids.int(), model.scorer.pinned_token_ids)


def layer_forward(layer: TransformerLayer, hidden: Tensor, visible: Tensor) -> Tensor:
    """Return what ``layer(hidden, visible)`` does, by fused attention.

    Rows of sequences without a visible token mean nothing here either, but are finite.

    Args:
        layer: of the student or the teacher.
        hidden: ``[batch, seq, d_model]``.
        visible: ``[batch, seq]`` bool.
    """
    attention = layer.attention
    states = layer.attention_norm(hidden) if layer.pre_norm else hidden
    query, key, value = (
        projection(states).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for projection in (attention.query, attention.key, attention.value)
    )
    bias = torch.where(visible, 0.0, FAR_BELOW).to(query.dtype)[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    attended = attention.output(mixed.transpose(1, 2).flatten(-2))
    if layer.pre_norm:
        hidden = hidden + attended
        return hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
    hidden = layer.attention_norm(hidden + attended)
    return layer.feed_forward_norm(hidden + layer.feed_forward(hidden))


def routed_forward(
    model: SparseDepthTransformer,
    input_ids: Tensor,
    mask: Tensor,
    embedded: Tensor,
    logits: Tensor,
    limits: Tensor,
    *,
    gate: Gate,
    temperature: float = 1.0,
) -> RoutedOutput:
    """Run the layers; layer ``i`` belongs to the tokens with ``logits > limits[i]``.

    ``hard`` is the function of the oracle: a token takes a layer or keeps its state.
    ``straight-through`` has the same values, and passes the probe the gradient of a sigmoid of the
    distance to the limit (Bengio et al., 2013). ``soft`` mixes new and old state by that sigmoid,
    and becomes ``hard`` as the temperature falls.

    Args:
        model: the student.
        input_ids: ``[batch, seq]``.
        mask: ``[batch, seq]`` bool, True for tokens.
        embedded: ``[batch, seq, d_model]``, what ``model.embed`` gave.
        logits: ``[batch, seq]`` float32, what ``model.scorer.logits`` gave.
        limits: ``[n_layers]``, nondecreasing; minus infinity: every token.
        gate: see above.
        temperature: of the sigmoid, in units of the logits.
    """
    pinned = pinned_tokens(model, input_ids)
    hidden = embedded
    depths = torch.zeros_like(input_ids, dtype=torch.int32)
    for layer, limit in zip(model.blocks, limits, strict=True):
        active = ((logits > limit) | pinned) & mask
        visible = active if model.config.context == "active" else mask
        new = layer_forward(layer, hidden, visible).to(hidden.dtype)
        depths = depths + active
        if gate == "hard":
            hidden = torch.where(active[..., None], new, hidden)
            continue
        openness = torch.sigmoid((logits - limit) / temperature)
        openness = torch.where(pinned, 1.0, openness)[..., None].to(hidden.dtype)
        if gate == "soft":
            hidden = hidden + openness * (new - hidden)
        else:
            kept = torch.where(active[..., None], new, hidden)
            hidden = kept + (openness - openness.detach()) * (new - hidden).detach()
    return RoutedOutput(hidden_states=hidden, depths=depths)
