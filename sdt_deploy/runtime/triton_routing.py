"""Routing on an NVIDIA GPU in Triton: two kernels for a batch, two for a stage.

What they compute is said, and tested against, by
:class:`~sdt_deploy.runtime.device_plan.TorchRouting`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the kernels' source: their parameters are pointers, sizes and compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sdt_deploy.runtime.device_plan import NO_ROW, DevicePlan
from sdt_deploy.runtime.ladders import Bucket

_NO_ROW = tl.constexpr(NO_ROW)


@triton.jit  # type: ignore[untyped-decorator]
def _count(
    scores, lengths, thresholds, depths, active_lengths, counts,
    stride, longest, n_layers: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Depths of one sequence, and how many of its tokens are active in every layer."""
    sequence = tl.program_id(0)
    position = tl.arange(0, block)
    is_token = position < tl.load(lengths + sequence)
    score = tl.load(scores + sequence * longest + position, mask=is_token, other=-1.0)
    depth = tl.zeros([block], dtype=tl.int32)
    for layer in tl.static_range(n_layers):
        active = is_token & (score > tl.load(thresholds + layer))
        depth += active.to(tl.int32)
        n_active = tl.sum(active.to(tl.int32), axis=0)
        tl.store(active_lengths + layer * stride + sequence, n_active.to(tl.int64))
        tl.atomic_add(counts + layer, n_active)
        tl.atomic_max(counts + n_layers + layer, n_active)
    tl.store(depths + sequence * longest + position, depth, mask=position < longest)


@triton.jit  # type: ignore[untyped-decorator]
def _place(
    depths, lengths, active_lengths, counts, place, slot, row_depth, grid,
    stride, longest, n_layers: tl.constexpr, block: tl.constexpr, block_batch: tl.constexpr,
):  # fmt: skip
    """Rows and slots of one sequence: a stable counting sort by falling depth."""
    sequence = tl.program_id(0)
    position = tl.arange(0, block)
    length = tl.load(lengths + sequence).to(tl.int32)
    is_token = position < length
    depth = tl.load(depths + sequence * longest + position, mask=is_token, other=-1)
    others = tl.arange(0, block_batch)
    row = tl.zeros([block], dtype=tl.int32)
    own = tl.zeros([block], dtype=tl.int32)
    earlier = others < sequence
    for value in tl.static_range(n_layers + 1):
        # Tokens deeper than value: all of them, those of earlier sequences, this one's.
        if value < n_layers:
            deeper = tl.load(counts + value)
            before = tl.load(active_lengths + value * stride + others, mask=earlier, other=0)
            here = tl.load(active_lengths + value * stride + sequence).to(tl.int32)
        else:
            deeper = 0
            before = tl.zeros([block_batch], dtype=tl.int64)
            here = 0
        if value > 0:
            reach = tl.load(active_lengths + (value - 1) * stride + others, mask=earlier, other=0)
        else:
            reach = tl.load(lengths + others, mask=earlier, other=0)
        same = depth == value
        rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
        first = deeper + tl.sum((reach - before).to(tl.int32), axis=0)
        row = tl.where(same, first + rank, row)
        own = tl.where(same, here + rank, own)
    tl.store(place + row, sequence * longest + position, mask=is_token)
    tl.store(slot + row, own, mask=is_token)
    tl.store(row_depth + row, depth, mask=is_token)
    is_empty = (position >= length) & (position < longest)
    tl.store(grid + sequence * longest + own, row, mask=is_token)
    tl.store(grid + sequence * longest + position, _NO_ROW, mask=is_empty)


