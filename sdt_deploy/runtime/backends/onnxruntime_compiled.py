"""ONNX Runtime on the CPU by its C library, with the compiled loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdt_deploy.bundle import Bundle, GraphSpec
from sdt_deploy.errors import BackendError
from sdt_deploy.ort_library import ELEMENT_TYPES, LibrarySession, OrtLibrary, ort_library
from sdt_deploy.runtime.backend import Array, Call, Graph
from sdt_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeHostBackend
from sdt_deploy.runtime.compiled import FIRST_AXIS, ROW, run_graph
from sdt_deploy.runtime.compiled_loop import CompiledLoop, fits


class LibraryGraph:
    """One graph, opened by the library."""

    def __init__(self, library: OrtLibrary, session: LibrarySession, names: list[str]) -> None:
        self.session = session
        self._library = library
        self._names = {name: library.text(name) for name in names}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`."""
        arrays = {**inputs, **outputs}
        try:
            names = [self._names[name] for name in arrays]
            graph = np.array([self.session.address, *names], dtype=np.int64)
            tensors = np.array([_row(array) for array in arrays.values()], dtype=np.int64)
        except KeyError as error:
            raise BackendError(f"ONNX Runtime refused arrays: no {error} of this type") from error
        library, n_inputs = self._library, len(inputs)

        def run(_: object = (self, arrays)) -> None:  # what lives as long as the call
            library.check(run_graph(library.api, library.memory, graph, tensors, n_inputs))

        return run


def _row(array: Array) -> list[int]:
    """Describe an array as :mod:`sdt_deploy.runtime.compiled` does."""
    row = [array.ctypes.data, ELEMENT_TYPES[array.dtype.name], array.nbytes, array.ndim]
    return [*row, *array.shape, *[0] * (ROW - FIRST_AXIS - array.ndim)]


class OnnxRuntimeCompiledBackend(OnnxRuntimeHostBackend):
    """Opens the graphs of a bundle with ONNX Runtime's C library.

    Args:
        bundle: the opened bundle.
        n_threads: see :func:`sdt_deploy.ort_library.ort_library`.

    Raises:
        BackendError: if the bundle is one of bfloat16, or the library cannot be used here.
    """

    name = "onnxruntime-compiled"

    def __init__(self, bundle: Bundle, *, n_threads: int | None = None) -> None:
        super().__init__(bundle)
        self._library = ort_library(n_threads)

    def _open(self, spec: GraphSpec, path: Path) -> Graph:
        names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        return LibraryGraph(self._library, self._library.open(path), names)

    def _free_arena(self) -> None:
        self._library.free_arena()

    def compiled_loop(self) -> CompiledLoop | None:
        """Return what runs the sparse path; None: the loop in Python does."""
        if not fits(self._bundle.manifest):
            return None
        return CompiledLoop(self._library, self._bundle.manifest, self._session)

    def _session(self, name: str) -> LibrarySession:
        graph = self.graph(name)
        assert isinstance(graph, LibraryGraph)
        return graph.session
