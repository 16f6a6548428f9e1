"""Embeddings of the oracle for many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.transformer import DenseTransformer, SparseDepthTransformer

BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Embeddings of texts, in their order, and how deep their tokens went."""

    embeddings: npt.NDArray[np.float32]
    """``[n_texts, width]``"""
    depth_histogram: npt.NDArray[np.int64]
    """Tokens at depth 0, 1, …, n_layers; padding excluded, pinned tokens included."""

    @property
    def mean_depth(self) -> float:
        """Layers per token."""
        counts = self.depth_histogram
        return float(counts @ np.arange(len(counts)) / counts.sum())


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
    n_layers = model.config.n_layers
    lengths = np.diff(sample.cu_seqlens)
    order = np.argsort(lengths, kind="stable")
    output = np.zeros((len(lengths), model.config.output_width), dtype=np.float32)
    histogram = np.zeros(n_layers + 1, dtype=np.int64)
    start = 0
    while start < len(order):
        longest_first = lengths[order[start:]]
        fits = np.arange(1, len(longest_first) + 1) * longest_first <= BATCH_TOKENS
        chosen = order[start : start + max(1, int(fits.sum()))]
        start += len(chosen)
        mask = np.arange(lengths[chosen].max()) < lengths[chosen][:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate(
            [sample.input_ids[sample.cu_seqlens[i] : sample.cu_seqlens[i + 1]] for i in chosen]
        )
        inputs = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        if isinstance(model, SparseDepthTransformer):
            found = model(*inputs, thresholds=thresholds)
        else:
            found = model(*inputs)
        output[chosen] = found.output.cpu().numpy()
        histogram += np.bincount(found.depths.cpu().numpy()[mask], minlength=n_layers + 1)
    return Embedded(embeddings=output, depth_histogram=histogram)
