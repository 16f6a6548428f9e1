"""What a layer computes row by row, in the forms to export: products, norms, the feed-forward."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from sdt_deploy.model.blocks import FeedForward


class PackedLinear(nn.Module):
    """``rows @ weight + bias`` in ``dtype`` with the weight stored as ``[in, out]``."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, *, biased: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.to(dtype).contiguous())
        self.bias = None
        if biased and linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype))

    def without_bias(self) -> PackedLinear:
        """Return the product alone, which shares the weight."""
        part = copy.copy(self)
        part._parameters = {**self._parameters, "bias": None}
        return part

    def beside(self, other: PackedLinear) -> PackedLinear:
        """Return one product for both, without bias: the columns of this one, then the other's."""
        joined = self.without_bias()
        columns = torch.cat([self.weight.detach(), other.weight.detach()], dim=1)
        joined._parameters["weight"] = nn.Parameter(columns)
        return joined

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``[n_tokens, in]`` to ``[n_tokens, out]``."""
        return self.biased(rows @ self.weight)

    def biased(self, product: Tensor) -> Tensor:
        """Add the bias, if there is one, to ``rows @ weight``."""
        return product if self.bias is None else product + self.bias


class PackedRMSNorm(nn.Module):
    """RMSNorm in the form that ONNX Runtime knows as one operator."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        assert norm.eps is not None
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, rows: Tensor) -> Tensor:
        """Scale ``[n_tokens, d_model]`` to a mean square of 1, then by the weight."""
        mean = rows.pow(2).mean(dim=-1, keepdim=True)
        return rows / (mean + self.eps).sqrt() * self.weight


def packed_norm(norm: nn.Module) -> nn.Module:
    """Return ``norm`` in the form to export."""
    return PackedRMSNorm(norm) if isinstance(norm, nn.RMSNorm) else norm


class PackedFeedForward(nn.Module):
    """The feed-forward block over packed rows."""

    def __init__(self, block: FeedForward, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation = block.activation
        self.up = PackedLinear(block.up, dtype)
        self.gate = None if block.gate is None else PackedLinear(block.gate, dtype)
        self.down = PackedLinear(block.down, dtype)

    def inner(self, rows: Tensor) -> Tensor:
        """Map ``[n_tokens, d_model]`` to ``[n_tokens, d_ff]``, activated."""
        if self.gate is None:
            return self.activated(self.up(rows))
        return self.activated(self.gate(rows)) * self.up(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """Map ``[n_tokens, d_model]`` to the same shape."""
        return self.down(self.inner(rows))

    def activated(self, inner: Tensor) -> Tensor:
        """Apply the activation, element by element."""
        if self.activation == "relu":
            return torch.relu(inner)
        if self.activation == "silu":
            return inner * torch.sigmoid(inner)
        if self.activation == "gelu_tanh":
            cubic = (inner * inner * inner * 0.044715 + inner) * math.sqrt(2 / math.pi)
            return inner * (torch.tanh(cubic) + 1.0) * 0.5
        return inner * (torch.erf(inner / math.sqrt(2)) + 1.0) * 0.5
