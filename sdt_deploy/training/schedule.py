"""Pure decisions of a training run: learning rate, depth, temperature, limits between depths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdt_deploy.choices import Curriculum, Levels
from sdt_deploy.model.probe import check_depth, depth_shares


def depth_at(
    progress: float, *, n_layers: int, target_depth: float, curriculum: Curriculum, share: float
) -> float:
    """Return the mean depth to hold at ``progress``: from all layers down to ``target_depth``.

    Args:
        progress: share of the run that is over, 0..1.
        n_layers: layers of the model.
        target_depth: mean depth at the end.
        curriculum: ``linear``; ``cosine``, slow at both ends; ``steps``, one layer at a time, at
            equal intervals.
        share: share of the run in which the depth falls; it stays afterwards. 0: from the start.
    """
    done = progress / share if progress < share else 1.0
    fall = n_layers - target_depth
    if curriculum == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    elif curriculum == "steps" and done < 1.0:
        n_jumps = math.ceil(fall)
        done = min(1.0, math.floor(done * (n_jumps + 1)) / fall) if fall > 0 else 1.0
    return n_layers - done * fall


def learning_rate_at(progress: float, *, warm_up: float) -> float:
    """Return the factor of the learning rate: a rise over ``warm_up``, then half a cosine."""
    if progress < warm_up:
        return progress / warm_up
    return (1 + math.cos(math.pi * (progress - warm_up) / max(1 - warm_up, 1e-9))) / 2


def temperature_at(progress: float, *, first: float, last: float) -> float:
    """Return the temperature of the gates, which falls geometrically."""
    return float(first * (last / first) ** min(1.0, progress))


def free_mean_depth(target_depth: float, pinned_share: float, n_layers: int) -> float:
    """Return the mean depth of unpinned tokens that gives ``target_depth`` over all tokens.

    Raises:
        ConfigError: if the pinned tokens alone need more, or the target is out of range.
    """
    check_depth(target_depth, n_layers)
    if pinned_share >= 1.0:
        return float(n_layers)
    free = (target_depth - pinned_share * n_layers) / (1 - pinned_share)
    return min(free, float(n_layers))


def depth_limits(
    logits: Tensor,
    pinned_share: float,
    *,
    n_layers: int,
    target_depth: float,
    levels: Levels,
    shallow_depth: int,
) -> Tensor:
    """Return ``[n_layers]``, the score logits above which each layer runs, at the wanted depth.

    This is the controller of the depth budget: limits are quantiles of the scores seen last, so
    the budget is held by construction and the loss has no term for it.

    Args:
        logits: ``[n]``, score logits of unpinned tokens.
        pinned_share: share of pinned tokens; they count with full depth.
        n_layers: layers of the model.
        target_depth: layers per token, pinned tokens included.
        levels: see :func:`depth_shares`.
        shallow_depth: see :func:`depth_shares`.

    Raises:
        ConfigError: if the depth cannot be reached.
    """
    mean = free_mean_depth(target_depth, pinned_share, n_layers)
    shares = depth_shares(n_layers, mean, levels, shallow_depth=shallow_depth)
    ordered = logits.detach().sort().values
    limits = torch.full((n_layers,), -torch.inf, device=logits.device)
    for layer in range(1, n_layers):
        place = round(float(shares[:layer].sum()) * len(ordered))
        if place > 0:
            limits[layer] = ordered[min(place, len(ordered)) - 1]
    return limits


class ScoreWindow:
    """The score logits of the last ``size`` unpinned tokens, and the share of pinned ones.

    Limits that came from one small batch would jump from step to step.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.logits = torch.zeros(0)
        self.counts = torch.zeros(2, dtype=torch.float64)
        """Pinned tokens and all tokens, older ones fading out."""

    def add(self, logits: Tensor, n_tokens: int) -> None:
        """Add the logits ``[n]`` of a batch that has ``n_tokens`` tokens, pinned ones included."""
        kept = self.logits.to(logits.device)
        self.logits = torch.cat([kept, logits.detach()])[-self.size :]
        new = torch.tensor([n_tokens - len(logits), n_tokens], dtype=torch.float64)
        self.counts = 0.9 * self.counts + new

    @property
    def pinned_share(self) -> float:
        """Pinned tokens over all tokens."""
        return float(self.counts[0] / self.counts[1])
