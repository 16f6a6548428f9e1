"""One result for each text that ran as several sequences."""

from __future__ import annotations

import dataclasses

import numpy as np

from sdt_deploy.config import HeadConfig
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.routing import Int32


def join_windows(result: RunResult, cu_windows: Int32, head: HeadConfig) -> RunResult:
    """Put the windows of each text together.

    Heads per token: rows stay as they are, window after window, the special tokens around each
    window among them, so that every row still has its entry in ``input_ids``. Heads per sequence:
    the mean over the windows, weighted by their tokens, special ones included; for ``embedding`` of
    the vectors that the model gives, scaled to unit norm again if the head does that; for
    ``classify`` of the logits.

    Args:
        result: of all windows.
        cu_windows: ``[n_texts + 1]``, the first window of each text.
        head: the model's.
    """
    output = result.output
    if head.per_sequence:
        weights = np.diff(result.cu_seqlens).astype(np.float32)[:, None]
        starts = cu_windows[:-1]
        mean = np.add.reduceat(output * weights, starts) / np.add.reduceat(weights, starts)
        output = mean.astype(np.float32, copy=False)
        if head.normalize:
            output /= np.maximum(np.linalg.norm(output, axis=1, keepdims=True), 1e-12)
    return dataclasses.replace(
        result, output=output, cu_seqlens=result.cu_seqlens[cu_windows].copy()
    )
