"""The forward pass of training: every layer over all tokens, gated by the score of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdt_deploy.model.transformer import SparseDepthTransformer

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
        new = layer(hidden, visible).to(hidden.dtype)
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
