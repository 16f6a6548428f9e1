"""Times the paths to choose from, for the cost model behind ``path="auto"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import numpy as np
import numpy.typing as npt

from sdt_deploy.config import ModelConfig, shown
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.dispatch import CostModel, Path, calibrate
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.splitting import PartLimits

MIN_RUNS, MIN_MS = 5, 50.0
"""Of each path and size; runs of half a millisecond need more than five of them to be told apart
from what else the machine does. The paths take turns: a machine that is slow for a while is so for
all of them."""


def calibration_tokens(limits: PartLimits, *, on_device: bool) -> int:
    """Return how many tokens keep the hardware busy enough to tell what they cost.

    On a CPU a quarter of what runs at once, as that grows with the threads, within bounds: with
    eight threads 512 tokens told too little of long sequences, and more than 2048 would only take
    longer.
    """
    return 16_384 if on_device else min(max(512, limits.max_padded_tokens // 4), 2048)


def random_batch(config: ModelConfig, lengths: Sequence[int]) -> TokenBatch:
    """Return a batch of random tokens, the same ones for the same lengths.

    Raises:
        InputError: if a length is no whole number from 1 to the model's positions.
    """
    try:
        sizes = [index(length) for length in lengths]
    except TypeError as error:
        raise InputError(f"lengths are whole numbers, not {shown(lengths)}") from error
    if not all(1 <= size <= config.max_positions for size in sizes):
        raise InputError(
            f"lengths must lie in 1..{config.max_positions}, the model's positions, and are "
            f"{shown(sizes)}"
        )
    cu_seqlens = np.cumsum([0, *sizes], dtype=np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, cu_seqlens[-1])
    return TokenBatch.from_packed(ids, cu_seqlens, config=config)


def measure_costs(
    config: ModelConfig,
    active_shares: Sequence[float],
    paths: Sequence[Path],
    run: Callable[[TokenBatch, tuple[float, ...], Path], RunResult],
    sizes: Sequence[Sequence[int]],
) -> CostModel:
    """Return the cost model of ``run`` over ``paths`` after a few runs on random tokens.

    Their scores say little about those of real text, so they run at thresholds that let through the
    shares of them that are expected.

    Args:
        config: of the model.
        active_shares: expected share of active tokens in every layer.
        paths: to choose from.
        run: runs a batch at thresholds, one per layer, on a path.
        sizes: see :func:`sdt_deploy.runtime.dispatch.calibration_sizes`.
    """

    def measure(lengths: Sequence[int]) -> dict[Path, float]:
        batch = random_batch(config, lengths)
        thresholds = config.thresholds
        opened = [run(batch, thresholds, path) for path in paths]
        scores = opened[0].scores
        if scores is not None and (config.routing, config.selection) == ("once", "threshold"):
            thresholds = thresholds_for_shares(scores, active_shares)
        times: dict[Path, list[float]] = {path: [] for path in paths}
        while any(len(ms) < MIN_RUNS or sum(ms) < MIN_MS for ms in times.values()):
            for path in paths:
                times[path].append(run(batch, thresholds, path).timings.total_ms)
        return {path: min(ms) for path, ms in times.items()}

    return calibrate(config, paths, active_shares, measure, sizes)


def thresholds_for_shares(
    scores: npt.NDArray[np.float32], active_shares: Sequence[float]
) -> tuple[float, ...]:
    """Return thresholds that as near as possible ``active_shares`` of ``scores [n_tokens]`` exceed.

    Shares do not rise, so the thresholds do not fall.
    """
    rising = [-1.0, *np.sort(scores).tolist()]  # scores lie in (0, 1)
    return tuple(rising[round((1 - share) * len(scores))] for share in active_shares)
