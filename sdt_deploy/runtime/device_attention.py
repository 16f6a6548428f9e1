"""Attention of the rows of a stage, wherever they lie, to the keys of their sequences.

Rows are sorted by depth, not by sequence. Engines can only attend within a padded batch, so rows
would have to be spread over it, and collected again. Here they stay where they are: the grid of a
:class:`~sdt_deploy.runtime.device_plan.DevicePlan` says which rows a sequence has.

:class:`TorchAttention` says what is computed, and serves CPUs and tests;
:class:`~sdt_deploy.runtime.triton_attention.TritonAttention` does the same in one kernel.
"""

from __future__ import annotations

from typing import Any, Protocol

from sdt_deploy.extras import require


class DeviceAttention(Protocol):
    """Attention by a grid of rows."""

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
        """Fill the rows of ``out`` that the grid names; others keep what they hold.

        Args:
            query: ``[n_rows, d_model]``.
            key: ``[n_key_rows, d_model]``; its rows may lie apart.
            value: like ``key``.
            out: ``[n_rows, d_model]``.
            query_bias: ``[d_model]``, added to every query.
            n_heads: heads that ``d_model`` is cut into.
            grid: ``[batch, max_seqlen]`` int32, the row in each slot of a sequence.
            query_lengths: ``[batch]`` int64, slots of each sequence that attend; its first ones.
            key_lengths: ``[batch]`` int64, keys of each sequence; at least 1 where a slot attends.
            longest: no query length is larger; known on the host.
            key_places: key ``j`` of sequence ``s`` has row ``s · key_places + j``; None: the row
                that the grid has in slot ``j``.
        """


class TorchAttention:
    """The definition, operator by operator."""

    def __init__(self) -> None:
        self._torch: Any = require("torch", extra="gpu", purpose="Attention on a device")

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
        """See :meth:`DeviceAttention.__call__`."""
        torch = self._torch
        query = (query.float() + query_bias.float()).to(query.dtype)
        slots = torch.arange(longest, device=grid.device)
        attends = slots < query_lengths[:, None]
        rows = torch.where(attends, grid[:, :longest], 0)
        if key_places is None:
            places = torch.arange(grid.shape[1], device=grid.device)
            seen = places < key_lengths[:, None]
            key_rows = torch.where(seen, grid, 0)
        else:
            places = torch.arange(key_places, device=grid.device)
            seen = places < key_lengths[:, None]
            key_rows = torch.arange(len(grid), device=grid.device)[:, None] * key_places + places
        heads = (
            states[index].unflatten(-1, (n_heads, -1)).transpose(1, 2)
            for states, index in ((query, rows), (key, key_rows), (value, key_rows))
        )
        attention = torch.nn.functional.scaled_dot_product_attention
        mixed = attention(*heads, attn_mask=seen[:, None, None]).transpose(1, 2).flatten(2)
        out[rows[attends]] = mixed[attends]
