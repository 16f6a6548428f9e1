"""The route plan computed on a GPU: the host learns a few counts, once, and nothing else.

The plan is that of :func:`sdt_deploy.runtime.routing.plan_route` in another order: a row keeps its
*slot* in its sequence, the number of rows of that sequence before it, through all stages. Rows are
sorted by falling depth, so the active rows of a sequence are always its first slots, and one grid
``[batch, max_seqlen]`` of rows serves every stage: a stage reads its first columns and hides rows
from ``n_active`` up. Attention does not depend on the order of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import BackendError
from sdt_deploy.extras import require
from sdt_deploy.runtime.routing import (
    HIDDEN,
    HeadLayout,
    RoutePlan,
    RouteRules,
    RouteStep,
)

if TYPE_CHECKING:
    from sdt_deploy.runtime.backend import Array, HostArray


class Transfers(Protocol):
    """Copies between host and device, see :class:`sdt_deploy.runtime.backend.Backend`."""

    def upload(self, arrays: Sequence[HostArray]) -> Sequence[Array]:
        """Copy to the device."""

    def fetch(self, *arrays: Array) -> tuple[HostArray, ...]:
        """Copy to the host, and wait."""


def check_routing(config: ModelConfig, backend: str) -> None:
    """Check that plans on a GPU can route a model.

    Raises:
        BackendError: if they cannot.
    """
    if config.causal:
        raise BackendError(
            f"{backend} does not keep the order of tokens, which causal attention needs: open the "
            'bundle with backend="onnxruntime-cpu"'
        )
    if not config.scored_once:
        raise BackendError(
            f"{backend} routes by thresholds on one score, and this model has routing "
            f"{config.routing!r} and selection {config.selection!r}: open the bundle with "
            'backend="onnxruntime-cpu"'
        )


def plan_on_device(
    transfers: Transfers,
    scores: Any,
    thresholds: Sequence[float],
    cu_seqlens: HostArray,
    rules: RouteRules,
) -> RoutePlan:
    """Plan the route of a batch with torch, on the device of ``scores``.

    Args:
        transfers: moves what the host knows there, and the counts back: the one read-back.
        scores: ``[n_tokens]`` float32 tensor.
        thresholds: one per layer, nondecreasing.
        cu_seqlens: ``[batch + 1]`` int32, on the host.
        rules: of the bundle.

    Returns:
        A plan whose arrays are tensors. ``order`` is always given. Sequences without active tokens
        stay in the layouts of a stage, and are hidden.
    """
    torch: Any = require("torch", extra="gpu", purpose="Routing on a GPU")
    lengths = np.diff(cu_seqlens)
    batch, longest, n_tokens = len(lengths), int(lengths.max()), int(cu_seqlens[-1])
    sequence = np.repeat(np.arange(batch), lengths)
    position = np.arange(n_tokens) - cu_seqlens[:-1][sequence]
    firsts = np.array([first for first, _ in rules.stage_layers])
    limits, place, seq, pos, first, layer, heads, starts, lens = transfers.upload(
        [
            np.asarray(thresholds, dtype=np.float32),
            sequence * longest + position,
            sequence,
            position,
            firsts,
            np.arange(len(thresholds)),
            np.arange(rules.n_heads, dtype=np.int32),
            cu_seqlens[:-1].astype(np.int64),
            lengths.astype(np.int32),
        ]
    )
    rows = torch.arange(n_tokens, device=scores.device)
    depths = torch.searchsorted(limits, scores, out_int32=True)
    sorted_depths, order = torch.sort(depths, descending=True, stable=True)
    row_of = torch.empty_like(order).scatter_(0, order, rows)
    # Rows by sequence, deepest first: the k-th of them has the k-th slot, whose place is known.
    row_seq = seq[order]
    by_seq = torch.sort(row_seq, stable=True).indices
    slot = torch.empty_like(order).scatter_(0, by_seq, pos)
    cells = torch.full((batch * longest,), n_tokens, dtype=torch.int64, device=scores.device)
    grid = cells.scatter_(0, place, by_seq).view(batch, longest)
    deep = torch.zeros_like(cells, dtype=torch.int32).scatter_(0, place, sorted_depths[by_seq])
    active = (deep.view(1, batch, longest) > first[:, None, None]).sum(dim=2)
    counts = torch.cat([(depths > layer[:, None]).sum(dim=1), active.amax(dim=1)])
    (found,) = transfers.fetch(counts)
    n_active, widths = found[: len(thresholds)].tolist(), found[len(thresholds) :].tolist()

    n_heads = rules.n_heads
    grid, slot, row_seq = grid.int(), slot.int(), row_seq.int()

    def bias(n_rows: int, width: int) -> Any:
        hidden = torch.where(grid[:, :width] < n_rows, 0.0, float(HIDDEN))
        return hidden[:, None, :, None].expand(-1, n_heads, -1, -1)

    def layout(n_rows: int, width: int, *, queries: bool, keys: bool) -> HeadLayout:
        cut = grid[:, :width]
        row = torch.where(cut < n_rows, cut, 0) * n_heads
        scatter = None
        if queries:
            base = row_seq[:n_rows] * (n_heads * width) + slot[:n_rows]
            scatter = base[:, None] + heads * width
        hidden: Any = bias(n_rows, width).contiguous() if keys else None
        return HeadLayout(
            lengths=lens,
            gather_index=row[:, None, :] + heads[:, None],
            scatter_index=scatter,
            key_bias=hidden,
        )

    everything = None
    if rules.context == "all":
        everything = layout(n_tokens, longest, queries=False, keys=True)
    steps: list[RouteStep] = []
    for stage, (begin, stop) in enumerate(rules.stage_layers):
        n_rows, width = n_active[begin], widths[stage]
        if n_rows == 0:
            break
        if steps and steps[-1].n_active == n_rows:
            queries = steps[-1].queries
        else:
            queries = layout(n_rows, width, queries=True, keys=everything is None)
        remaining = refresh = None
        key_bias: Any = queries.key_bias if everything is None else everything.key_bias
        if stop - begin > 1:
            remaining = sorted_depths[:n_rows] - begin
            if everything is None:
                inside = [bias(n_active[number], width) for number in range(begin, stop)]
                key_bias = torch.stack(inside)
            else:
                refresh = torch.where(rows < n_rows, rows + n_tokens, rows).int()
        steps.append(
            RouteStep(
                stage=stage,
                n_active=n_rows,
                queries=queries,
                context=everything,
                key_bias=key_bias,
                remaining_depth=remaining,
                query_places=None,
                refresh_index=refresh,
            )
        )
    head: dict[str, Any] = {}
    if rules.pooling == "cls":
        head["first_index"] = row_of[starts].int()
    elif rules.pooling == "mean":
        head = {"gather_index": torch.where(grid < n_tokens, grid, 0), "lengths": lens}
    return RoutePlan(
        depths=depths,
        active_tokens=n_active,
        order=order,
        row_of=row_of,
        steps=tuple(steps),
        head=head,
    )
