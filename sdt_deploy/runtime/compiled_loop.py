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
from sdt_deploy.runtime.compiled import ENTRY, FIRST_STAGE, HEAD, MOVE, ROUTE, run_loop
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import float32_thresholds

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
        order = ["entry", *(stage.name for stage in manifest.stages), "head"]
        self._opened = [session(name) for name in order]  # which keeps them open
        self._sessions = np.array([one.address for one in self._opened], dtype=np.int64)
        taken = _names(graphs["entry"].inputs)
        entry = [name for name in _ENTRY if name in taken]
        stage = (*_STAGE, *(_SEES_ALL if model.context == "all" else ()))
        head = ("hidden_states", *_HEAD[model.head.pooling])
        self._names = np.zeros((3, 8), dtype=np.int64)
        for row, names in zip(
            self._names,
            (
                (*entry, "hidden_states", "scores"),
                (*stage, "updated_states"),
                (*head, "output"),
            ),
            strict=True,
        ):
            row[: len(names)] = [library.text(name) for name in names]
        states = np.dtype(graphs["entry"].outputs[0].dtype)
        self._fixed = np.array(
            [
                library.memory,
                ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value,
                model.context == "all",
                model.n_heads,
                _POOLINGS.index(model.head.pooling),
                "position_ids" in taken,
                "token_type_ids" in taken,
                ELEMENT_TYPES[states.name],
                states.itemsize,
            ],
            dtype=np.int64,
        )

    def run(
        self, buffers: BufferPool, batch: TokenBatch, thresholds: tuple[float, ...]
    ) -> RunResult:
        """Run a batch; as :func:`sdt_deploy.runtime.sparse.run_sparse` without ``check``.

        Raises:
            BackendError: if the engine fails or the session is closed.
        """
        begin = perf_counter()
        config, n_tokens, n_layers = self._config, batch.n_tokens, self._config.n_layers
        batch_size, kinds = len(batch.lengths), batch.token_type_ids
        scores = np.empty(n_tokens, dtype=np.float32)
        depths = np.empty(n_tokens, dtype=np.int32)
        active_tokens = np.empty(n_layers, dtype=np.int32)
        times = np.empty(FIRST_STAGE + n_layers, dtype=np.int64)
        rows = batch_size if config.head.per_sequence else n_tokens
        output = np.empty((rows, config.output_width), dtype=np.float32)
        cu_seqlens = batch.cu_seqlens.copy()  # the caller's may be read-only, or unaligned
        places = batch_size * batch.max_seqlen * config.n_heads
        size = (5 + config.n_heads) * n_tokens + 3 * batch_size + 2 * places
        lent = buffers.take()
        try:
            first, second = lent.reserve(n_tokens)
            status = run_loop(
                self._library.api,
                self._fixed,
                self._sessions,
                self._names,
                float32_thresholds(thresholds),
                batch.input_ids.ctypes.data,
                0 if kinds is None else kinds.ctypes.data,
                cu_seqlens,
                first.view(np.uint8),
                second.view(np.uint8),
                np.empty(size, np.int32),
                np.empty(places, np.float32),
                output,
                scores,
                depths,
                active_tokens,
                times,
            )
            self._library.check(status)
        finally:
            buffers.give_back(lent)
        active, ms = active_tokens.tolist(), (times * 1e-6).tolist()
        n_run = n_layers - active.count(0)
        return RunResult(
            output=output,
            depths=depths,
            scores=scores,
            input_ids=batch.input_ids.copy(),
            cu_seqlens=cu_seqlens,
            layer_usage=LayerUsage.from_active(n_tokens, active),
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
