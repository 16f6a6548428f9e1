"""The loop between the engines: run a stage, let finished rows leave, run the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from time import perf_counter

import numpy as np

from sdt_deploy.bundle import STATES, GraphSpec, TensorSpec
from sdt_deploy.config import shown
from sdt_deploy.errors import BundleFormatError
from sdt_deploy.runtime.backend import Array, Backend, Call, Graph
from sdt_deploy.runtime.routing import Int32, RoutePlan, RouteStep
from sdt_deploy.runtime.stopping import StopCheck


class StateBuffers:
    """What runs borrow: two buffers ``[capacity, d_model]`` for states, or plain memory.

    ``states`` is the entry's output; it says width and dtype.
    """

    def __init__(self, backend: Backend, states: TensorSpec) -> None:
        if len(states.axes) != 2 or not isinstance(states.axes[1], int):
            raise BundleFormatError(
                f"{states.name} must have the axes [rows, width], not {shown(states.axes)}; "
                "export again"
            )
        self._backend = backend
        self._states = states
        self._width = int(states.axes[1])
        self._capacity = 0
        self._buffers: list[Array] = []
        self._space = np.empty(0, np.int32)

    def reserve(self, n_tokens: int) -> tuple[Array, Array]:
        """Return both, cut to ``n_tokens`` rows; what they held is lost."""
        if n_tokens > self._capacity:
            self._buffers, self._capacity = [], 0  # free the old ones first; stay so on failure
            self._buffers = [
                self._backend.empty((n_tokens, self._width), self._states.dtype) for _ in range(2)
            ]
            self._capacity = n_tokens
        first, second = self._buffers
        return first[:n_tokens], second[:n_tokens]

    def space(self, size: int) -> Int32:
        """Return ``[size]`` of the host's memory, apart from both; what it held is lost."""
        if size > len(self._space):
            self._space = np.empty(0, np.int32)  # free the old one first
            self._space = np.empty(size, np.int32)
        return self._space[:size]


Source = Callable[[RouteStep], Array | None]

SOURCES: Mapping[str, Source] = {
    "gather_index": attrgetter("queries.gather_index"),
    "lengths": attrgetter("queries.lengths"),
    "scatter_index": attrgetter("queries.scatter_index"),
    "key_bias": attrgetter("key_bias"),
    "remaining_depth": attrgetter("remaining_depth"),
    "query_places": attrgetter("query_places"),
    "position_ids": lambda step: (
        None if step.position_ids is None else step.position_ids[: step.n_active]
    ),
    "context_position_ids": attrgetter("position_ids"),
    "refresh_index": attrgetter("refresh_index"),
    "context_gather_index": lambda step: step.context and step.context.gather_index,
    "context_lengths": lambda step: step.context and step.context.lengths,
}
"""Inputs of a stage besides the states, and where a step has them; None: it has not."""
PADDED_SOURCES: Mapping[str, Source] = {
    **SOURCES,
    "gather_index": attrgetter("queries.padded.gather_index"),
    "scatter_index": attrgetter("queries.padded.scatter_index"),
    "context_gather_index": lambda step: step.context and step.context.padded.gather_index,
}
"""The same for format version 1."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An opened stage, and where a step of the plan has what it takes."""

    name: str
    graph: Graph
    sources: tuple[tuple[str, Source], ...]
    """Name and source of every input besides the states."""
    scores: bool
    """Whether it scores its rows."""

    @classmethod
    def of(cls, spec: GraphSpec, graph: Graph) -> Stage:
        """Look up the sources, once for all runs.

        Raises:
            BundleFormatError: if the stage takes something that no plan has.
        """
        known = PADDED_SOURCES if spec.attention_layout == "padded" else SOURCES
        names = [tensor.name for tensor in spec.inputs if tensor.name not in STATES]
        for name in names:
            if name not in known:
                raise _unknown_input(spec.name, name)
        sources = tuple((name, known[name]) for name in names)
        return cls(name=spec.name, graph=graph, sources=sources, scores=len(spec.outputs) > 1)

    def inputs(self, step: RouteStep) -> dict[str, Array]:
        """Name the arrays of ``step`` that the stage takes besides the states.

        Raises:
            BundleFormatError: if it takes something that stages of this kind do not.
        """
        named: dict[str, Array] = {}
        for name, source in self.sources:
            array = source(step)
            if array is None:
                raise _unknown_input(self.name, name)
            named[name] = array
        return named


def _unknown_input(stage: str, name: str) -> BundleFormatError:
    return BundleFormatError(
        f"graph {stage} takes {shown(name)}, which no stage of this kind has; export again"
    )


@dataclass(frozen=True)
class BoundStages:
    """All stage calls of a run, ready to be made one after the other.

    Every stage reads the first ``n_active`` rows of one buffer and writes those of the other. Rows
    that are not where the next stage looks for them are copied; of the active and the finished
    ones, whichever are fewer.
    """

    calls: Sequence[tuple[Call, tuple[Array, Array] | None]]
    """Each stage call and, if rows have to be copied after it, the target and the source."""
    states: Array
    """``[n_tokens, d_model]``, where the last state of every row will be."""
    other: Array
    """The other buffer."""

    def run(self, check: StopCheck | None = None) -> tuple[list[float], float]:
        """Make the calls; return the milliseconds of each, and of all copies together.

        Args:
            check: called before each stage.
        """
        stage_ms = []
        move_ms = 0.0
        for call, copy in self.calls:
            if check is not None:
                check()
            start = perf_counter()
            call()
            stop = perf_counter()
            stage_ms.append((stop - start) * 1e3)
            if copy is not None:
                copy[0][:] = copy[1]
                move_ms += (perf_counter() - stop) * 1e3
        return stage_ms, move_ms


def bind_stages(
    plan: RoutePlan,
    states: Array,
    other: Array,
    stages: Sequence[Stage],
    scores: Array | None = None,
) -> BoundStages:
    """Prepare all stages of ``plan``, so that nothing is left to do between them.

    Args:
        plan: the route plan.
        states: ``[n_tokens, d_model]``, the entry's hidden states by row.
        other: of the same shape, to work with.
        stages: all stages, opened.
        scores: ``[n_tokens, n_layers]`` float32, where stages that score write those of their rows.
    """
    calls: list[tuple[Call, tuple[Array, Array] | None]] = []
    n_tokens = len(states)
    for step in plan.steps:
        stage = stages[step.stage]
        n = step.n_active
        active, updated = states[:n], other[:n]
        inputs = stage.inputs(step)
        inputs["hidden_states"] = active
        if step.context is not None:
            inputs["context_states"] = states
        outputs = {"updated_states": updated}
        if stage.scores and scores is not None:
            outputs["scores"] = scores[:n]
        call = stage.graph.bind(inputs, outputs)
        if 2 * n < n_tokens:
            calls.append((call, (active, updated)))
        else:
            calls.append((call, (other[n:], states[n:]) if n < n_tokens else None))
            states, other = other, states
    return BoundStages(calls=calls, states=states, other=other)


def timed(call: Call) -> float:
    """Make a call; return the milliseconds it took."""
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e3
