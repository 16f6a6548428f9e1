"""The seam between the loop and the engines.

A backend opens the graphs of a bundle and moves rows between buffers; it decides nothing. The loop
(:mod:`sdt_deploy.runtime.loop`) tells it what to run. To support another engine, implement
:class:`Backend`; ``sdt_deploy.testing.OracleBackend`` is a complete example without any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from sdt_deploy.buckets import OptimizationProfile
from sdt_deploy.runtime.routing import RoutePlan, RouteRules, depths_of, plan_route

if TYPE_CHECKING:
    from sdt_deploy.runtime.batch import TokenBatch
    from sdt_deploy.runtime.buffers import BufferPool
    from sdt_deploy.runtime.result import RunResult
    from sdt_deploy.runtime.stopping import StopCheck

Array: TypeAlias = Any
"""``[rows, …]``: a NumPy array, or an array in a GPU's memory with the same indexing. ``empty``
gives the backend's own kind; results and what the caller brings are NumPy arrays."""
HostArray: TypeAlias = np.ndarray[Any, Any]
Call: TypeAlias = Callable[[], None]


class Graph(Protocol):
    """One opened graph of a bundle."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """Prepare a call that computes ``outputs`` from ``inputs``.

        Both are C-contiguous arrays with the axes and dtypes of the graph's
        :class:`~sdt_deploy.bundle.GraphSpec`, owned by the caller, who keeps them until the call is
        made. Inputs from :meth:`Backend.empty` are read then; NumPy arrays may be read before.
        Outputs are overwritten whole. On return those in NumPy arrays are ready; on a GPU the
        others are so for what follows on the same stream. May be used from several threads at once.

        Raises:
            BackendError: if the engine refuses or, from the call, fails; the outputs then mean
                nothing.
        """


class SparseLoop(Protocol):
    """Runs the sparse path of a bundle: entry, route, stages with compaction between them, head.

    Thread-safe.
    """

    def run(
        self,
        buffers: BufferPool,
        batch: TokenBatch,
        thresholds: tuple[float, ...],
        check: StopCheck | None,
    ) -> RunResult:
        """Run a batch.

        Args:
            buffers: lend what the run needs.
            batch: checked ids.
            thresholds: one per layer.
            check: called before each stage; None: nothing stops the run.

        Raises:
            BackendError: if the engine fails or the session is closed.
            RunCancelledError: from ``check``.
        """


class Backend(Protocol):
    """Engines and memory of one bundle."""

    name: str
    """As in ``Session.open(..., backend=name)``."""
    profiles: tuple[OptimizationProfile, ...]
    """Sizes of the batches that the engines take; empty: any size."""

    def has(self, name: str) -> bool:
        """Tell whether there is a graph ``name`` that this backend runs."""

    def graph(self, name: str) -> Graph:
        """Return the graph ``name`` (``entry``, ``stage-00``, …, ``head``, ``dense``, …).

        Opened when first asked for, then kept. Thread-safe.
        """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate an uninitialised array; it belongs to the caller."""

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """``out[i] = rows[index[i]]``; ``index [n]`` int32, all in range, from :meth:`plan`."""

    def plan(
        self,
        scores: Array,
        thresholds: Sequence[float],
        cu_seqlens: HostArray,
        rules: RouteRules,
    ) -> RoutePlan:
        """Plan the route of a batch; see :func:`sdt_deploy.runtime.routing.plan_route`.

        Args:
            scores: ``[n_tokens]`` float32, from :meth:`empty`.
            thresholds: one per layer, nondecreasing.
            cu_seqlens: ``[batch + 1]`` int32.
            rules: of the bundle.

        Returns:
            A plan in arrays of the backend's own kind.
        """

    def fetch(self, *arrays: Array) -> tuple[HostArray, ...]:
        """Return arrays of the backend's own kind as NumPy arrays, which belong to the caller."""

    def running(self) -> AbstractContextManager[None]:
        """Return a context around everything that belongs to one run.

        A GPU backend selects its stream in it.
        """

    def close(self) -> None:
        """Free the engines; nothing may be called afterwards."""


class HostMemory:
    """Buffers in NumPy arrays: the memory half of every backend that runs on the CPU."""

    profiles: tuple[OptimizationProfile, ...] = ()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See :meth:`Backend.empty`."""
        return np.empty(shape, dtype=dtype)

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """See :meth:`Backend.take`."""
        rows.take(index, axis=0, out=out, mode="clip")  # "raise" would copy through a buffer

    def running(self) -> AbstractContextManager[None]:
        """See :meth:`Backend.running`."""
        return nullcontext()

    def plan(
        self,
        scores: Array,
        thresholds: Sequence[float],
        cu_seqlens: HostArray,
        rules: RouteRules,
    ) -> RoutePlan:
        """See :meth:`Backend.plan`."""
        depths = depths_of(scores, thresholds, cu_seqlens, rules.selection)
        return plan_route(depths, cu_seqlens, rules)

    def fetch(self, *arrays: Array) -> tuple[HostArray, ...]:
        """See :meth:`Backend.fetch`; they are the same."""
        return arrays

    def compiled_loop(self) -> SparseLoop | None:
        """Return what runs the sparse path without Python between the engines; None: nothing."""
        return None
