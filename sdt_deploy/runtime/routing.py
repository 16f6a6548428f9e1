"""Where every token goes: pure functions from depths to a route plan.

A *row* is a position in the packed states that a stage processes; a *token* is a position in the
packed batch. Compaction keeps the order, so rows of a sequence stay together and in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sdt_deploy.config import Context

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PaddedLayout:
    """Where packed rows stand in ``[batch, max_seqlen]``; the indices the stage graphs take."""

    gather_index: Int32
    """``[batch, max_seqlen]``, the row at each place; padding holds row 0 and is masked."""
    lengths: Int32
    """``[batch]``, rows of each sequence."""
    scatter_index: Int32
    """``[n_rows]``, the flat place of each row."""

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return int(self.gather_index.shape[1])


@dataclass(frozen=True, kw_only=True)
class RouteStep:
    """One stage call: which rows go in, and what becomes of the rows that come out."""

    stage: int
    n_active: int
    token_index: Int32
    """``[n_active]``, the token of each row."""
    cu_seqlens: Int32
    """``[batch + 1]`` over the sequences that still have active tokens."""
    keep_index: Int32 | None
    """``[n_active]``, the rows to keep of the previous step's (or the entry's); None: all."""
    queries: PaddedLayout
    """Layout of the active rows."""
    context: PaddedLayout | None
    """With ``context="all"``: layout of all tokens of the sequences in ``cu_seqlens``."""
    remaining_depth: Int32 | None
    """``[n_active]``, layers each row still has to pass; None for stages of one layer."""
    refresh_index: Int32 | None
    """With ``context="all"``, for stages of several layers: ``[n_tokens]``, for each token its row
    in the concatenation of all tokens' states and the active rows."""
    publish_rows: Int32 | None
    """Rows of the result that go to the full buffer: those that finish (``context="active"``) or
    every one, given as None (``context="all"``, and where all rows finish)."""
    publish_tokens: Int32
    """The tokens of those rows."""

    @property
    def max_seqlen(self) -> int:
        """Active rows of the longest sequence."""
        return self.queries.max_seqlen


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """Everything about the routing of one batch, computed once."""

    n_tokens: int
    cu_seqlens: Int32
    """``[batch + 1]`` of the whole batch."""
    depths: Int32
    """``[n_tokens]``"""
    steps: tuple[RouteStep, ...]
    """The stages that have active tokens, in order."""


def depths_from_scores(scores: npt.NDArray[np.float32], thresholds: Sequence[float]) -> Int32:
    """Return how many thresholds each of ``scores [n_tokens]`` exceeds, as ``[n_tokens]`` int32.

    ``thresholds`` must not fall. They are compared in float32, as the graphs do.
    """
    limits = np.asarray(thresholds, dtype=np.float32)
    return np.searchsorted(limits, scores, side="left").astype(np.int32)


def padded_layout(counts: Int32, rows: Int32 | None = None) -> PaddedLayout:
    """Lay out sequences of ``counts [batch]`` rows each.

    Args:
        counts: rows per sequence, all positive.
        rows: ``[sum(counts)]``, the row numbers; None: 0, 1, 2, …
    """
    batch, max_seqlen, total = len(counts), int(counts.max()), int(counts.sum())
    order = np.arange(total, dtype=np.int32)
    values = order if rows is None else rows
    if total == batch * max_seqlen:
        return PaddedLayout(
            gather_index=values.reshape(batch, max_seqlen), lengths=counts, scatter_index=order
        )
    starts = np.cumsum(counts, dtype=np.int32) - counts
    shift = np.arange(batch, dtype=np.int32) * np.int32(max_seqlen) - starts
    scatter_index = order + np.repeat(shift, counts)
    gather_index = np.zeros((batch, max_seqlen), dtype=np.int32)
    gather_index.reshape(-1)[scatter_index] = values
    return PaddedLayout(gather_index=gather_index, lengths=counts, scatter_index=scatter_index)


def plan_route(
    depths: Int32,
    cu_seqlens: Int32,
    stage_layers: Sequence[tuple[int, int]],
    context: Context,
) -> RoutePlan:
    """Plan the compaction and the attention layouts of every stage.

    Args:
        depths: ``[n_tokens]`` int32, layers each token passes through.
        cu_seqlens: ``[batch + 1]`` int32, cumulative sequence lengths.
        stage_layers: first layer and one past the last of every stage.
        context: see :class:`RouteStep`.
    """
    n_tokens = len(depths)
    lengths = np.diff(cu_seqlens)
    sequence_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    everyone = np.arange(n_tokens, dtype=np.int32)

    steps: list[RouteStep] = []
    tokens, tokens_depths = everyone, depths
    previous: RouteStep | None = None
    for stage, (first, stop) in enumerate(stage_layers):
        stays = tokens_depths > first
        n_active = int(np.count_nonzero(stays))
        if n_active == 0:
            break
        keep_index = None
        if n_active < len(tokens):
            keep_index = np.flatnonzero(stays).astype(np.int32)
            tokens, tokens_depths = tokens[keep_index], tokens_depths[keep_index]
        if previous is not None and keep_index is None:
            queries, around = previous.queries, previous.context
            cu = previous.cu_seqlens
        else:
            counts = np.bincount(sequence_of[tokens], minlength=len(lengths)).astype(np.int32)
            alive = counts > 0
            queries = padded_layout(counts[alive])
            cu = np.zeros(len(queries.lengths) + 1, dtype=np.int32)
            np.cumsum(queries.lengths, out=cu[1:])
            around = None
            if context == "all":
                around = _context_layout(previous, lengths, alive, sequence_of, everyone)
        finishes = tokens_depths <= stop
        n_finish = int(np.count_nonzero(finishes))
        if context == "all" or n_finish == n_active:
            publish_rows, publish_tokens = None, tokens
        else:
            publish_rows = np.flatnonzero(finishes).astype(np.int32)
            publish_tokens = tokens[publish_rows]
        grouped = stop - first > 1
        refresh = None
        if grouped and context == "all":
            refresh = everyone.copy()
            refresh[tokens] = n_tokens + np.arange(n_active, dtype=np.int32)
        previous = RouteStep(
            stage=stage,
            n_active=n_active,
            token_index=tokens,
            cu_seqlens=cu,
            keep_index=keep_index,
            queries=queries,
            context=around,
            remaining_depth=tokens_depths - np.int32(first) if grouped else None,
            refresh_index=refresh,
            publish_rows=publish_rows,
            publish_tokens=publish_tokens,
        )
        steps.append(previous)
    return RoutePlan(n_tokens=n_tokens, cu_seqlens=cu_seqlens, depths=depths, steps=tuple(steps))


def _context_layout(
    previous: RouteStep | None,
    lengths: Int32,
    alive: npt.NDArray[np.bool_],
    sequence_of: Int32,
    everyone: Int32,
) -> PaddedLayout:
    """Lay out all tokens of the sequences that are alive; reuse the last layout if it fits."""
    n_alive = int(np.count_nonzero(alive))
    last = None if previous is None else previous.context
    if last is not None and len(last.lengths) == n_alive:
        return last
    if n_alive == len(lengths):
        return padded_layout(lengths)
    return padded_layout(lengths[alive], everyone[alive[sequence_of]])
