"""Attention by a grid of rows on an NVIDIA GPU: one Triton kernel, without padding or copies.

What it computes is said, and tested against, by
:class:`~sdt_deploy.runtime.device_attention.TorchAttention`. Softmax is taken block by block with
a running maximum, as in FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the kernel's source: its parameters are pointers, sizes and compile-time constants.

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from sdt_deploy.runtime.ladders import QUERY_TILE

BLOCK_KEYS = 64
WARPS, STAGES = 4, 3


@triton.jit  # type: ignore[untyped-decorator]
def _attend(
    query, key, value, out, query_bias, grid, query_lengths, key_lengths,
    scale, longest, key_places, query_stride, key_stride, out_stride,
    by_grid: tl.constexpr, head_dim: tl.constexpr, block_dim: tl.constexpr,
    block_queries: tl.constexpr, block_keys: tl.constexpr,
):  # fmt: skip
    """One head of one tile of queries of one sequence."""
    sequence = tl.program_id(2)
    n_queries = tl.load(query_lengths + sequence).to(tl.int32)
    first = tl.program_id(0) * block_queries
    if first >= n_queries:
        return
    n_keys = tl.load(key_lengths + sequence).to(tl.int32)
    grid += sequence * longest
    column = tl.arange(0, block_dim)
    is_column = column < head_dim
    column += tl.program_id(1) * head_dim
    slot = first + tl.arange(0, block_queries)
    is_query = slot < n_queries
    row = tl.load(grid + slot, mask=is_query, other=0).to(tl.int64)
    inside = is_query[:, None] & is_column[None, :]
    q = tl.load(query + row[:, None] * query_stride + column[None, :], mask=inside, other=0.0)
    bias = tl.load(query_bias + column, mask=is_column, other=0.0)
    q = (q.to(tl.float32) + bias.to(tl.float32)[None, :]).to(q.dtype)
    highest = tl.full([block_queries], -1e30, dtype=tl.float32)
    total = tl.zeros([block_queries], dtype=tl.float32)
    mixed = tl.zeros([block_queries, block_dim], dtype=tl.float32)
    for start in tl.range(0, n_keys, block_keys):
        place = start + tl.arange(0, block_keys)
        is_key = place < n_keys
        if by_grid:
            key_row = tl.load(grid + place, mask=is_key, other=0).to(tl.int64)
        else:
            key_row = (sequence * key_places + place).to(tl.int64)
        seen = is_key[:, None] & is_column[None, :]
        offset = key_row[:, None] * key_stride + column[None, :]
        k = tl.load(key + offset, mask=seen, other=0.0)
        v = tl.load(value + offset, mask=seen, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        logits = tl.where(is_key[None, :], logits, -float("inf"))
        top = tl.maximum(highest, tl.max(logits, axis=1))
        weight = tl.exp2(logits - top[:, None])
        shrink = tl.exp2(highest - top)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weight.to(v.dtype), v, mixed, input_precision="ieee")
        highest = top
    mixed = mixed / total[:, None]
    target = out + row[:, None] * out_stride + column[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)


class TritonAttention:
    """See :class:`~sdt_deploy.runtime.device_attention.DeviceAttention`."""

    def __call__(
        self,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        *,
        query_bias: Any,
        n_heads: int,
        grid: Any,
        query_lengths: Any,
        key_lengths: Any,
        longest: int,
        key_places: int | None,
    ) -> None:
        """See :meth:`~sdt_deploy.runtime.device_attention.DeviceAttention.__call__`."""
        head_dim = query.shape[1] // n_heads
        scale = math.log2(math.e) / math.sqrt(head_dim)  # for exp2
        assert key.stride() == value.stride()
        _attend[(triton.cdiv(longest, QUERY_TILE), n_heads, len(grid))](
            query, key, value, out, query_bias, grid, query_lengths, key_lengths,
            scale, grid.shape[1], key_places or 0,
            query.stride(0), key.stride(0), out.stride(0),
            by_grid=key_places is None, head_dim=head_dim,
            block_dim=max(16, triton.next_power_of_2(head_dim)),
            block_queries=QUERY_TILE, block_keys=BLOCK_KEYS,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
