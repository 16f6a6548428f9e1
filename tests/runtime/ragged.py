"""TensorRT's ragged attention for the reference evaluator of onnx."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun


class TRT_Attention(OpRun):  # noqa: N801
    """Ragged attention as NvInfer.h of TensorRT 11.1 describes it; it does not scale."""

    op_domain = ""

    def _run(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        cumulative: Any,
        lengths: Any,
        **form: str,
    ) -> tuple[Any]:
        assert mask is None
        assert form["query_form"] == "packed_nhd"
        assert cumulative.dtype == lengths.dtype == np.int32
        assert cumulative[0] == 0
        out = np.full_like(query, np.nan)  # garbage behind the last row
        for i, (start, stop) in enumerate(pairwise(cumulative)):
            if form["kv_form"] == "packed_nhd":
                keys, values = key[start:stop], value[start:stop]
                assert (cumulative == lengths).all()
            else:  # [batch, heads, n, head_dim]
                keys = key[i, :, : lengths[i]].swapaxes(0, 1)
                values = value[i, :, : lengths[i]].swapaxes(0, 1)
            logits = np.einsum("qhd,khd->hqk", query[start:stop], keys)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-1e9))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[start:stop] = np.einsum("hqk,khd->qhd", weights, values)
        return (out,)
