"""The seam between the loop and the engines.

A backend opens the graphs of a bundle and moves rows between buffers; it decides nothing. The loop
(:mod:`sdt_deploy.runtime.loop`) tells it what to run. To support another engine, implement
:class:`Backend`; ``sdt_deploy.testing.OracleBackend`` is a complete example without any engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Call: TypeAlias = Callable[[], None]


class Graph(Protocol):
    """One opened graph of a bundle."""

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """Prepare a call that computes ``outputs`` from ``inputs``.

        Both are C-contiguous arrays with the axes and dtypes of the graph's
        :class:`~sdt_deploy.bundle.GraphSpec`, owned by the caller, who keeps them until the call is
        made; it reads the inputs then. Outputs are overwritten whole and are ready on return. May
        be used from several threads at once.

        Raises:
            BackendError: if the engine refuses or, from the call, fails; the outputs then mean
                nothing.
        """


class Backend(Protocol):
    """Engines and memory of one bundle."""

    name: str
    """As in ``Session.open(..., backend=name)``."""

    def graph(self, name: str) -> Graph:
        """Return the graph ``name`` (``entry``, ``stage-00``, …, ``head``, ``dense``, …).

        Opened when first asked for, then kept. Thread-safe.
        """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate an uninitialised array; it belongs to the caller."""

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """``out[i] = rows[index[i]]``; ``index [n]`` int32, all in range."""

    def close(self) -> None:
        """Free the engines; nothing may be called afterwards."""


class HostMemory:
    """Buffers in NumPy arrays: the memory half of every backend that runs on the CPU."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See :meth:`Backend.empty`."""
        return np.empty(shape, dtype=dtype)

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """See :meth:`Backend.take`."""
        rows.take(index, axis=0, out=out, mode="clip")  # "raise" would copy through a buffer
