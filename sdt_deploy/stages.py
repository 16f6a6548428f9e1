"""Which consecutive layers share a stage: a pure decision over counts and costs.

A stage is one engine call. It computes all its layers for every row that enters it, so a token that
leaves in the middle is computed to the end of the stage. Joining layers saves calls and costs rows
(``docs/decisions/014-routing-modes.md``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdt_deploy.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Milliseconds of one stage, for batches of one size on one machine."""

    call_ms: float
    """A call with its first layer, apart from the rows; the runtime's own work for it included."""
    row_ms: float
    """Each row, in the first layer."""
    next_ms: float
    """Each further layer of the same call, apart from the rows."""
    next_row_ms: float
    """Each row, in each further layer."""

    def predict_ms(self, n_layers: int, n_rows: float) -> float:
        """Return what a stage of ``n_layers`` costs for ``n_rows``; without rows it is not run."""
        if n_rows <= 0:
            return 0.0
        first = self.call_ms + self.row_ms * n_rows
        return first + (n_layers - 1) * (self.next_ms + self.next_row_ms * n_rows)

    @classmethod
    def fit(
        cls, single: Sequence[tuple[int, float]], double: Sequence[tuple[int, float]]
    ) -> StageCosts:
        """Fit through two measurements ``(rows, milliseconds)`` each.

        Args:
            single: of a stage of one layer, at few and at many rows.
            double: of a stage of two layers, at the same rows.

        No part of the result is negative.
        """
        fixed, rate = _line(*single)
        fixed_both, rate_both = _line(*double)
        return cls(
            call_ms=fixed,
            row_ms=rate,
            next_ms=max(0.0, fixed_both - fixed),
            next_row_ms=max(0.0, rate_both - rate),
        )


def parse_stages(text: str) -> tuple[int, ...]:
    """Parse the layers of each stage, such as ``1,3,2``.

    Raises:
        InputError: if it reads otherwise.
    """
    sizes = [item.strip() for item in text.split(",")]
    if not all(size.isascii() and size.isdigit() and len(size) < 10 for size in sizes):
        raise InputError(
            f"stages are given as the layers of each (1,3,2), or as auto, not {text[:80]!r}"
        )
    return tuple(map(int, sizes))


def active_rows(depth_histogram: Sequence[int], n_tokens: int) -> tuple[float, ...]:
    """Return how many of ``n_tokens`` are active in each layer.

    Args:
        depth_histogram: ``[n_layers + 1]``, tokens of a text that pass through 0, 1, … layers.
        n_tokens: tokens of a batch.

    Raises:
        ConfigError: if the histogram has no tokens.
    """
    total = sum(depth_histogram)
    if total <= 0 or min(depth_histogram) < 0:
        raise ConfigError("a depth histogram needs counts, at least one of them positive")
    return tuple(
        n_tokens * sum(depth_histogram[layer + 1 :]) / total
        for layer in range(len(depth_histogram) - 1)
    )


def plan_stages(rows: Sequence[float], costs: StageCosts) -> tuple[int, ...]:
    """Group consecutive layers so that all stages together cost least.

    By dynamic programming over the last stage, in quadratic time. Of equally cheap groupings the
    one with the shorter last stages wins.

    Args:
        rows: active tokens of each layer; they do not rise.
        costs: of stages.

    Returns:
        The number of layers of every stage, in order.

    Raises:
        ConfigError: if the counts rise, or there are none.
    """
    n_layers = len(rows)
    if not n_layers or any(later > earlier for earlier, later in pairwise(rows)):
        raise ConfigError(f"active tokens must not rise from layer to layer: {list(rows)}")
    best = [0.0] + [math.inf] * n_layers
    first = [0] * (n_layers + 1)
    for stop in range(1, n_layers + 1):
        for start in range(stop - 1, -1, -1):
            cost = best[start] + costs.predict_ms(stop - start, rows[start])
            if cost < best[stop]:
                best[stop], first[stop] = cost, start
    sizes: list[int] = []
    stop = n_layers
    while stop:
        sizes.insert(0, stop - first[stop])
        stop = first[stop]
    return tuple(sizes)


def _line(few: tuple[int, float], many: tuple[int, float]) -> tuple[float, float]:
    """Return the fixed part and the rate, neither negative, of a line through two points."""
    (n_few, ms_few), (n_many, ms_many) = few, many
    rate = max(0.0, (ms_many - ms_few) / (n_many - n_few)) if n_many > n_few else 0.0
    return max(0.0, ms_few - rate * n_few), rate
