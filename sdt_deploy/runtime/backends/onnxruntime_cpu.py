"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdt_deploy.bundle import Bundle, GraphSpec
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


class OnnxRuntimeHostBackend(HostMemory):
    """Opens the graphs of a bundle with ONNX Runtime on the CPU, each once.

    Args:
        bundle: the opened bundle.

    Raises:
        BackendError: if the bundle is one of bfloat16.
    """

    name: str

    def __init__(self, bundle: Bundle) -> None:
        if bundle.manifest.export.precision == "bfloat16":
            raise BackendError(
                f"{bundle.path} is a bfloat16 bundle, and {self.name} has no bfloat16 kernels; "
                "bfloat16 is for GPUs. Export with --precision float32 to run it on a CPU"
            )
        self._bundle = bundle
        self._graphs: dict[str, Graph] = {}
        self._lock = fork_safe_lock()
        self._closed = False

    def _open(self, spec: GraphSpec, path: Path) -> Graph:
        """Open a graph, whose file is ``path``."""
        raise NotImplementedError

    def _free_arena(self) -> None:
        """Give back what closed graphs have left in the arena."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._bundle.manifest.graphs

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        with self._lock:
            if self._closed:
                raise BackendError("the session is closed")
            if name not in self._graphs:
                spec = self._bundle.manifest.graphs[name]
                graph = self._open(spec, self._bundle.file(spec.file))
                self._bundle.check_current()
                if self._closed:  # by a signal handler
                    raise BackendError("the session is closed")
                self._graphs[name] = graph
            return self._graphs[name]

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""
        with self._lock:
            self._closed = True
            opened = bool(self._graphs)
            self._graphs.clear()
        if opened:
            self._free_arena()


class OnnxRuntimeCpuBackend(OnnxRuntimeHostBackend):
    """Opens the graphs of a bundle with ONNX Runtime's CPU provider.

    Args:
        bundle: the opened bundle.
        n_threads: see :func:`sdt_deploy.ort.ensure_thread_pool`.

    Raises:
        BackendError: if the bundle is one of bfloat16.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, *, n_threads: int | None = None) -> None:
        super().__init__(bundle)
        ensure_thread_pool(n_threads)  # once: a forked child has other threads

    def _open(self, spec: GraphSpec, path: Path) -> Graph:
        return OnnxRuntimeGraph(open_session(path))

    def _free_arena(self) -> None:
        free_arena()
