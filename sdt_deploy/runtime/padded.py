"""Runs a whole-model graph, ``single``, ``masked`` or ``dense``, in one call on a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from sdt_deploy.choices import PathName
from sdt_deploy.config import ModelConfig
from sdt_deploy.runtime.backend import Array, Graph
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.layer_routing import taken_by_layer
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import depths_of, float32_thresholds


def padded_arrays(
    config: ModelConfig, batch: TokenBatch, thresholds: Sequence[float], path: PathName
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Make the inputs and the empty outputs of the graph ``path``.

    Inputs may share memory with ``batch``.
    """
    inputs: dict[str, Array] = {
        "input_ids": batch.padded(batch.input_ids),
        "attention_mask": batch.attention_mask.astype(np.int32),
    }
    if config.n_token_types:
        inputs["token_type_ids"] = batch.padded(batch.types)
    shape = inputs["input_ids"].shape
    rows = shape[:1] if config.head.per_sequence else shape
    outputs = {"output": np.empty((*rows, config.output_width), dtype=np.float32)}
    if path != "dense":
        inputs["thresholds"] = float32_thresholds(tuple(thresholds))
        outputs["scores"] = np.empty((*shape, *config.score_axes), dtype=np.float32)
    return inputs, outputs


def run_padded(
    config: ModelConfig,
    graph: Graph,
    batch: TokenBatch,
    thresholds: Sequence[float],
    path: PathName,
) -> RunResult:
    """Run ``graph``, which is the one of ``path``.

    Raises:
        BackendError: if the engine fails.
    """
    start = perf_counter()
    inputs, outputs = padded_arrays(config, batch, thresholds, path)
    graph.bind(inputs, outputs)()
    output, scores, active = outputs["output"], None, None
    if not config.head.per_sequence:
        output = batch.packed(output)
    if path == "dense":
        depths = np.full(batch.n_tokens, config.n_layers, dtype=np.int32)
    else:
        scores = batch.packed(outputs["scores"])
        if config.routing == "per_layer":
            active = taken_by_layer(
                scores,
                thresholds,
                batch.cu_seqlens,
                leaving=config.leaving,
                selection=config.selection,
            )
            depths = active.sum(axis=1, dtype=np.int32)
        else:
            depths = depths_of(scores, thresholds, batch.cu_seqlens, config.selection)
    return RunResult(
        output=output,
        depths=depths,
        scores=scores,
        input_ids=batch.input_ids.copy(),
        cu_seqlens=batch.cu_seqlens.copy(),
        active=active if config.leaving == "skip" else None,
        layer_usage=LayerUsage.of(depths, active, config.n_layers),
        timings=Timings(total_ms=(perf_counter() - start) * 1e3),
        path=path,
    )
