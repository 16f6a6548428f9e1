"""State buffers that runs borrow and give back."""

from __future__ import annotations

from sdt_deploy.bundle import TensorSpec
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backend import Backend
from sdt_deploy.runtime.loop import StateBuffers


class BufferPool:
    """Lends state buffers; concurrent runs get buffers of their own. Thread-safe.

    Args:
        backend: allocates them.
        states: the entry's output, which says width and dtype.
    """

    def __init__(self, backend: Backend, states: TensorSpec) -> None:
        self._backend = backend
        self._states = states
        self._idle: list[StateBuffers] = []  # its methods are atomic
        self._closed = False

    @property
    def n_idle(self) -> int:
        """Pairs that are kept for later runs."""
        return len(self._idle)

    def take(self) -> StateBuffers:
        """Lend buffers to one run, which gives them back in any case.

        Raises:
            BackendError: if the session is closed.
        """
        if self._closed:
            raise BackendError("the session is closed")
        try:
            return self._idle.pop()
        except IndexError:
            return StateBuffers(self._backend, self._states)

    def give_back(self, buffers: StateBuffers) -> None:
        """Keep buffers for later runs, or free them if the session was closed."""
        self._idle.append(buffers)
        if self._closed:
            self._idle.clear()

    def close(self) -> None:
        """Free idle buffers now and lent ones when they come back; lend no more."""
        self._closed = True
        self._idle.clear()
