"""The oracle on packed NumPy arrays, for comparisons with what the runtime returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdt_deploy.model.transformer import DenseTransformer, SparseDepthTransformer


@dataclass(frozen=True, kw_only=True)
class PackedOutput:
    """What the oracle computed, packed."""

    output: npt.NDArray[np.float32]
    """``[n_tokens, width]``, or ``[batch, width]`` for heads per sequence."""
    scores: npt.NDArray[np.float32]
    """``[n_tokens]``, or ``[n_tokens, n_layers]`` with routing ``per_layer``."""
    depths: npt.NDArray[np.int32]
    """``[n_tokens]``"""
    active: npt.NDArray[np.bool_]
    """``[n_tokens, n_layers]``, which layers took a token."""


@torch.no_grad()
def oracle_output(
    model: DenseTransformer,
    input_ids: npt.NDArray[np.int32],
    cu_seqlens: npt.NDArray[np.int32],
    token_type_ids: npt.NDArray[np.int32] | None = None,
    *,
    thresholds: Sequence[float] | None = None,
    depths: npt.NDArray[np.int32] | None = None,
    active: npt.NDArray[np.bool_] | None = None,
) -> PackedOutput:
    """Run the sparse or the dense oracle on packed ids.

    Args:
        model: the oracle; a :class:`DenseTransformer` that is not sparse takes no thresholds.
        input_ids: ``[n_tokens]``.
        cu_seqlens: ``[batch + 1]``.
        token_type_ids: ``[n_tokens]``, or None for zeros.
        thresholds: instead of the model's.
        depths: ``[n_tokens]``, instead of what the scores say.
        active: ``[n_tokens, n_layers]``, the same where a depth does not say which layers.
    """
    lengths = torch.from_numpy(np.diff(cu_seqlens)).long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(values: npt.NDArray[np.int32] | None) -> Tensor | None:
        if values is None:
            return None
        result = torch.zeros(mask.shape, dtype=torch.long)
        result[mask] = torch.from_numpy(values).long()
        return result

    ids, types = padded(input_ids), padded(token_type_ids)
    assert ids is not None
    if isinstance(model, SparseDepthTransformer):
        took = None
        if active is not None:
            took = torch.zeros(*mask.shape, active.shape[1], dtype=torch.bool)
            took[mask] = torch.from_numpy(active)
        found = model(ids, mask, types, thresholds=thresholds, depths=padded(depths), active=took)
    else:
        found = model(ids, mask, types)
    per_sequence = model.config.head.per_sequence
    output = found.output if per_sequence else found.output[mask]
    return PackedOutput(
        output=output.numpy(),
        scores=found.scores[mask].numpy(),
        depths=found.depths[mask].numpy(),
        active=found.active[mask].numpy(),
    )
