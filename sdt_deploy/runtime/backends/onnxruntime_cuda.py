"""ONNX Runtime on an NVIDIA GPU: no engines have to be built."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from sdt_deploy.buckets import OptimizationProfile
from sdt_deploy.bundle import Bundle, GraphSpec
from sdt_deploy.errors import BackendError
from sdt_deploy.ort import Address, bind_addresses, open_cuda_session
from sdt_deploy.runtime.backend import Array, Call, Graph
from sdt_deploy.runtime.backends.device import DeviceMemory


class OnnxRuntimeCudaGraph:
    """One ONNX Runtime session on a GPU."""

    def __init__(self, spec: GraphSpec, session: Any, backend: OnnxRuntimeCudaBackend) -> None:
        self._session = session
        self._backend = backend
        self._dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`.

        The call waits for the GPU only if outputs are NumPy arrays.
        """
        backend = self._backend
        there, results, fetch = backend.on_device(inputs, outputs, self._dtypes)
        run = bind_addresses(
            self._session,
            {name: self._address(name, array) for name, array in there.items()},
            {name: self._address(name, array) for name, array in results.items()},
            device_id=backend.device_id,
        )

        def call(_: object = (there, results)) -> None:  # the arrays live as long as the call
            with backend.lock:
                run()
            fetch()

        return call

    def _address(self, name: str, array: Array) -> Address:
        return array.data_ptr(), tuple(array.shape), self._dtypes[name]


class OnnxRuntimeCudaBackend(DeviceMemory):
    """Opens the graphs of a bundle with ONNX Runtime's CUDA provider.

    A session of ONNX Runtime belongs to one CUDA stream, so all runs go to a stream of the backend,
    which waits for the caller's current stream and is waited for by it. Several threads are served
    one after the other.

    Args:
        bundle: the opened bundle.
        device: see :class:`DeviceMemory`.

    Raises:
        BackendError: if torch finds no GPU.
        MissingExtraError: if onnxruntime or torch is not installed.
    """

    name = "onnxruntime-cuda"
    profiles: tuple[OptimizationProfile, ...] = ()

    def __init__(self, bundle: Bundle, *, device: str = "cuda") -> None:
        super().__init__(device)
        self.device_id = self.device.index or 0
        self.lock = threading.Lock()
        self._own_stream: Any = self._torch.cuda.Stream(self.device)
        self._bundle = bundle
        self._graphs: dict[str, OnnxRuntimeCudaGraph] = {}
        self._opening = threading.Lock()
        self._closed = False

    def running(self) -> AbstractContextManager[None]:
        """See :meth:`sdt_deploy.runtime.backend.Backend.running`."""
        return self.within(self._own_stream)

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._bundle.manifest.graphs

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        with self._opening:
            if self._closed:
                raise BackendError("the session is closed")
            if name not in self._graphs:
                spec = self._bundle.manifest.graphs[name]
                session = open_cuda_session(
                    self._bundle.file(spec.file),
                    device_id=self.device_id,
                    stream=self._own_stream.cuda_stream,
                )
                self._bundle.check_current()
                self._graphs[name] = OnnxRuntimeCudaGraph(spec, session, self)
            return self._graphs[name]

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""
        with self._opening:
            self._closed = True
            self._graphs.clear()
