"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.forking import fork_safe_lock
from sdt_deploy.ort import bind_arrays, ensure_thread_pool, free_arena, open_session
from sdt_deploy.runtime.backend import Array, Call, Graph, HostMemory


class OnnxRuntimeGraph:
    """One ONNX Runtime session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`."""
        return bind_arrays(self._session, inputs, outputs)


def check_precision(bundle: Bundle, backend: str) -> None:
    """Check that ONNX Runtime's CPU provider has kernels for a bundle.

    Raises:
        BackendError: if the bundle is one of bfloat16.
    """
    if bundle.manifest.export.precision == "bfloat16":
        raise BackendError(
            f"{bundle.path} is a bfloat16 bundle, and {backend} has no bfloat16 kernels; "
            "bfloat16 is for GPUs. Export with --precision float32 to run it on a CPU"
        )


class OnnxRuntimeCpuBackend(HostMemory):
    """Opens the graphs of a bundle with ONNX Runtime's CPU provider.

    Args:
        bundle: the opened bundle.
        n_threads: see :func:`sdt_deploy.ort.ensure_thread_pool`.

    Raises:
        BackendError: if the bundle is one of bfloat16.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, *, n_threads: int | None = None) -> None:
        check_precision(bundle, self.name)
        self._bundle = bundle
        ensure_thread_pool(n_threads)  # once: a forked child has other threads
        self._graphs: dict[str, OnnxRuntimeGraph] = {}
        self._lock = fork_safe_lock()
        self._closed = False

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._bundle.manifest.graphs

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        with self._lock:
            if self._closed:
                raise BackendError("the session is closed")
            if name not in self._graphs:
                path = self._bundle.file(self._bundle.manifest.graphs[name].file)
                session = open_session(path)
                self._bundle.check_current()
                if self._closed:  # by a signal handler
                    raise BackendError("the session is closed")
                self._graphs[name] = OnnxRuntimeGraph(session)
            return self._graphs[name]

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""
        with self._lock:
            self._closed = True
            opened = bool(self._graphs)
            self._graphs.clear()
        if opened:
            free_arena()
