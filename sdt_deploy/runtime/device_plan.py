"""Routing where the scores are, in torch: places and rows of a padded batch on a device.

A *place* is a position of the padded batch, ``sequence · max_seqlen + position``. A *row* is one in
the states that stages process: rows are sorted by falling depth, so the active ones of every stage
come first. A *slot* is the number of a row among the rows of its sequence: active rows have the
first slots, in every layer.

:class:`TorchRouting` says what is computed, and serves CPUs and tests;
:class:`~sdt_deploy.runtime.triton_routing.TritonRouting` does the same in few kernels, and waits
for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from sdt_deploy.extras import require
from sdt_deploy.runtime.ladders import Bucket

ALIGNMENT = 256
"""Bytes; TensorRT wants addresses to be multiples of it."""
NO_ROW = 2**30
"""In a grid, a slot that no token has."""


def aligned(n_bytes: Sequence[int]) -> tuple[list[int], int]:
    """Return where arrays of these sizes begin in one block, and how large that is."""
    sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in n_bytes]
    *starts, total = accumulate(sizes, initial=0)
    return starts, total


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Where every token of a batch goes; tensors of one bucket, filled anew for each batch."""

    depths: Any
    """``[n_places]`` int32, layers each token passes through; 0 at padding."""
    place: Any
    """``[n_places]`` int32, the place of each row; rows past the tokens hold an existing place."""
    slot: Any
    """``[n_places]`` int32, of each row; past the tokens it means nothing."""
    row_depth: Any
    """``[n_places]`` int32, of each row."""
    grid: Any
    """``[batch, max_seqlen]`` int32, the row in each slot, or :data:`NO_ROW`."""
    active_lengths: Any
    """``[n_layers, batch]`` int64, active tokens of each layer and sequence. Engines read single
    rows, which therefore begin at multiples of :data:`ALIGNMENT` bytes."""
    counts: Any
    """``[2, n_layers]`` int32: active tokens of each layer, and those of the sequence that has
    most; the only thing that the host reads."""

    @classmethod
    def empty(
        cls, torch: Any, device: Any, bucket: Bucket, n_layers: int, **given: Any
    ) -> DevicePlan:
        """Allocate a plan for ``bucket``, rows past the tokens included, but for what is given."""

        def zeros(*shape: int, dtype: Any = torch.int32) -> Any:
            return torch.zeros(shape, dtype=dtype, device=device)

        n_places, step = bucket.n_tokens, ALIGNMENT // 8
        rows = zeros(n_layers, -(-bucket.batch // step) * step, dtype=torch.int64)
        made = {
            "place": zeros(n_places),
            "slot": zeros(n_places),
            "row_depth": zeros(n_places),
            "grid": zeros(bucket.batch, bucket.max_seqlen),
            "active_lengths": rows[:, : bucket.batch],
        }
        if not given:
            given = {"depths": zeros(n_places), "counts": zeros(2, n_layers)}
        return cls(**made, **given)


class DeviceRouting(Protocol):
    """What the loop on a device computes besides the engines' calls."""

    def plan(self, scores: Any, lengths: Any, thresholds: Any, out: DevicePlan) -> None:
        """Fill ``out``.

        Args:
            scores: ``[n_places]`` float32.
            lengths: ``[batch]`` int64, tokens of each sequence; its first positions.
            thresholds: ``[n_layers]`` float32, nondecreasing.
            out: of the batch's bucket.
        """

    def stage_indices(self, plan: DevicePlan, layer: int, bucket: Bucket) -> tuple[Any, Any]:
        """Return where the active rows of ``layer`` stand in ``[batch, max_seqlen]``.

        Returns:
            ``gather_index [batch, max_seqlen]``, the row at each place, and
            ``scatter_index [n_tokens]``, the flat place of each row, int32 and of the sizes of
            ``bucket``; 0 where there is none.
        """

    def take_rows(self, plan: DevicePlan, states: Any, out: Any) -> None:
        """``out[row] = states[place of row]``, ``out [n_rows, d_model]``."""

    def put_rows(
        self, plan: DevicePlan, rows: Any, layer: int, states: Any, *, finished: bool
    ) -> None:
        """``states[place of row] = rows[row]`` for the active rows of ``layer``.

        ``finished``: only for those that ``layer`` is the last one of.
        """


class TorchRouting:
    """The definition, operator by operator."""

    def __init__(self) -> None:
        self._torch: Any = require("torch", extra="gpu", purpose="Routing on a device")

    def plan(self, scores: Any, lengths: Any, thresholds: Any, out: DevicePlan) -> None:
        """See :meth:`DeviceRouting.plan`."""
        torch = self._torch
        batch, longest = out.grid.shape
        is_token = torch.arange(longest, device=scores.device) < lengths[:, None]
        depth = (scores.view(batch, longest, 1) > thresholds).sum(dim=2, dtype=torch.int32)
        depth = torch.where(is_token, depth, 0)
        out.depths.copy_(depth.view(-1))
        layers = torch.arange(len(thresholds), device=scores.device)
        active = (depth > layers[:, None, None]).sum(dim=2)
        out.active_lengths.copy_(active)
        out.counts[0] = active.sum(dim=1)
        out.counts[1] = active.amax(dim=1)
        # Padding sorts last, and its rows have no slot.
        key = torch.where(is_token, depth, -1).view(-1)
        place = torch.sort(key, descending=True, stable=True).indices
        n_tokens = int(lengths.sum())
        sequence = place[:n_tokens] // longest
        by_sequence = torch.sort(sequence, stable=True).indices
        starts = torch.cumsum(lengths, 0) - lengths
        slot = torch.empty_like(sequence)
        slot[by_sequence] = torch.arange(n_tokens, device=scores.device)
        slot -= starts[sequence]
        out.place.copy_(place)
        out.slot.zero_()
        out.slot[:n_tokens] = slot.int()
        out.row_depth.copy_(key[place].clamp_min(0))
        out.grid.fill_(NO_ROW)
        rows = torch.arange(n_tokens, dtype=torch.int32, device=scores.device)
        out.grid[sequence, slot] = rows

    def stage_indices(self, plan: DevicePlan, layer: int, bucket: Bucket) -> tuple[Any, Any]:
        """See :meth:`DeviceRouting.stage_indices`."""
        torch = self._torch
        n_active = plan.counts[0, layer]
        cut = plan.grid[:, : bucket.max_seqlen]
        gather = torch.where(cut < n_active, cut, 0).contiguous()
        n_rows = bucket.n_tokens
        rows = torch.arange(n_rows, device=cut.device)
        flat = plan.place[:n_rows] // plan.grid.shape[1] * bucket.max_seqlen + plan.slot[:n_rows]
        return gather, torch.where(rows < n_active, flat, 0).int()

    def take_rows(self, plan: DevicePlan, states: Any, out: Any) -> None:
        """See :meth:`DeviceRouting.take_rows`."""
        self._torch.index_select(states, 0, plan.place[: len(out)], out=out)

    def put_rows(
        self, plan: DevicePlan, rows: Any, layer: int, states: Any, *, finished: bool
    ) -> None:
        """See :meth:`DeviceRouting.put_rows`."""
        depth = plan.row_depth[: len(rows)]
        wanted = depth == layer + 1 if finished else depth > layer
        states[plan.place[: len(rows)][wanted].long()] = rows[wanted]
