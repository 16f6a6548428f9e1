"""Where every token goes: pure functions from depths to a route plan.

A *token* is a position in the packed batch; a *row* is a position in the states that the stages
process. Rows are sorted by falling depth (``docs/decisions/006-rows-by-depth.md``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
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
    """``[batch, n_heads, max_seqlen]``, the slice at each place; padding holds one that exists."""
    scatter_index: Int32 | None
    """``[n_rows, n_heads]``, the flat place of each slice; None where only keys are laid out."""
    key_bias: Float32 | None
    """``[batch, n_heads, max_seqlen, 1]``: 0 at the rows' places, :data:`HIDDEN` at padding; None
    where only queries are laid out."""

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
    query_places: Int32 | None
    """``[batch, max_seqlen]``, where queries stand among all tokens of their sequence; for causal
    attention with ``context="all"``."""
    refresh_index: Int32 | None
    """With ``context="all"``, for stages of several layers: ``[n_tokens]``, for each row its place
    in the concatenation of all rows and the active ones."""
    position_ids: Int32 | None = None
    """``[n_tokens]``, place of each row's token in its sequence, of all rows; for rotary
    positions."""


@dataclass(frozen=True, kw_only=True)
class RoutePlan:
    """Everything about the routing of one batch, computed once.

    Rows are sorted by falling depth, tokens of equal depth in their order. So the active rows of
    every stage are the first ``n_active``: tokens that finish are dropped from the end, and nothing
    is gathered between stages.
    """

    depths: Int32
    """``[n_tokens]``, by token."""
    active_tokens: Sequence[int]
    """Active tokens of every layer."""
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
    causal: bool = False
    rotary: bool = False

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
            causal=model.causal,
            rotary=model.rotary is not None,
        )


def depths_from_scores(scores: npt.NDArray[np.float32], thresholds: Sequence[float]) -> Int32:
    """Return how many thresholds each of ``scores [n_tokens]`` exceeds, as ``[n_tokens]`` int32.

    ``thresholds`` must not fall. They are compared in float32, as the graphs do.
    """
    limits = float32_thresholds(tuple(thresholds))
    return limits.searchsorted(scores, side="left").astype(np.int32)


@lru_cache
def float32_thresholds(thresholds: tuple[float, ...]) -> Float32:
    """Return ``thresholds`` as ``[n_layers]`` float32, read-only: kept for later runs."""
    limits = np.array(thresholds, dtype=np.float32)
    limits.flags.writeable = False
    return limits


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


def padded_rows(rows: Int32, lengths: Int32) -> Int32:
    """Lay ``rows [sum(lengths)]`` out as ``[batch, max_seqlen]``; padding holds row 0."""
    longest = int(lengths.max())
    if len(rows) == len(lengths) * longest:
        return rows.reshape(len(lengths), longest)
    padded = np.zeros((len(lengths), longest), dtype=np.int32)
    padded[np.arange(longest) < lengths[:, None]] = rows
    return padded


def head_layouts(
    members: npt.NDArray[np.bool_],
    order: Int32,
    row_of: Int32,
    cu_seqlens: Int32,
    n_heads: int,
    *,
    n_queries: int,
    with_bias: bool,
) -> list[HeadLayout]:
    """Lay out several sets of tokens; sequences of which a set has none are left out of it.

    All are made at once, as parts of one block of memory: each call of NumPy costs some
    microseconds, and each large array faults in pages of its own.

    Args:
        members: ``[n_sets, n_tokens]``; every set has a member.
        order: ``[n_tokens]``, the token of each row.
        row_of: ``[n_tokens]``, the row of each token.
        cu_seqlens: ``[batch + 1]``.
        n_heads: heads that a row is cut into.
        n_queries: sets that need ``scatter_index``, the first ones; the rows of such a set are
            the first ones too.
        with_bias: whether these are keys as well. The other sets are.
    """
    seen = np.add.accumulate(members, 1, np.int32)  # members up to each token
    ends = seen.take(cu_seqlens[1:] - 1, axis=1)
    before = np.zeros(ends.shape, dtype=np.int32)
    before[:, 1:] = ends[:, :-1]
    counts = ends - before
    longest = np.maximum.reduce(counts, 1, keepdims=True)
    alive = counts > 0
    number = np.add.accumulate(alive, 1, np.int32)
    n_rows, widths = ends[:, -1].tolist(), longest[:, 0].tolist()
    shapes = [(n, n_heads, width) for n, width in zip(number[:, -1].tolist(), widths, strict=True)]
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0, *accumulate(sizes)]
    n_bias = sum(sizes if with_bias else sizes[n_queries:])
    block = np.empty(starts[-1] + n_bias + n_heads * sum(n_rows[:n_queries]), dtype=np.int32)
    block[: starts[-1] + n_bias] = 0

    # Where a member's first slice stands in [batch, n_heads, max_seqlen], then in the block.
    per_sequence = n_heads * longest
    first = (number - 1) * per_sequence - before - 1
    places = seen + first.repeat(cu_seqlens[1:] - cu_seqlens[:-1], axis=1)
    by_row = places[:n_queries].take(order, axis=1)
    places += np.array(starts[:-1], dtype=np.int32)[:, None]
    slices = np.empty_like(places)
    slices[:] = row_of * np.int32(n_heads)
    block[places[members].astype(np.intp)] = slices[members]  # NumPy casts others piece by piece
    heads = np.arange(n_heads, dtype=np.int32)
    strides = longest * heads

    layouts: list[HeadLayout] = []
    bias = block[starts[-1] : starts[-1] + n_bias].view(np.float32)
    scatters = block[starts[-1] + n_bias :]
    for i, (shape, size, n) in enumerate(zip(shapes, sizes, n_rows, strict=True)):
        gather_index = block[starts[i] : starts[i] + size].reshape(shape)
        np.add(gather_index[:, :1], heads[1:, None], gather_index[:, 1:])
        lengths = counts[i] if shape[0] == len(counts[i]) else counts[i, alive[i]]
        scatter_index = key_bias = None
        if i < n_queries:
            scatter_index, scatters = scatters[: n * n_heads], scatters[n * n_heads :]
            scatter_index = scatter_index.reshape(n, n_heads)
            np.add(by_row[i, :n, None], strides[i], scatter_index)
        if with_bias or i >= n_queries:
            key_bias, bias = bias[:size].reshape(*shape, 1), bias[size:]
            if n_heads * n < size:
                padding = np.arange(shape[2]) >= lengths[:, None]
                np.copyto(key_bias[..., 0], HIDDEN, where=padding[:, None])
        layouts.append(
            HeadLayout(
                lengths=lengths,
                gather_index=gather_index,
                scatter_index=scatter_index,
                key_bias=key_bias,
            )
        )
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
    n_layers = stage_layers[-1][1]
    histogram = np.bincount(depths, minlength=n_layers + 1).tolist()
    active_tokens = [*accumulate(reversed(histogram[1:]))][::-1]
    n_active = [n for first, _ in stage_layers if (n := active_tokens[first])]
    sorting = (-depths).astype(np.int16).argsort(kind="stable")
    rows = np.arange(n_tokens, dtype=np.int32)
    row_of = np.empty_like(rows)
    row_of[sorting] = rows
    order = sorting.astype(np.int32)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    # Sets are nested: stages with as many active tokens have the same ones, and share a layout.
    new = [i for i, n in enumerate(n_active) if i == 0 or n != n_active[i - 1]]
    queries: list[HeadLayout] = []
    around: list[HeadLayout] = []
    if new:
        firsts = [stage_layers[i][0] for i in new]
        if context == "all":
            firsts.append(-1)  # every token: what all stages see where each sequence stays active
        members = depths > np.array(firsts, dtype=np.int32)[:, None]
        if context == "all":
            deepest = np.maximum.reduceat(depths, cu_seqlens[:-1])  # of each sequence
            if deepest.min() <= firsts[-2]:
                alive = (deepest > np.array(firsts[:-1])[:, None]).repeat(lengths, axis=1)
                members = np.concatenate([members[:-1], alive])
        layouts = head_layouts(
            members,
            order,
            row_of,
            cu_seqlens,
            n_heads,
            n_queries=len(new),
            with_bias=context == "active",
        )
        queries, around = layouts[: len(new)], layouts[len(new) :]
        if around:
            around *= len(new) // len(around)

    position_of = None  # of each row
    if rules.causal:
        position_of = (rows - np.repeat(cu_seqlens[:-1], lengths))[order]
    steps: list[RouteStep] = []
    number = -1
    for stage, n_rows in enumerate(n_active):
        number += stage in new
        layout, seen = queries[number], around[number] if around else None
        bias = (seen or layout).key_bias
        assert bias is not None
        remaining = refresh = places = None
        if position_of is not None and seen is not None:
            places = position_of[layout.gather_index[:, 0] // np.int32(n_heads)]
        first, stop = stage_layers[stage]
        if stop - first > 1:
            remaining = depths[order[:n_rows]] - np.int32(first)
            if seen is not None:
                refresh = rows.copy()
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
                query_places=places,
                position_ids=position_of if rules.rotary else None,
                refresh_index=refresh,
            )
        )
    head: dict[str, Int32] = {}
    if rules.pooling == "cls":
        head["first_index"] = row_of[cu_seqlens[:-1]]
    elif rules.pooling == "mean":
        head = {"gather_index": padded_rows(row_of, lengths), "lengths": lengths}
    is_sorted = bool((order == rows).all())
    return RoutePlan(
        depths=depths,
        active_tokens=active_tokens,
        order=None if is_sorted else order,
        row_of=row_of,
        steps=tuple(steps),
        head=head,
    )
