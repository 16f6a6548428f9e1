"""Embeddings of the oracle for many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.transformer import DenseTransformer, SparseDepthTransformer
from sdt_deploy.runtime.splitting import rows_of

BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings of texts, in their order, and how deep their tokens went."""

    embeddings: npt.NDArray[np.float32]
    """``[n_texts, width]``"""
    depths: npt.NDArray[np.int32]
    """``[n_tokens]``, layers of each token of the sample, pinned ones included."""

    @property
    def mean_depth(self) -> float:
        """Layers per token."""
        return float(self.depths.mean())


@torch.no_grad()
def embed_with_oracle(
    model: DenseTransformer,
    sample: TokenSample,
    *,
    thresholds: Sequence[float] | None = None,
) -> Embedded:
    """Run the sparse or the dense oracle, in float32, on the device it is on.

    Args:
        model: with a head per sequence.
        sample: the texts.
        thresholds: of a sparse model, instead of its own.
    """
    device = next(model.parameters()).device
    lengths = np.diff(sample.cu_seqlens)
    order = np.argsort(lengths, kind="stable")
    output = np.zeros((len(lengths), model.config.output_width), dtype=np.float32)
    depths = np.zeros(len(sample.input_ids), dtype=np.int32)
    start = 0
    while start < len(order):
        longest_first = lengths[order[start:]]
        fits = np.arange(1, len(longest_first) + 1) * longest_first <= BATCH_TOKENS
        chosen = order[start : start + max(1, int(fits.sum()))]
        start += len(chosen)
        mask = np.arange(lengths[chosen].max()) < lengths[chosen][:, None]
        rows = rows_of(sample.cu_seqlens, chosen)
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = sample.input_ids[rows]
        inputs = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        if isinstance(model, SparseDepthTransformer):
            found = model(*inputs, thresholds=thresholds)
        else:
            found = model(*inputs)
        output[chosen] = found.output.cpu().numpy()
        depths[rows] = found.depths.cpu().numpy()[mask]
    return Embedded(embeddings=output, depths=depths)
