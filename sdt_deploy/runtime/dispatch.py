"""Whether compaction pays: a pure decision over a small cost model.

All candidates compute the same function; ``dense`` is another one and is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import Manifest
from sdt_deploy.config import ModelConfig
from sdt_deploy.costs import (
    active_shares,
    dense_flops,
    head_flops,
    layer_flops,
    score_flops,
    sparse_flops,
)
from sdt_deploy.runtime.routing import Int32

Path = Literal["sparse", "single", "masked"]


def candidates(config: ModelConfig, has: Callable[[str], bool]) -> tuple[Path, ...]:
    """Return the paths worth choosing from; of equally fast ones the first is taken.

    ``single`` takes the place of ``masked`` where tokens can leave: both are one call, and opening
    both would keep the weights in memory once more.

    Args:
        config: the model.
        has: tells whether the backend has a graph, by name.
    """
    if has("single") and config.probe != "none":
        return "sparse", "single"
    return ("sparse", "masked") if has("masked") else ("sparse",)


@dataclass(frozen=True, kw_only=True)
class LinearCost:
    """Time of a path as a fixed part and a rate."""

    fixed_ms: float
    ms_per_gflop: float

    def predict_ms(self, flops: float) -> float:
        """Return the expected time for ``flops`` operations."""
        return self.fixed_ms + self.ms_per_gflop * flops * 1e-9

    @classmethod
    def fit(cls, small: tuple[float, float], large: tuple[float, float]) -> LinearCost:
        """Fit through two measurements ``(flops, milliseconds)``; neither part falls below 0."""
        (flops_small, ms_small), (flops_large, ms_large) = small, large
        rate = 0.0
        if flops_large > flops_small:
            rate = max(0.0, (ms_large - ms_small) / (flops_large - flops_small) * 1e9)
        return cls(fixed_ms=max(0.0, ms_small - rate * flops_small * 1e-9), ms_per_gflop=rate)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What the paths to choose from cost on this machine."""

    lines: Mapping[Path, LinearCost]

    def choose(
        self,
        config: ModelConfig,
        parts: Sequence[Sequence[int]],
        active_shares: Sequence[float],
    ) -> Path:
        """Return the path that is expected to be faster.

        Args:
            config: the model.
            parts: what the batch runs as, each by the tokens of its sequences.
            active_shares: expected share of active tokens in every layer.
        """
        total_ms = dict.fromkeys(self.lines, 0.0)
        for lengths in parts:
            needed = expected_flops(config, lengths, active_shares)
            for path, line in self.lines.items():
                flops = padded_flops(config, lengths) if path == "masked" else needed
                total_ms[path] += line.predict_ms(flops)
        return min(total_ms, key=total_ms.__getitem__)


Choice = Callable[[tuple[tuple[int, ...], ...], tuple[float, ...]], Path]
"""Picks the path for what a batch runs as, each part by the tokens of its sequences, at thresholds
of one per layer."""


def remembered_choice(costs: CostModel, manifest: Manifest) -> Choice:
    """Return :meth:`CostModel.choose` for a bundle, which remembers the sizes it saw last."""

    @lru_cache(256)
    def choice(parts: tuple[tuple[int, ...], ...], thresholds: tuple[float, ...]) -> Path:
        return costs.choose(manifest.model, parts, active_shares(manifest, thresholds))

    return choice


def padded_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Return the operations of a graph that pads and skips nothing."""
    return dense_flops(config, [max(lengths)] * len(lengths))


def expected_flops(
    config: ModelConfig, lengths: Sequence[int], active_shares: Sequence[float]
) -> float:
    """Return the operations with skipping if every sequence had the expected shares."""
    batch, n_tokens, n_pairs = len(lengths), sum(lengths), sum(n * n for n in lengths)
    sees_all = config.context == "all"
    total = head_flops(config, n_tokens=n_tokens, batch=batch)
    total += score_flops(config, n_tokens=n_tokens)
    for share in active_shares:
        seen = 1.0 if sees_all and share else share
        total += layer_flops(
            config,
            n_active=share * n_tokens,
            n_context=seen * n_tokens,
            n_pairs=share * seen * n_pairs,
        )
    return total


def needed_flops(
    config: ModelConfig,
    depths: Int32,
    cu_seqlens: Int32,
    active: npt.NDArray[np.bool_] | None = None,
) -> float:
    """Return the operations with skipping at ``depths [n_tokens]``.

    ``active [n_tokens, n_layers]`` says which layers these are, if not the first ones.
    """
    if active is None:
        active = depths[:, None] > np.arange(config.n_layers)
    counts = np.add.reduceat(active, cu_seqlens[:-1], axis=0, dtype=np.int64).T.tolist()
    return sparse_flops(config, np.diff(cu_seqlens).tolist(), counts)


def calibrate(
    config: ModelConfig,
    paths: Sequence[Path],
    measure: Callable[[Sequence[int]], Mapping[Path, tuple[float, float]]],
    *,
    n_large: int = 4,
    longest: int = 128,
) -> CostModel:
    """Make a cost model from two measurements of each path.

    Args:
        config: the model.
        paths: to choose from.
        measure: runs all paths on sequences of the given lengths; returns for each the operations
            that were needed and the milliseconds that they took.
        n_large: sequences of the larger one; as many as keep the hardware busy.
        longest: tokens of each of them, if the model takes as many.
    """
    longest = min(longest, config.max_positions)
    small, large = measure([min(longest, 8)]), measure([longest] * n_large)
    return CostModel(lines={path: LinearCost.fit(small[path], large[path]) for path in paths})
