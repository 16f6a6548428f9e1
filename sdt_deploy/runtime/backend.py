"""The seam between the loop and the engines.

A backend opens the graphs of a bundle and moves rows between buffers; it decides nothing. The loop
(:mod:`sdt_deploy.runtime.loop`) tells it what to run. To support another engine, implement
:class:`Backend`; ``sdt_deploy.testing.OracleBackend`` is a complete example without any engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class Graph(Protocol):
    """One opened graph of a bundle."""

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Compute ``outputs`` from ``inputs``.

        Both are C-contiguous arrays with the axes and dtypes of the graph's
        :class:`~sdt_deploy.bundle.GraphSpec`, owned by the caller; outputs are overwritten whole.
        May be called from several threads at once. Returns when the outputs are ready.

        Raises:
            BackendError: if the engine fails; the outputs then mean nothing.
        """


class Backend(Protocol):
    """Engines and memory of one bundle."""

    name: str
    """As in ``Session.open(..., backend=name)``."""

    def graph(self, name: str) -> Graph:
        """Return the graph ``name`` (``entry``, ``stage-00``, …, ``head``, ``dense``, ``masked``).

        Opened when first asked for, then kept. Thread-safe.
        """

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate an uninitialised array; it belongs to the caller."""

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """``out[i] = rows[index[i]]``; ``index [n]`` int32, all in range."""

    def put(self, into: Array, index: Array, rows: Array, rows_index: Array | None) -> None:
        """``into[index[i]] = rows[rows_index[i]]``, or ``rows[i]`` without ``rows_index``.

        Both indices are ``[n]`` int32 and in range; those in ``index`` are distinct.
        """

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

    def put(self, into: Array, index: Array, rows: Array, rows_index: Array | None) -> None:
        """See :meth:`Backend.put`."""
        into[index] = rows if rows_index is None else rows[rows_index]
