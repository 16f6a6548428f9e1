"""Whether compaction pays: a pure decision over a small cost model.

Both candidates, ``sparse`` and ``masked``, compute the same function; ``dense`` is another one and
is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdt_deploy.config import ModelConfig
from sdt_deploy.costs import dense_flops, sparse_flops
from sdt_deploy.runtime.routing import Int32

Path = Literal["sparse", "masked"]


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
    """What the two paths cost on this machine."""

    sparse: LinearCost
    masked: LinearCost

    def choose(
        self, config: ModelConfig, groups: Sequence[Sequence[int]], active_shares: Sequence[float]
    ) -> Path:
        """Return the path that is expected to be faster.

        Args:
            config: the model.
            groups: the parts that the batch runs in, each with the tokens of its sequences.
            active_shares: expected share of active tokens in every layer.
        """
        masked_ms = sparse_ms = 0.0
        for lengths in groups:
            padded = [max(lengths)] * len(lengths)
            masked_ms += self.masked.predict_ms(dense_flops(config, padded))
            needed = expected_flops(config, lengths, active_shares)
            sparse_ms += self.sparse.predict_ms(needed)
        return "sparse" if sparse_ms <= masked_ms else "masked"


def expected_flops(
    config: ModelConfig, lengths: Sequence[int], active_shares: Sequence[float]
) -> float:
    """Return the operations of the sparse path if every sequence had the expected shares."""
    active = [
        [max(1, round(n * share)) if share else 0 for n in lengths] for share in active_shares
    ]
    return sparse_flops(config, lengths, active)


def needed_flops(config: ModelConfig, depths: Int32, cu_seqlens: Int32) -> float:
    """Return the operations of the sparse path at ``depths [n_tokens]``."""
    starts = cu_seqlens[:-1]
    active = [np.add.reduceat(depths > i, starts).tolist() for i in range(config.n_layers)]
    return sparse_flops(config, np.diff(cu_seqlens).tolist(), active)


def calibrate(
    config: ModelConfig, measure: Callable[[Path, Sequence[int]], tuple[float, float]]
) -> CostModel:
    """Make a cost model from four measurements.

    Args:
        config: the model.
        measure: runs one path on sequences of the given lengths; returns the operations that were
            needed and the milliseconds that they took.
    """
    small, large = [min(config.max_positions, 8)], [min(config.max_positions, 128)] * 4
    return CostModel(
        sparse=LinearCost.fit(measure("sparse", small), measure("sparse", large)),
        masked=LinearCost.fit(measure("masked", small), measure("masked", large)),
    )
