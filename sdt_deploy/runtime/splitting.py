"""Batches with too much padding, or too large for memory, run in parts and are put together again.

Attention lays sequences out as ``[batch, max_seqlen]``, so its cost and its memory grow with the
padded tokens. Parts hold sequences of similar length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sdt_deploy.buckets import OptimizationProfile, longest_sequence, max_sequences
from sdt_deploy.checks import check_above_zero, check_positive, plain
from sdt_deploy.config import ModelConfig
from sdt_deploy.costs import FIXED_SCRATCH_BYTES, scratch_bytes_per_sequence
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.ladders import bucket_seqlen, largest_batch
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import Int32

Element = TypeVar("Element", bound=np.generic)
Groups = list[npt.NDArray[np.intp]]
"""Sequence numbers of each part."""


@dataclass(frozen=True, kw_only=True)
class PartLimits:
    """How large a part may be."""

    max_padded_tokens: int = 16_384
    """Sequences times the longest of them. A single sequence may be longer."""
    max_memory_mb: float | None = None
    """Memory above the weights, in 2²⁰ bytes, as :mod:`sdt_deploy.costs` estimates it."""
    profiles: tuple[OptimizationProfile, ...] = ()
    """Batches that the engines take; empty: of any size."""
    bucketed: bool = False
    """Whether batches are padded to buckets, which have to fit the profiles as well."""

    def __post_init__(self) -> None:
        for name in ("max_padded_tokens", "max_memory_mb"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        check_positive("max_padded_tokens", self.max_padded_tokens)
        if self.max_memory_mb is not None:
            check_above_zero("max_memory_mb", self.max_memory_mb)

    def longest(self, config: ModelConfig) -> int:
        """Return the tokens of the longest sequence that may be run.

        Raises:
            InputError: if ``max_memory_mb`` is too little for any.
        """
        longest = longest_sequence(self.profiles, config.max_positions)
        if self.max_memory_mb is None:
            return longest
        available = self.max_memory_mb * 2**20 - FIXED_SCRATCH_BYTES
        needed = partial(scratch_bytes_per_sequence, config)
        fitting = bisect_right(range(1, longest + 1), available, key=needed)
        self.max_sequences(config, max(1, fitting))  # says so if there is none
        return fitting

    def max_sequences(self, config: ModelConfig, longest: int) -> int:
        """Return how many sequences of up to ``longest`` tokens may run together.

        Raises:
            InputError: if one alone would exceed ``max_memory_mb`` or the engines' profiles.
        """
        n_sequences = max(1, self.max_padded_tokens // longest)
        if self.profiles:
            if self.bucketed:
                limit = longest_sequence(self.profiles, config.max_positions)
                longest = bucket_seqlen(longest, max_seqlen=limit)
            n_sequences = min(n_sequences, max_sequences(self.profiles, longest))
            if self.bucketed:
                n_sequences = largest_batch(n_sequences)
            if n_sequences < 1:
                raise InputError(
                    f"a sequence of {longest} tokens is longer than the engines were built for, "
                    f"{self.profiles[-1].max_seqlen.max}: shorten it, or build them with "
                    f"--max-seqlen {longest}"
                )
        if self.max_memory_mb is None:
            return n_sequences
        each = scratch_bytes_per_sequence(config, longest)
        fitting = int((self.max_memory_mb * 2**20 - FIXED_SCRATCH_BYTES) // each)
        if fitting < 1:
            needed = (each + FIXED_SCRATCH_BYTES) / 2**20
            raise InputError(
                f"a sequence of {longest} tokens needs about {needed:.1f} MB, max_memory_mb allows "
                f"{self.max_memory_mb:g}: shorten it or open the session with a higher cap"
            )
        return min(n_sequences, fitting)


def split_batch(lengths: Int32, config: ModelConfig, limits: PartLimits) -> Groups:
    """Group sequences so that no group exceeds ``limits``.

    The longest sequences go together first. A batch that fits needs no groups: none are returned.

    Raises:
        InputError: if a sequence alone needs too much memory.
    """
    if len(lengths) <= limits.max_sequences(config, max(lengths.tolist())):
        return []
    order = np.argsort(-lengths, kind="stable")
    groups, start = [], 0
    while start < len(order):
        left = len(order) - start
        n_parts = math.ceil(left / limits.max_sequences(config, int(lengths[order[start]])))
        size = math.ceil(left / n_parts)  # even parts instead of a small last one
        groups.append(order[start : start + size])
        start += size
    return groups


def select(batch: TokenBatch, sequences: npt.NDArray[np.intp]) -> TokenBatch:
    """Return the batch of the given sequences, in the given order."""
    rows = rows_of(batch.cu_seqlens, sequences)
    types = batch.token_type_ids
    lengths = batch.lengths[sequences]
    return TokenBatch(
        input_ids=batch.input_ids[rows],
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        token_type_ids=None if types is None else types[rows],
    )


def merge(
    parts: Sequence[RunResult], groups: Groups, batch: TokenBatch, *, per_sequence: bool
) -> RunResult:
    """Put the results of the parts of ``batch`` together, in the order of ``batch``."""
    first, scores, active = parts[0], None, None
    sequences = np.concatenate(groups)
    rows = rows_of(batch.cu_seqlens, sequences)
    output = _joined([part.output for part in parts], sequences if per_sequence else rows)
    depths = _joined([part.depths for part in parts], rows)
    if first.scores is not None:
        scores = _joined([part.scores for part in parts if part.scores is not None], rows)
    if first.active is not None:
        active = _joined([part.active for part in parts if part.active is not None], rows)
    times = [part.timings for part in parts]
    return RunResult(
        output=output,
        depths=depths,
        scores=scores,
        input_ids=batch.input_ids.copy(),
        cu_seqlens=batch.cu_seqlens.copy(),
        active=active,
        layer_usage=LayerUsage.of(depths, active, len(first.layer_usage.active_tokens)),
        timings=Timings(
            total_ms=sum(one.total_ms for one in times),
            entry_ms=sum(one.entry_ms for one in times),
            route_ms=sum(one.route_ms for one in times),
            stage_ms=tuple(ms for one in times for ms in one.stage_ms),
            stages=tuple(stage for one in times for stage in one.stages),
            move_ms=sum(one.move_ms for one in times),
            head_ms=sum(one.head_ms for one in times),
        ),
        path=first.path,
        stage_rows=tuple(n_rows for part in parts for n_rows in part.stage_rows),
    )


def _joined(
    arrays: Sequence[npt.NDArray[Element]], places: npt.NDArray[np.intp]
) -> npt.NDArray[Element]:
    """Put rows that lie one after the other in ``arrays`` to ``places``."""
    joined = np.empty((len(places), *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    start = 0
    for array in arrays:
        joined[places[start : start + len(array)]] = array
        start += len(array)
    return joined


def rows_of(cu_seqlens: Int32, sequences: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the packed rows of the given sequences, one sequence after the other."""
    starts = cu_seqlens[sequences]
    lengths = cu_seqlens[sequences + 1] - starts
    ends = lengths.cumsum()
    rows: npt.NDArray[np.intp] = np.arange(ends[-1]) + (starts - (ends - lengths)).repeat(lengths)
    return rows
