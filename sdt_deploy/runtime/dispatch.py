"""Whether compaction pays: a pure decision over a small cost model.

All candidates compute the same function; ``dense`` is another one and is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

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
MAX_REMEMBERED = 512
"""Sequences of a batch whose choice is remembered."""


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


class Work(NamedTuple):
    """Operations of a run, in the two kinds whose speeds differ."""

    rows: float
    """Products over rows, head and probe included."""
    pairs: float
    """Products over query–key pairs."""


@dataclass(frozen=True, kw_only=True)
class LinearCost:
    """Time of a path as a fixed part and two rates."""

    fixed_ms: float
    rows_ms_per_gflop: float
    pairs_ms_per_gflop: float

    def predict_ms(self, work: Work) -> float:
        """Return the expected time of ``work``."""
        rows_ms = self.rows_ms_per_gflop * work.rows * 1e-9
        return self.fixed_ms + rows_ms + self.pairs_ms_per_gflop * work.pairs * 1e-9

    @classmethod
    def fit(cls, points: Sequence[tuple[Work, float]]) -> LinearCost:
        """Fit to what took how many milliseconds; no part falls below 0, as noise might have it."""
        parts = np.array([(1.0, work.rows * 1e-9, work.pairs * 1e-9) for work, _ in points])
        times = np.array([ms for _, ms in points])
        found, kept = np.zeros(3), [0, 1, 2]
        while kept:
            found[:] = 0.0
            found[kept] = np.linalg.lstsq(parts[:, kept], times, rcond=None)[0]
            if found.min() >= 0.0:
                break
            kept.remove(int(found.argmin()))
        fixed, rows, pairs = found.tolist()
        return cls(fixed_ms=fixed, rows_ms_per_gflop=rows, pairs_ms_per_gflop=pairs)


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
            works = path_works(config, lengths, active_shares, self.lines)
            for path, line in self.lines.items():
                total_ms[path] += line.predict_ms(works[path])
        return min(total_ms, key=total_ms.__getitem__)


Choice = Callable[[tuple[tuple[int, ...], ...], tuple[float, ...]], Path]
"""Picks the path for what a batch runs as, each part by the tokens of its sequences, at thresholds
of one per layer."""


def remembered_choice(costs: CostModel, manifest: Manifest) -> Choice:
    """Return :meth:`CostModel.choose` for a bundle, which remembers the sizes it saw last.

    Not those of batches of more than :data:`MAX_REMEMBERED` sequences, which would take memory, and
    which take long beside a choice.
    """

    def choice(parts: tuple[tuple[int, ...], ...], thresholds: tuple[float, ...]) -> Path:
        return costs.choose(manifest.model, parts, active_shares(manifest, thresholds))

    remembered = lru_cache(256)(choice)

    def found(parts: tuple[tuple[int, ...], ...], thresholds: tuple[float, ...]) -> Path:
        few = sum(map(len, parts)) <= MAX_REMEMBERED
        return (remembered if few else choice)(parts, thresholds)

    return found


def path_works(
    config: ModelConfig,
    lengths: Sequence[int],
    active_shares: Sequence[float],
    paths: Iterable[Path],
) -> dict[Path, Work]:
    """Return what each path computes if every sequence had the expected shares."""
    works = dict.fromkeys(paths, expected_work(config, lengths, active_shares))
    if "masked" in works:
        works["masked"] = padded_work(config, lengths)
    return works


def padded_work(config: ModelConfig, lengths: Sequence[int]) -> Work:
    """Return the operations of a graph that pads and skips nothing."""
    padded = [max(lengths)] * len(lengths)
    pairs = config.n_layers * pair_flops(config, sum(n * n for n in padded))
    return Work(dense_flops(config, padded) - pairs, pairs)


def expected_work(
    config: ModelConfig, lengths: Sequence[int], active_shares: Sequence[float]
) -> Work:
    """Return the operations with skipping if every sequence had the expected shares."""
    batch, n_tokens, n_pairs = len(lengths), sum(lengths), sum(n * n for n in lengths)
    sees_all = config.context == "all"
    rows = head_flops(config, n_tokens=n_tokens, batch=batch)
    rows += score_flops(config, n_tokens=n_tokens)
    pairs = 0.0
    for share in active_shares:
        seen = 1.0 if sees_all and share else share
        rows += layer_flops(
            config, n_active=share * n_tokens, n_context=seen * n_tokens, n_pairs=0.0
        )
        pairs += pair_flops(config, share * seen * n_pairs)
    return Work(rows, pairs)


def pair_flops(config: ModelConfig, n_pairs: float) -> float:
    """Return the operations of a layer over query–key pairs."""
    return layer_flops(config, n_active=0.0, n_context=0.0, n_pairs=n_pairs)


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


def calibration_sizes(
    longest: int, n_tokens: int, max_sequences: Callable[[int], int] | None = None
) -> list[tuple[int, ...]]:
    """Return sizes from which the fixed part and the rates of a path follow.

    These are one short sequence, and many tokens in short sequences and in long ones.

    Args:
        longest: tokens of the longest sequence that may be run.
        n_tokens: as many as keep the hardware busy.
        max_sequences: how many sequences of a length may run together; None: any number.
    """
    sizes: list[tuple[int, ...]] = [(min(8, longest),)]
    for length in (min(64, longest), min(512, longest)):
        n_sequences = max(1, n_tokens // length)
        if max_sequences is not None:
            n_sequences = min(n_sequences, max_sequences(length))
        sizes.append((length,) * n_sequences)
    return list(dict.fromkeys(sizes))


def calibrate(
    config: ModelConfig,
    paths: Sequence[Path],
    active_shares: Sequence[float],
    measure: Callable[[Sequence[int]], Mapping[Path, float]],
    sizes: Sequence[Sequence[int]],
) -> CostModel:
    """Make a cost model from measurements.

    Args:
        config: the model.
        paths: to choose from.
        active_shares: expected share of active tokens in every layer.
        measure: runs all paths on sequences of the given lengths, with these shares of their tokens
            active; returns the milliseconds that each path took.
        sizes: to measure, each by the lengths of its sequences; see :func:`calibration_sizes`.
    """
    points: dict[Path, list[tuple[Work, float]]] = {path: [] for path in paths}
    for lengths in sizes:
        works, ms = path_works(config, lengths, active_shares, paths), measure(lengths)
        for path in paths:
            points[path].append((works[path], ms[path]))
    return CostModel(lines={path: LinearCost.fit(found) for path, found in points.items()})
