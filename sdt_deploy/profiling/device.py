"""Times on a GPU: CUDA events around every piece, and NVTX ranges for Nsight Systems.

On ``device="cpu"``, which the tests use, the host's clock takes their place. Events and ranges lie
around the launch of a piece, outside the capture of its graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from time import monotonic_ns
from typing import Any

from sdt_deploy.profiling.recorder import Span
from sdt_deploy.runtime.backends.device import DeviceMemory


class DeviceTimer:
    """Times the pieces that a session launches on a device.

    Args:
        backend: the session's.
    """

    def __init__(self, backend: DeviceMemory) -> None:
        self._backend = backend
        self._cuda: Any = backend.torch.cuda if backend.device.type == "cuda" else None
        self._pieces: list[tuple[str, Any, Any]] = []
        self._run: tuple[int, int, Any] | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Record one run on the host's clock, and an event that its pieces are placed by."""
        origin = self._event()
        start = monotonic_ns()
        with self._range("run"):
            yield
        self._run = start, monotonic_ns(), origin

    @contextmanager
    def piece(self, key: Hashable) -> Iterator[None]:
        """Record one piece on the current stream; ``key`` names it."""
        name = _name(key)
        start = self._event()
        with self._range(name):
            yield
        self._pieces.append((name, start, self._event()))

    def spans(self) -> list[Span]:
        """Wait for the device; return the run and its pieces since the last call, and forget them.

        Pieces stand at the host's time at which the run began plus what the device counted since.
        """
        self._backend.wait()
        pieces, self._pieces = self._pieces, []
        if self._run is None:
            return []
        (begin, end, origin), self._run = self._run, None
        return [
            Span(name="run", kind="run", start_ns=begin, end_ns=end),
            *(
                Span(
                    name=name,
                    kind="graph",
                    start_ns=begin + self._between(origin, start),
                    end_ns=begin + self._between(origin, stop),
                )
                for name, start, stop in pieces
            ),
        ]

    def _event(self) -> Any:
        if self._cuda is None:
            return monotonic_ns()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> int:
        if self._cuda is None:
            return int(second) - int(first)
        return round(float(first.elapsed_time(second)) * 1e6)

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        if self._cuda is None:
            yield
            return
        self._cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            self._cuda.nvtx.range_pop()


def _name(key: Hashable) -> str:
    """Return ``stage-03`` for ``("stage", 3, …)``, ``entry`` for ``("entry", …)``."""
    if not isinstance(key, tuple):
        return str(key)
    return f"{key[0]}-{key[1]:02d}" if key[0] == "stage" else str(key[0])
