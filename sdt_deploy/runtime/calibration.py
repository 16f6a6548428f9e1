"""Times the paths to choose from, for the cost model behind ``path="auto"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sdt_deploy.config import ModelConfig
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.dispatch import CostModel, Path, calibrate, needed_flops, padded_flops
from sdt_deploy.runtime.result import RunResult


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
) -> CostModel:
    """Return the cost model of ``run`` over ``paths`` after a few runs on random tokens."""

    def measure(path: Path, lengths: Sequence[int]) -> tuple[float, float]:
        batch = random_batch(config, lengths)
        runs = [run(batch, path) for _ in range(6)]
        milliseconds = min(one.timings.total_ms for one in runs[1:])
        if path == "masked":
            return padded_flops(config, lengths), milliseconds
        return needed_flops(config, runs[0].depths, batch.cu_seqlens, runs[0].active), milliseconds

    return calibrate(config, paths, measure, n_large=n_large)
