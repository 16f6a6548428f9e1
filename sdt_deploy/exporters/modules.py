"""What the modules that become graphs have in common: their inputs and outputs, and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.config import ModelConfig, Precision
from sdt_deploy.exporters.products import PackedLinear, packed_norm
from sdt_deploy.model.blocks import Head, Scorer


class GraphModule(nn.Module):
    """A module that becomes one graph; ``inputs`` are in the order of ``forward``'s arguments."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def int32(name: str, *axes: str | int) -> TensorSpec:
    """Return an int32 input or output."""
    return TensorSpec(name=name, axes=axes, dtype="int32")


def float32(name: str, *axes: str | int) -> TensorSpec:
    """Return a float32 input or output."""
    return TensorSpec(name=name, axes=axes, dtype="float32")


def states_of(name: str, *axes: str | int, precision: Precision) -> TensorSpec:
    """Return states, in the precision of the export."""
    return TensorSpec(name=name, axes=axes, dtype=precision)


def scores_of(config: ModelConfig, *axes: str) -> TensorSpec:
    """Return the scores of rows; with a probe for each layer there is one more axis."""
    return float32("scores", *axes, *config.score_axes)


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the type of states and products."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


class PackedHead(nn.Module):
    """The oracle's head with its products in packed form; pooling is the caller's part.

    The products are in ``dtype``, all else is float32, the output too.
    """

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = head.config
        self.dtype = dtype
        self.norm = None if head.norm is None else packed_norm(head.norm)
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


class Probes(nn.Module):
    """The probes of all layers, ``sigmoid(states · weight + bias)`` in float32, without pins."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.weight, self.bias = scorer.weight, scorer.bias

    def forward(self, states: Tensor) -> Tensor:
        """Score ``states [n_tokens, d_model]``: ``[n_tokens, n_layers]``."""
        return torch.sigmoid(states.float() @ self.weight + self.bias)
