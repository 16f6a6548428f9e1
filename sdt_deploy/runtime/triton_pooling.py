"""Means of sequences on an NVIDIA GPU: one Triton kernel, one pass over the states.

What it computes is said, and tested against, by
:class:`~sdt_deploy.runtime.device_head.TorchPooling`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the kernel's source: its parameters are pointers, sizes and compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_PLACES, BLOCK_WIDTH = 64, 64


@triton.jit  # type: ignore[untyped-decorator]
def _pool(
    states, lengths, means, longest, width,
    block_places: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Some columns of one sequence, so a mean is always summed up in the same order."""
    sequence = tl.program_id(0).to(tl.int64)
    n_places = tl.load(lengths + sequence).to(tl.int32)
    column = tl.program_id(1) * block_width + tl.arange(0, block_width)
    is_column = column < width
    states += sequence * longest * width + column[None, :]
    total = tl.zeros([block_places, block_width], dtype=tl.float32)
    for start in tl.range(0, n_places, block_places):
        place = start + tl.arange(0, block_places)
        inside = (place < n_places)[:, None] & is_column[None, :]
        total += tl.load(states + place[:, None] * width, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / tl.maximum(n_places, 1).to(tl.float32)
    tl.store(means + sequence * width + column, mean, mask=is_column)


class TritonPooling:
    """See :class:`~sdt_deploy.runtime.device_head.DevicePooling`."""

    def __call__(self, states: Any, lengths: Any) -> Any:
        """See :meth:`~sdt_deploy.runtime.device_head.DevicePooling.__call__`."""
        batch, longest, width = states.shape
        means = torch.empty((batch, width), dtype=torch.float32, device=states.device)
        _pool[(batch, triton.cdiv(width, BLOCK_WIDTH))](
            states, lengths, means, longest, width,
            block_places=BLOCK_PLACES, block_width=BLOCK_WIDTH,
        )  # fmt: skip
        return means
