"""The sparse path without Python between the engines, on ONNX Runtime's C library.

Caches are cold there: what takes Python some 100 µs a stage takes compiled code 10
(``docs/decisions/016-compiled-loop.md``). Results are those of
:mod:`sdt_deploy.runtime.sparse`, bit by bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import numpy as np

from sdt_deploy.bundle import Manifest, TensorSpec
from sdt_deploy.config import Pooling
from sdt_deploy.ort_library import ELEMENT_TYPES, LibrarySession, OrtLibrary
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.buffers import BufferPool
from sdt_deploy.runtime.compiled import (
    ENTRY,
    FIRST_STAGE,
    HEAD,
    MOVE,
    ROUTE,
    STOPPED,
    run_loop,
    space_size,
)
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import float32_thresholds
from sdt_deploy.runtime.stopping import StopCheck

_ENTRY = ("input_ids", "position_ids", "token_type_ids")
_STAGE = ("hidden_states", "gather_index", "scatter_index", "key_bias")
_SEES_ALL = ("context_states", "context_gather_index")
_HEAD: Mapping[Pooling | None, tuple[str, ...]] = {
    None: (),
    "cls": ("first_index",),
    "mean": ("gather_index", "lengths"),
}
_POOLINGS = tuple(_HEAD)
"""By the numbers that the loop has for them."""


def fits(manifest: Manifest) -> bool:
    """Tell whether the compiled loop runs a bundle; if not, the loop in Python does.

    It takes one layer a stage, one score for all layers, absolute thresholds, and position
    embeddings.
    """
    model, graphs = manifest.model, manifest.graphs
    if model.routing != "once" or model.selection != "threshold" or model.rotary is not None:
        return False
    expected = {*_STAGE, *(_SEES_ALL if model.context == "all" else ())}
    if not set(_names(graphs["entry"].inputs)) <= set(_ENTRY):
        return False
    if _names(graphs["entry"].outputs) != ["hidden_states", "scores"]:
        return False
    head = {"hidden_states", *_HEAD[model.head.pooling]}
    return set(_names(graphs["head"].inputs)) == head and all(
        last - first == 1
        and spec.attention_layout != "padded"
        and set(_names(spec.inputs)) == expected
        and _names(spec.outputs) == ["updated_states"]
        and all(tensor.dtype == "float32" for tensor in spec.inputs if tensor.name == "key_bias")
        for spec, (first, last) in zip(manifest.stages, manifest.stage_layers, strict=True)
    )


def _names(tensors: Sequence[TensorSpec]) -> list[str]:
    return [tensor.name for tensor in tensors]


class CompiledLoop:
    """Runs a bundle's sparse path. Thread-safe.

    Args:
        library: of the process.
        manifest: of a bundle that :func:`fits`.
        session: opens a graph by name.
    """

    def __init__(
        self,
        library: OrtLibrary,
        manifest: Manifest,
        session: Callable[[str], LibrarySession],
    ) -> None:
        model, graphs = manifest.model, manifest.graphs
        self._library, self._config = library, model
        taken = _names(graphs["entry"].inputs)
        entry = [name for name in _ENTRY if name in taken]
        stage = (*_STAGE, *(_SEES_ALL if model.context == "all" else ()), "updated_states")
        head = ("hidden_states", *_HEAD[model.head.pooling], "output")
        order = {"entry": (*entry, "hidden_states", "scores")}
        order |= {one.name: stage for one in manifest.stages} | {"head": head}
        self._opened = [session(name) for name in order]  # which keeps them open
        self._graphs = np.zeros((len(order), 8), dtype=np.int64)
        for row, one, names in zip(self._graphs, self._opened, order.values(), strict=True):
            row[: 1 + len(names)] = [one.address, *map(library.text, names)]
        states, c = np.dtype(graphs["entry"].outputs[0].dtype), ctypes.CDLL(None)
        self._row_bytes = model.d_model * states.itemsize
        self._fixed = np.array(
            [
                library.memory,
                *(ctypes.cast(one, ctypes.c_void_p).value for one in (c.clock_gettime, c.memcpy)),
                model.context == "all",
                model.n_heads,
                _POOLINGS.index(model.head.pooling),
                "position_ids" in taken,
                "token_type_ids" in taken,
                ELEMENT_TYPES[states.name],
                states.itemsize,
                model.d_model,
            ],
            dtype=np.int64,
        )

    def run(
        self,
        buffers: BufferPool,
        batch: TokenBatch,
        thresholds: tuple[float, ...],
        check: StopCheck | None,
    ) -> RunResult:
        """See :meth:`sdt_deploy.runtime.backend.SparseLoop.run`.

        Of ``check`` it heeds the deadline alone: nothing compiled can ask an event of Python.
        """
        begin = perf_counter()
        config, n_tokens, n_layers = self._config, batch.n_tokens, self._config.n_layers
        batch_size, kinds = len(batch.lengths), batch.token_type_ids
        # copies: what the caller has may be read-only, or unaligned
        input_ids, cu_seqlens = batch.input_ids.copy(), batch.cu_seqlens.copy()
        token_type_ids = input_ids[:0] if kinds is None else kinds.copy()
        scores = np.empty(n_tokens, dtype=np.float32)
        depths = np.empty(n_tokens, dtype=np.int32)
        usage = np.empty(2 * n_layers + 1, dtype=np.int32)
        times = np.zeros(FIRST_STAGE + n_layers)
        rows = batch_size if config.head.per_sequence else n_tokens
        output = np.empty((rows, config.output_width), dtype=np.float32)
        lent = buffers.take()
        try:
            sizes = n_tokens, batch_size, batch.max_seqlen, config.n_heads, self._row_bytes
            status = run_loop(
                self._library.api,
                self._fixed,
                self._graphs,
                float32_thresholds(thresholds),
                input_ids,
                token_type_ids,
                cu_seqlens,
                lent.space(space_size(*sizes)),
                output,
                scores,
                depths,
                usage,
                times,
                -1 if check is None else check.left_ns(),
            )
            if status == STOPPED and check is not None:
                raise check.exceeded()
            self._library.check(status)
        finally:
            buffers.give_back(lent)
        counts, ms = usage.tolist(), times.tolist()
        active_tokens = tuple(counts[n_layers + 1 :])
        n_run = n_layers - active_tokens.count(0)
        return RunResult(
            output=output,
            depths=depths,
            scores=scores,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens,
            layer_usage=LayerUsage(
                depth_histogram=tuple(counts[: n_layers + 1]), active_tokens=active_tokens
            ),
            timings=Timings(
                total_ms=(perf_counter() - begin) * 1e3,
                entry_ms=ms[ENTRY],
                route_ms=ms[ROUTE],
                stage_ms=tuple(ms[FIRST_STAGE : FIRST_STAGE + n_run]),
                stages=tuple(range(n_run)),
                move_ms=ms[MOVE],
                head_ms=ms[HEAD],
            ),
            path="sparse",
        )
