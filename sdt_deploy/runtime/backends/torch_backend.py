"""torch on an NVIDIA GPU: the graphs of a bundle as torch functions, with its flash attention."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import FunctionType
from typing import Any

from sdt_deploy.buckets import OptimizationProfile
from sdt_deploy.bundle import PROJECT, UPDATE, Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backend import Array, Call, Graph
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.device_entry import Parameters

Function = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Computes outputs from inputs."""


class TorchGraph:
    """One graph of a bundle."""

    def __init__(
        self, backend: TorchBackend, function: Function, dtypes: Mapping[str, str]
    ) -> None:
        self._backend = backend
        self._function = function
        self._dtypes = dtypes

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`.

        The call waits for the GPU only if outputs are NumPy arrays.
        """
        there, results, fetch = self._backend.on_device(inputs, outputs, self._dtypes)

        def call() -> None:
            with self._backend.torch.inference_mode():
                self._function(there, results)
            fetch()

        return call


class TorchBackend(DeviceMemory):
    """Runs bundles with fused attention by torch, on a stream of its own.

    It needs no engine: torch's flash attention and cuBLAS do the work. It is a yardstick for the
    others, and serves where they cannot be installed.

    Args:
        bundle: the opened bundle.
        device: see :class:`DeviceMemory`.
        compiled: fuse what lies between a layer's products by ``torch.compile``, for sizes of all
            kinds; the first run of each kind of graph waits for it. None: on a GPU.

    Raises:
        BackendError: if torch finds no GPU, or the bundle has decomposed attention.
        MissingExtraError: if torch is not installed.
    """

    name = "torch"
    profiles: tuple[OptimizationProfile, ...] = ()

    def __init__(
        self, bundle: Bundle, *, device: str = "cuda", compiled: bool | None = None
    ) -> None:
        super().__init__(device)
        if bundle.manifest.export.attention != "fused":
            raise BackendError(
                f"{bundle.path} has decomposed attention, and the backend torch runs fused "
                "attention only; export it with --attention fused"
            )
        self._bundle = bundle
        self._compiled = self.device.type == "cuda" if compiled is None else compiled
        self._own_stream: Any = None  # captures need one that is not the default
        if self.device.type == "cuda":
            self._own_stream = self._torch.cuda.Stream(self.device)
        self._opening = threading.Lock()
        self._closed = False

    def running(self) -> AbstractContextManager[None]:
        """See :meth:`sdt_deploy.runtime.backend.Backend.running`."""
        return super().running() if self._own_stream is None else self.within(self._own_stream)

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._bundle.manifest.graphs

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        with self._opening:
            if self._closed:
                raise BackendError("the session is closed")
            model = self._model
        spec = self._bundle.manifest.graphs[name]
        if name in (PROJECT, UPDATE):
            function: Function = getattr(model, f"run_{name}")
        elif spec.layers is not None:
            function = _copied(partial(model.run_stage, spec.layers[0]))
        else:
            function = _copied(getattr(model, f"run_{name}"))
        dtypes = {tensor.name: tensor.dtype for tensor in spec.outputs}
        return TorchGraph(self, function, dtypes)

    def layers(self, bundle: Bundle) -> Sequence[Parameters]:
        """See :meth:`DeviceMemory.layers`; all graphs share them."""
        with self._opening:
            return self._model.layers  # type: ignore[no-any-return]

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""
        with self._opening:
            self._closed = True
            self.__dict__.pop("_model", None)

    @functools.cached_property
    def _model(self) -> Any:
        from sdt_deploy.runtime.backends.torch_model import TorchModel, finish_in_place, update
        from sdt_deploy.runtime.device_entry import TorchEntry

        def fused(function: Callable[..., Any]) -> Callable[..., Any]:
            if not self._compiled:
                return function
            return self._torch.compile(_copy_of(function), dynamic=True)  # type: ignore[no-any-return]

        manifest = self._bundle.manifest
        model = TorchModel(
            config=manifest.model,
            dtype=getattr(self._torch, manifest.export.precision),
            entry=TorchEntry(self.parameters(self._bundle, "entry"), manifest.model),
            layers=tuple(super().layers(self._bundle)),
            head=self.parameters(self._bundle, "head"),
            layer=fused(update),
            last=fused(finish_in_place),
        )
        self._bundle.check_current()
        return model


def _copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a code object of its own.

    torch keeps what it compiled by code object, and after eight versions of one it runs the
    function as it is, without an error. So sessions must not share one.
    """
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return functools.update_wrapper(copy, function)


def _copied(function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Function:
    """Return what copies the results of ``function`` to the outputs."""

    def run(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        for name, found in function(inputs).items():
            outputs[name].copy_(found)

    return run
