"""Captured CUDA graphs, by what they do and for which sizes."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sdt_deploy.errors import BackendError

MAX_GRAPHS = 1024
"""Captured graphs that a session keeps; the least recently used ones go first."""
Work = Callable[[], None]
Observer = Callable[[Hashable], AbstractContextManager[None]]
"""Gives a context around the launch of a piece, named by its key."""


SETTLING_RUNS = 3
MAX_TRIES = 3
"""Captures of a piece that may fail before it is run without a graph."""


class UncapturedWarning(UserWarning):
    """A piece of a batch runs without a CUDA graph."""


class GraphCache:
    """Captured CUDA graphs by key, bounded in number.

    Args:
        torch: the module.
        enabled: False: every launch runs its work as it is.
        max_graphs: see :data:`MAX_GRAPHS`.
    """

    def __init__(self, torch: Any, *, enabled: bool, max_graphs: int = MAX_GRAPHS) -> None:
        self._torch = torch
        self._enabled = enabled
        self._max_graphs = max_graphs
        self.observer: Observer | None = None
        self._pool: Any = None
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._failures: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return len(self._graphs)

    def launch(self, key: Hashable, work: Work, settle: Work | None = None) -> None:
        """Enqueue ``work`` on the current stream, which must not be the default one.

        The first time it runs as it is, and is captured afterwards: engines allocate, choose and
        compile on a first run, which no capture may contain. ``work`` must use the same addresses
        each time, apart from memory that it allocates.

        ``settle`` calls the same engines with the same sizes, and runs before all that, some times:
        an arena that grew in one run lies otherwise in the next, and may grow once more. Where an
        engine fails in the capture all the same, there is no graph: ``work`` runs as it is, and the
        next launch tries again, :data:`MAX_TRIES` times in all.

        Warns:
            UncapturedWarning: when the last try has failed.
        """
        with nullcontext() if self.observer is None else self.observer(key):
            self._launch(key, work, settle)

    def _launch(self, key: Hashable, work: Work, settle: Work | None) -> None:
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.replay()
            return
        if not self._enabled or self._failures[key] >= MAX_TRIES:
            work()
            return
        if settle is not None:
            for _ in range(SETTLING_RUNS):
                settle()
        work()
        if not self._graphs:  # a pool dies with its last graph
            self._pool = self._torch.cuda.graph_pool_handle()
        graph = self._torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException as error:
            with contextlib.suppress(Exception):  # it fails as well, and says less
                graph.capture_end()
            if not isinstance(error, BackendError):
                raise
            self._failures[key] += 1
            if self._failures[key] == MAX_TRIES:
                warnings.warn(
                    f"{key} runs without a CUDA graph, and slower: an engine does what no capture "
                    f"may contain ({error})",
                    UncapturedWarning,
                    stacklevel=2,
                )
            return
        graph.capture_end()
        self._graphs[key] = graph
        if len(self._graphs) > self._max_graphs:
            self._graphs.popitem(last=False)

    def discard(self, stale: Callable[[Hashable], bool]) -> None:
        """Free the graphs whose key is stale."""
        for key in [key for key in self._graphs if stale(key)]:
            del self._graphs[key]

    def clear(self) -> None:
        """Free all graphs, and with them their scratch memory."""
        self._graphs.clear()
        self._failures.clear()
