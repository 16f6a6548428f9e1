"""The loop between the engines: run a stage, let finished tokens leave, compact, run the next."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from sdt_deploy.bundle import GraphSpec, TensorSpec
from sdt_deploy.runtime.backend import Array, Backend, Graph
from sdt_deploy.runtime.routing import RoutePlan, RouteStep


class StateBuffers:
    """Three buffers ``[capacity, d_model]`` that a run moves its states between.

    ``states`` is the entry's output; it says width and dtype.

    ``full`` holds the last state of every token that has left the loop (with ``context="all"``: of
    every token). The active rows live in another one, and a stage writes into the third.
    """

    def __init__(self, backend: Backend, states: TensorSpec) -> None:
        self._backend = backend
        self._states = states
        self._width = int(states.axes[1])
        self._capacity = 0
        self._buffers: list[Array] = []

    def reserve(self, n_tokens: int) -> None:
        """Make room for ``n_tokens``; what the buffers held is lost."""
        if n_tokens > self._capacity:
            self._buffers, self._capacity = [], 0  # free the old ones first; stay so on failure
            self._buffers = [
                self._backend.empty((n_tokens, self._width), self._states.dtype) for _ in range(3)
            ]
            self._capacity = n_tokens

    def spare(self, *used: Array) -> Array:
        """Return a buffer that none of ``used`` is a view of."""
        taken = {id(array if array.base is None else array.base) for array in used}
        return next(buffer for buffer in self._buffers if id(buffer) not in taken)


def run_stages(
    plan: RoutePlan,
    full: Array,
    stages: Sequence[tuple[GraphSpec, Graph]],
    backend: Backend,
    buffers: StateBuffers,
    stage_ms: list[float],
) -> Array:
    """Run all stages of ``plan``.

    Args:
        plan: the route plan.
        full: ``[n_tokens, d_model]``, the entry's hidden states; a view of one of ``buffers``.
        stages: spec and opened graph of every stage.
        backend: moves the rows.
        buffers: reserved for ``plan.n_tokens``.
        stage_ms: receives the time of each stage call, without the compaction.

    Returns:
        ``[n_tokens, d_model]``, the last state of every token; a view of one of ``buffers``, valid
        until they are used again.
    """
    rows = full
    for step in plan.steps:
        if step.keep_index is not None:
            kept = buffers.spare(rows, full)[: step.n_active]
            backend.take(rows, step.keep_index, kept)
            rows = kept
        spec, graph = stages[step.stage]
        result = buffers.spare(rows, full)[: step.n_active]
        start = perf_counter()
        graph.run(stage_inputs(spec, step, rows, full), {"updated_states": result})
        stage_ms.append((perf_counter() - start) * 1e3)
        if step.publish_rows is None and step.n_active == plan.n_tokens:
            full = result
        elif len(step.publish_tokens):
            backend.put(full, step.publish_tokens, result, step.publish_rows)
        rows = result
    return full


def stage_inputs(spec: GraphSpec, step: RouteStep, rows: Array, full: Array) -> dict[str, Array]:
    """Name the arrays that the graph of ``spec`` takes in ``step``."""
    available: dict[str, Array | None] = {
        "hidden_states": rows,
        "gather_index": step.queries.gather_index,
        "lengths": step.queries.lengths,
        "scatter_index": step.queries.scatter_index,
        "remaining_depth": step.remaining_depth,
        "refresh_index": step.refresh_index,
    }
    if step.context is not None:
        available["context_states"] = full
        available["context_gather_index"] = step.context.gather_index
        available["context_lengths"] = step.context.lengths
    named = {}
    for tensor in spec.inputs:
        array = available[tensor.name]
        assert array is not None, f"{spec.name} takes {tensor.name}, the route plan has none"
        named[tensor.name] = array
    return named