@triton.jit  # type: ignore[untyped-decorator]
def _stage_indices(
    counts, grid, place, slot, gather_index, scatter_index,
    layer, longest, n_places, n_rows, max_seqlen, block: tl.constexpr,
):  # fmt: skip
    n_active = tl.load(counts + layer)
    i = tl.program_id(0) * block + tl.arange(0, block)
    is_place = i < n_places
    row = tl.load(grid + i // max_seqlen * longest + i % max_seqlen, mask=is_place, other=0)
    tl.store(gather_index + i, tl.where(row < n_active, row, 0), mask=is_place)
    is_active = i < n_active
    sequence = tl.load(place + i, mask=i < n_rows, other=0) // longest
    flat = sequence * max_seqlen + tl.load(slot + i, mask=i < n_rows, other=0)
    tl.store(scatter_index + i, tl.where(is_active, flat, 0), mask=i < n_rows)


@triton.jit  # type: ignore[untyped-decorator]
def _take_rows(
    place, states, rows, n_rows, width, n_states, block: tl.constexpr, block_width: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    column = tl.arange(0, block_width)
    source = tl.load(place + row, mask=row < n_rows, other=0).to(tl.int64)
    inside = (row < n_rows)[:, None] & (column < width)[None, :]
    value = tl.load(states + source[:, None] * width + column[None, :], mask=inside)
    tl.store(rows + row[:, None].to(tl.int64) * width + column[None, :], value, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _put_rows(
    counts, place, row_depth, rows, states, layer, n_rows, width, finished,
    block: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    n_active = tl.load(counts + layer)
    row = tl.program_id(0) * block + tl.arange(0, block)
    wanted = (row < n_active) & (row < n_rows)
    depth = tl.load(row_depth + row, mask=wanted, other=0)
    wanted = wanted & ((finished == 0) | (depth == layer + 1))
    target = tl.load(place + row, mask=wanted, other=0).to(tl.int64)
    column = tl.arange(0, block_width)
    inside = wanted[:, None] & (column < width)[None, :]
    value = tl.load(rows + row[:, None].to(tl.int64) * width + column[None, :], mask=inside)
    tl.store(states + target[:, None] * width + column[None, :], value, mask=inside)


class TritonRouting:
    """See :class:`~sdt_deploy.runtime.device_plan.DeviceRouting`."""

    def plan(self, scores: Any, lengths: Any, thresholds: Any, out: DevicePlan) -> None:
        """See :meth:`~sdt_deploy.runtime.device_plan.DeviceRouting.plan`."""
        batch, longest = out.grid.shape
        stride = out.active_lengths.stride(0)
        n_layers, block = len(thresholds), triton.next_power_of_2(longest)
        warps = _warps(block)
        out.counts.zero_()
        _count[(batch,)](
            scores, lengths, thresholds, out.depths, out.active_lengths, out.counts,
            stride, longest, n_layers, block, num_warps=warps,
        )  # fmt: skip
        _place[(batch,)](
            out.depths, lengths, out.active_lengths, out.counts, out.place, out.slot,
            out.row_depth, out.grid, stride, longest, n_layers, block,
            triton.next_power_of_2(batch), num_warps=warps,
        )  # fmt: skip

    def stage_indices(self, plan: DevicePlan, layer: int, bucket: Bucket) -> tuple[Any, Any]:
        """See :meth:`~sdt_deploy.runtime.device_plan.DeviceRouting.stage_indices`."""
        shape = bucket.batch, bucket.max_seqlen
        gather = torch.empty(shape, dtype=torch.int32, device=plan.grid.device)
        scatter = torch.empty(bucket.n_tokens, dtype=torch.int32, device=plan.grid.device)
        n_places, block = bucket.batch * bucket.max_seqlen, 256
        _stage_indices[(triton.cdiv(max(n_places, bucket.n_tokens), block),)](
            plan.counts, plan.grid, plan.place, plan.slot, gather, scatter,
            layer, plan.grid.shape[1], n_places, bucket.n_tokens, bucket.max_seqlen, block,
        )  # fmt: skip
        return gather, scatter

    def take_rows(self, plan: DevicePlan, states: Any, out: Any) -> None:
        """See :meth:`~sdt_deploy.runtime.device_plan.DeviceRouting.take_rows`."""
        n_rows, width = out.shape
        block, block_width = tile(width)
        _take_rows[(triton.cdiv(n_rows, block),)](
            plan.place, states, out, n_rows, width, len(states), block, block_width
        )

    def put_rows(
        self, plan: DevicePlan, rows: Any, layer: int, states: Any, *, finished: bool
    ) -> None:
        """See :meth:`~sdt_deploy.runtime.device_plan.DeviceRouting.put_rows`."""
        n_rows, width = rows.shape
        block, block_width = tile(width)
        _put_rows[(triton.cdiv(n_rows, block),)](
            plan.counts, plan.place, plan.row_depth, rows, states, layer, n_rows, width,
            int(finished), block, block_width,
        )  # fmt: skip


def _warps(block: int) -> int:
    return min(16, max(1, block // 64))


def tile(width: int) -> tuple[int, int]:
    """Return rows and columns of a tile of about 4,096 values."""
    block_width = triton.next_power_of_2(width)
    return max(1, 4096 // block_width), block_width
