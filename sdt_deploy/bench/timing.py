"""Interleaved timing: every round runs each candidate once, in changing order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

MIN_ROUNDS = 7
MAX_ROUNDS = 200
WARM_UP_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Times of one candidate, in milliseconds."""

    median_ms: float
    spread_ms: float
    """Interquartile range."""
    n_runs: int


def wall_ms(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = perf_counter()
    run()
    return (perf_counter() - start) * 1e3


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    seed: int = 0,
    clock: Callable[[Callable[[], object]], float] = wall_ms,
) -> dict[str, Timed]:
    """Time ``candidates`` against each other.

    Args:
        candidates: what to run, by name.
        budget_s: stop after about this long, but not before :data:`MIN_ROUNDS` rounds.
        seed: of the order within the rounds.
        clock: runs a candidate and returns its milliseconds.
    """
    order = list(candidates)
    generator = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(WARM_UP_ROUNDS):
        for name in order:
            candidates[name]()
    start = perf_counter()
    n_rounds = 0
    while n_rounds < MIN_ROUNDS or (perf_counter() - start < budget_s and n_rounds < MAX_ROUNDS):
        generator.shuffle(order)
        for name in order:
            times[name].append(clock(candidates[name]))
        n_rounds += 1
    summary = {}
    for name, values in times.items():
        low, _, high = quantiles(values, n=4)
        summary[name] = Timed(median_ms=median(values), spread_ms=high - low, n_runs=n_rounds)
    return summary
