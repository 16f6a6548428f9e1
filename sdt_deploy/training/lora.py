"""Low-rank adapters (Hu et al., 2021): a linear layer's weight becomes ``weight + up @ down``.

Written as a parametrisation, so the layers stay those of the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdt_deploy.errors import ConfigError


class LowRank(nn.Module):
    """The parametrisation; it adds nothing until it is trained, as ``up`` begins with zeros."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        down = torch.randn(rank, n_in, generator=generator) / math.sqrt(n_in)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight [n_out, n_in]`` with the product added, in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.up @ self.down


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of the transformer layers, by name."""
    for name, module in model.named_modules():
        if name.startswith("layers.") and isinstance(module, nn.Linear):
            yield name, module


def add_adapters(model: nn.Module, rank: int, *, seed: int) -> None:
    """Put an adapter on every linear layer and freeze what it adapts.

    Raises:
        ConfigError: if ``rank`` is no size below the layers' own.
    """
    generator = torch.Generator().manual_seed(seed)
    found = list(linears(model))
    largest = min(min(linear.weight.shape) for _, linear in found)
    if not 0 < rank <= largest:
        raise ConfigError(f"the rank must lie in 1..{largest} for this model, not {rank}")
    for _, linear in found:
        adapter = LowRank(linear.weight, rank, generator)
        linear.weight.requires_grad_(False)
        parametrize.register_parametrization(linear, "weight", adapter)


def _adapters(model: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """Yield the adapters by the name of the weight."""
    for name, linear in linears(model):
        if parametrize.is_parametrized(linear, "weight"):
            adapter = linear.parametrizations.weight[0]  # type: ignore[union-attr, index]
            assert isinstance(adapter, LowRank)
            yield f"{name}.weight", adapter


def adapter_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return ``up [n_out, rank]`` and ``down [rank, n_in]`` by the name of the weight."""
    return {name: (one.up.detach(), one.down.detach()) for name, one in _adapters(model)}


@torch.no_grad()
def set_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put in what :func:`adapter_factors` returned; other adapters stay as they are."""
    for name, adapter in _adapters(model):
        if name in factors:
            up, down = factors[name]
            adapter.up.copy_(up)
            adapter.down.copy_(down)


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of the model without adapters: their products are in the weights.

    The factors are rounded to float16 first, as their file holds them.
    """
    factors = adapter_factors(model)
    weights = {}
    for name, tensor in model.state_dict().items():
        owner, found, end = name.partition(".parametrizations.weight.")
        if not found:
            weights[name] = tensor
        elif end == "original":
            up, down = factors[f"{owner}.weight"]
            weights[f"{owner}.weight"] = tensor + up.half().float() @ down.half().float()
    return weights
