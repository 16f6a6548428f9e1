"""Where every token goes: pure functions from depths to a route plan.

A *token* is a position in the packed batch; a *row* is a position in the states that the stages
process. Rows are sorted by falling depth (``docs/decisions/006-rows-by-depth.md``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import Manifest
from sdt_deploy.config import Context, Leaving, Pooling, Selection

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

HIDDEN = np.float32(np.finfo(np.float32).min / 2)
"""Bias of a key that is not seen: so small that its weight is 0, without reaching an infinity."""


@dataclass(frozen=True, kw_only=True)
class PaddedLayout:
    """Where packed rows stand in ``[batch, max_seqlen]``."""

    gather_index: Int32
    """``[batch, max_seqlen]``, the row at each place; padding holds an existing row."""
    lengths: Int32
    """``[batch]``, rows of each sequence."""
    scatter_index: Int32 | None
    """``[n_rows]``, the flat place of each row; None where only keys are laid out."""


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Where packed rows, cut into heads, stand in ``[batch, n_heads, max_seqlen]``.

    Slice ``row · n_heads + head`` is the part of a row that belongs to one head.
    """

    lengths: Int32
    """``[batch]``, rows of each sequence."""
    gather_index: Int32
    """``[batch, n_heads, max_seqlen]``, the slice at each place; padding holds slice 0."""
    scatter_index: Int32 | None
    """``[n_rows, n_heads]``, the flat place of each slice; None where only keys are laid out."""
    key_bias: Float32
    """``[batch, n_heads, max_seqlen, 1]``: 0 at the rows' places, :data:`HIDDEN` at padding."""

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return int(self.gather_index.shape[2])

    @cached_property
    def padded(self) -> PaddedLayout:
        """The same without heads, as bundles of format version 1 take it."""
        n_heads, max_seqlen = self.gather_index.shape[1:]
        scatter_index = None
        if self.scatter_index is not None:
            sequence, place = np.divmod(self.scatter_index[:, 0], n_heads * max_seqlen)
            scatter_index = sequence * np.int32(max_seqlen) + place
        return PaddedLayout(
            gather_index=np.ascontiguousarray(self.gather_index[:, 0] // n_heads),
            lengths=self.lengths,
            scatter_index=scatter_index,
        )


@dataclass(frozen=True, kw_only=True)
class RouteStep:
    """One stage call on the rows ``0 .. n_active``."""

    stage: int
    n_active: int
    queries: HeadLayout
    """Layout of the active rows; their order inside a sequence is that of its tokens."""
    context: HeadLayout | None
    """With ``context="all"``: layout of all rows of the sequences with active tokens."""
    key_bias: Float32
    """``[batch, n_heads, max_seqlen, 1]`` over the keys that the stage sees. For stages of several
    layers with ``context="active"``, one for each layer: ``[n_layers, batch, …]``."""
    remaining_depth: Int32 | None
    """``[n_active]``, layers each row still has to pass; None for stages of one layer."""
    refresh_index: Int32 | None
    """With ``context="all"``, for stages of several layers: ``[n_tokens]``, for each row its place
    in the concatenation of all rows and the active ones."""


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """Everything about the routing of one batch, computed once.

    Rows are sorted by falling depth, tokens of equal depth in their order. So the active rows of
    every stage are the first ``n_active``: tokens that finish are dropped from the end, and nothing
    is gathered between stages.
    """

    depths: Int32
    """``[n_tokens]``, by token."""
    order: Int32 | None
    """``[n_tokens]``, the token of each row; None: rows are tokens."""
    row_of: Int32
    """``[n_tokens]``, the row of each token."""
    steps: tuple[RouteStep, ...]
    """The stages that have active tokens, in order."""
    head: Mapping[str, Any]
    """What the head takes besides the states: ``first_index [batch]``, the rows of the first
    tokens, or ``gather_index [batch, max_seqlen]`` and ``lengths [batch]``, the rows of all."""


@dataclass(frozen=True, kw_only=True)
class RouteRules:
    """What of a bundle the routing depends on."""

    stage_layers: tuple[tuple[int, int], ...]
    """First layer and one past the last of every stage."""
    context: Context
    n_heads: int
    pooling: Pooling | None
    """How the head makes one row of a sequence; None: it does not."""
    selection: Selection = "threshold"
    leaving: Leaving = "exit"

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return the rules of a bundle."""
        model = manifest.model
        return cls(
            stage_layers=manifest.stage_layers,
            context=model.context,
            n_heads=model.n_heads,
            pooling=model.head.pooling,
            selection=model.selection,
            leaving=model.leaving,
        )


def depths_from_scores(scores: npt.NDArray[np.float32], thresholds: Sequence[float]) -> Int32:
    """Return how many thresholds each of ``scores [n_tokens]`` exceeds, as ``[n_tokens]`` int32.

    ``thresholds`` must not fall. They are compared in float32, as the graphs do.
    """
    limits = np.asarray(thresholds, dtype=np.float32)
    return np.searchsorted(limits, scores, side="left").astype(np.int32)


def standings(scores: Float32, cu_seqlens: Int32) -> Float32:
    """Return where each token stands among those of its sequence, ``[n_tokens]`` float32.

    The token of rank ``r`` (from 0, by falling score, ties by position) among ``n`` stands at
    ``1 - (r + 1/2) / n``, the first at 1; see the oracle, ``sdt_deploy.model.blocks.standings``.

    Args:
        scores: ``[n_tokens]``.
        cu_seqlens: ``[batch + 1]``.
    """
    lengths = np.diff(cu_seqlens)
    n_tokens = np.repeat(lengths, lengths).astype(np.float32)
    order = np.lexsort((-scores, np.repeat(np.arange(len(lengths)), lengths)))
    rank = np.empty_like(n_tokens)
    rank[order] = np.arange(len(scores)) - np.repeat(cu_seqlens[:-1], lengths)
    standing = np.float32(1) - (rank + np.float32(0.5)) / n_tokens
    standing[rank == 0] = 1.0
    return standing


def depths_of(
    scores: Float32, thresholds: Sequence[float], cu_seqlens: Int32, selection: Selection
) -> Int32:
    """Return ``[n_tokens]`` int32, the layers that each token passes through.

    Args:
        scores: ``[n_tokens]`` float32.
        thresholds: one per layer, nondecreasing.
        cu_seqlens: ``[batch + 1]``.
        selection: what is compared with the thresholds.
    """
    compared = standings(scores, cu_seqlens) if selection == "capacity" else scores
    return depths_from_scores(compared, thresholds)


def capacity_counts(lengths: Sequence[int], thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """Return ``[n_layers, batch]``, the tokens that each layer takes by selection ``capacity``.

    They depend on the lengths alone: no score is needed.
    """
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    anyone = np.zeros(cu_seqlens[-1], dtype=np.float32)
    depths = depths_of(anyone, thresholds, cu_seqlens, "capacity")
    layers = np.arange(len(thresholds))[:, None]
    return np.add.reduceat(depths > layers, cu_seqlens[:-1], axis=1, dtype=np.int64)


def padded_layout(counts: Int32, rows: Int32 | None = None) -> PaddedLayout:
    """Lay out sequences of ``counts [batch]`` rows each, all positive.

    Args:
        counts: rows per sequence.
        rows: ``[sum(counts)]``, the row numbers; None: 0, 1, 2, …
    """
    batch, max_seqlen, total = len(counts), int(counts.max()), int(counts.sum())
    order = np.arange(total, dtype=np.int32)
    values = order if rows is None else rows
    if total == batch * max_seqlen:
        gather_index = values.reshape(batch, max_seqlen)
        return PaddedLayout(gather_index=gather_index, lengths=counts, scatter_index=order)
    starts = np.cumsum(counts, dtype=np.int32) - counts
    shift = np.arange(batch, dtype=np.int32) * np.int32(max_seqlen) - starts
    scatter_index = order + np.repeat(shift, counts)
    gather_index = np.zeros((batch, max_seqlen), dtype=np.int32)
    gather_index.reshape(-1)[scatter_index] = values
    return PaddedLayout(gather_index=gather_index, lengths=counts, scatter_index=scatter_index)


def head_layouts(
    counts: npt.NDArray[np.int64], rows: Int32, n_heads: int, n_queries: int
) -> list[HeadLayout]:
    """Lay out several sets of rows at once, which costs less than one after the other.

    Args:
        counts: ``[n_sets, batch]``, rows of each sequence; sequences without rows are left out.
            Every set needs a row.
        rows: ``[sum(counts)]``, the row at each place, set by set and sequence by sequence.
        n_heads: heads that a row is cut into.
        n_queries: sets that need ``scatter_index``, the first ones. If such a set has n rows they
            are 0 … n - 1 in any order.
    """
    alive = counts > 0
    n_alive, longest, totals = alive.sum(axis=1), counts.max(axis=1), counts.sum(axis=1)
    set_of, _ = np.nonzero(alive)
    lengths = counts[alive].astype(np.int32)
    number = np.arange(len(lengths)) - (np.cumsum(n_alive) - n_alive)[set_of]
    # First row and first place of each sequence; places count [batch, max_seqlen] set by set.
    sizes = n_alive * longest
    set_starts = np.cumsum(sizes) - sizes
    first_row = np.cumsum(lengths) - lengths
    first_place = set_starts[set_of] + number * longest[set_of]
    order = np.arange(len(rows))
    places = order + np.repeat(first_place - first_row, lengths)
    slices = np.zeros(int(sizes.sum()), dtype=np.int32)
    slices[places] = rows * np.int32(n_heads)
    bias = np.full(len(slices), HIDDEN)
    bias[places] = 0.0
    # The same for the slices of the rows: [batch, n_heads, max_seqlen], each set from 0.
    heads = np.arange(n_heads, dtype=np.int32)
    n_rows = int(totals[:n_queries].sum())
    by_row = np.empty(n_rows, dtype=np.int64)
    by_row[(rows + np.repeat(np.cumsum(totals) - totals, totals))[:n_rows]] = order[:n_rows]
    first_slice = number * n_heads * longest[set_of] - first_row
    slice_of = (order + np.repeat(first_slice, lengths)).astype(np.int32)[by_row]
    stride = np.repeat(longest.astype(np.int32), totals)[:n_rows]
    scatter = slice_of[:, None] + stride[:, None] * heads

    layouts: list[HeadLayout] = []
    row = sequence = place = 0
    for size, total, batch, max_seqlen in zip(
        sizes.tolist(), totals.tolist(), n_alive.tolist(), longest.tolist(), strict=True
    ):
        spread = slices[place : place + size].reshape(batch, 1, max_seqlen)
        hidden = bias[place : place + size].reshape(batch, 1, max_seqlen, 1)
        layouts.append(
            HeadLayout(
                lengths=lengths[sequence : sequence + batch],
                gather_index=spread + heads[:, None],
                scatter_index=scatter[row : row + total] if len(layouts) < n_queries else None,
                key_bias=hidden.repeat(n_heads, axis=1),
            )
        )
        row, sequence, place = row + total, sequence + batch, place + size
    return layouts


def plan_route(
    depths: Int32, cu_seqlens: Int32, rules: RouteRules, *, first_stage: int = 0
) -> RoutePlan:
    """Plan the compaction and the attention layouts of every stage.

    Args:
        depths: ``[n_tokens]`` int32, layers each token passes through.
        cu_seqlens: ``[batch + 1]`` int32, cumulative sequence lengths.
        rules: of the bundle.
        first_stage: number of the first stage in ``rules``.
    """
    stage_layers, context, n_heads = rules.stage_layers, rules.context, rules.n_heads
    n_tokens = len(depths)
    firsts = np.array([first for first, _ in stage_layers])
    active = depths > firsts[:, None]
    n_active = [n for n in active.sum(axis=1).tolist() if n]
    order = np.argsort(-depths, kind="stable").astype(np.int32)
    row_of = np.empty_like(order)
    row_of[order] = np.arange(n_tokens, dtype=np.int32)
    # Sets are nested: stages with as many active tokens have the same ones, and share a layout.
    new = [i for i, n in enumerate(n_active) if i == 0 or n != n_active[i - 1]]
    queries: list[HeadLayout] = []
    around: list[HeadLayout] = []
    if new:
        active = active[new]
        counts = np.add.reduceat(active, cu_seqlens[:-1], axis=1, dtype=np.int64)
        rows = row_of[np.nonzero(active)[1]]
        if context == "all":
            lengths = cu_seqlens[1:] - cu_seqlens[:-1]
            alive = counts > 0
            if alive.all():  # then all stages see the same rows
                alive = alive[:1]
            counts = np.concatenate([counts, np.where(alive, lengths, 0)])
            rows = np.concatenate([rows, *(row_of[np.repeat(one, lengths)] for one in alive)])
            layouts = head_layouts(counts, rows, n_heads, len(new))
            queries, around = layouts[: len(new)], layouts[len(new) :]
            around *= len(new) // len(around)
        else:
            queries = head_layouts(counts, rows, n_heads, len(new))

    steps: list[RouteStep] = []
    number = -1
    for stage, n_rows in enumerate(n_active):
        number += stage in new
        layout, seen = queries[number], around[number] if around else None
        bias = layout.key_bias if seen is None else seen.key_bias
        remaining = refresh = None
        first, stop = stage_layers[stage]
        if stop - first > 1:
            remaining = depths[order[:n_rows]] - np.int32(first)
            if seen is not None:
                refresh = np.arange(n_tokens, dtype=np.int32)
                refresh[:n_rows] += n_tokens
            else:
                bias = np.repeat(bias[None], stop - first, axis=0)
                assert layout.scatter_index is not None
                for i, layer_bias in enumerate(bias):
                    layer_bias.reshape(-1)[layout.scatter_index[remaining <= i]] = HIDDEN
        steps.append(
            RouteStep(
                stage=first_stage + stage,
                n_active=n_rows,
                queries=layout,
                context=seen,
                key_bias=bias,
                remaining_depth=remaining,
                refresh_index=refresh,
            )
        )
    head: dict[str, Int32] = {}
    if rules.pooling == "cls":
        head["first_index"] = row_of[cu_seqlens[:-1]]
    elif rules.pooling == "mean":
        whole = padded_layout(cu_seqlens[1:] - cu_seqlens[:-1], row_of)
        head = {"gather_index": whole.gather_index, "lengths": whole.lengths}
    is_sorted = n_tokens == 1 or bool((depths[1:] <= depths[:-1]).all())
    return RoutePlan(
        depths=depths,
        order=None if is_sorted else order,
        row_of=row_of,
        steps=tuple(steps),
        head=head,
    )
