"""Times the paths to choose from, for the cost model behind ``path="auto"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sdt_deploy.config import ModelConfig
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.dispatch import CostModel, Path, calibrate, needed_flops, padded_flops
from sdt_deploy.runtime.result import RunResult

MIN_RUNS, MIN_MS = 5, 30.0
"""Of each path and size; runs of half a millisecond need more than five of them to be told apart
from what else the machine does. The paths take turns: a machine that is slow for a while is so for
all of them."""


def random_batch(config: ModelConfig, lengths: Sequence[int]) -> TokenBatch:
    """Return a batch of random tokens, the same ones for the same lengths."""
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, cu_seqlens[-1])
    return TokenBatch.from_packed(ids, cu_seqlens, config=config)


def measure_costs(
    config: ModelConfig,
    paths: Sequence[Path],
    run: Callable[[TokenBatch, Path], RunResult],
    *,
    n_large: int = 4,
    longest: int = 128,
) -> CostModel:
    """Return the cost model of ``run`` over ``paths`` after a few runs on random tokens.

    For the sizes see :func:`sdt_deploy.runtime.dispatch.calibrate`.
    """

    def measure(lengths: Sequence[int]) -> dict[Path, tuple[float, float]]:
        batch = random_batch(config, lengths)
        first = [run(batch, path) for path in paths]  # opens the graphs, too
        times: dict[Path, list[float]] = {path: [] for path in paths}
        while any(len(ms) < MIN_RUNS or sum(ms) < MIN_MS for ms in times.values()):
            for path in paths:
                times[path].append(run(batch, path).timings.total_ms)
        padded = padded_flops(config, lengths)
        needed = needed_flops(config, first[0].depths, batch.cu_seqlens, first[0].active)
        return {
            path: (padded if path == "masked" else needed, min(ms)) for path, ms in times.items()
        }

    return calibrate(config, paths, measure, n_large=n_large, longest=longest)
