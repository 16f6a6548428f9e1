"""TensorRT and TensorRT-RTX: engines that ``sdt-deploy build-engine`` put into the bundle."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from sdt_deploy import trt
from sdt_deploy.buckets import Shapes, fitting_profile
from sdt_deploy.bundle import Bundle, GraphSpec
from sdt_deploy.engines import EngineSet, build_command, read_engine
from sdt_deploy.errors import BackendError
from sdt_deploy.gpu import driver
from sdt_deploy.runtime.backend import Array, Call, Graph
from sdt_deploy.runtime.backends.device import DeviceMemory


class TensorRtGraph:
    """One engine. Its execution contexts each hold one profile and serve one stream."""

    def __init__(self, spec: GraphSpec, engine: Any, backend: TensorRtBackend) -> None:
        self._spec = spec
        self._engine = engine
        self._backend = backend
        self._dtypes = {tensor.name: tensor.dtype for tensor in spec.outputs}
        self._profiles: list[Mapping[str, Shapes]] = [
            {tensor.name: trt.profile_shapes(engine, tensor.name, number) for tensor in spec.inputs}
            for number in range(engine.num_optimization_profiles)
        ]
        self._idle: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
        self._lock = threading.Lock()

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`.

        The call enqueues on the caller's current stream. It waits for the GPU only if outputs are
        NumPy arrays.
        """
        backend, name = self._backend, self._spec.name
        there, results, fetch = backend.on_device(inputs, outputs, self._dtypes)
        shapes = {tensor: tuple(array.shape) for tensor, array in there.items()}
        number = fitting_profile(self._profiles, shapes)
        if number is None:
            raise BackendError(
                f"the engine of {name} has no profile for {shapes}; its profiles are "
                f"{self._profiles}. Build it for larger batches (build-engine --max-batch, "
                "--max-seqlen, --max-padded-tokens) or run smaller ones"
            )
        profile = number

        def call() -> None:
            stream = backend.stream
            context = self._borrow(profile, stream)
            try:
                for tensor, shape in shapes.items():
                    if not context.set_input_shape(tensor, shape):
                        raise BackendError(backend.failure(f"{name} refused {tensor} {shape}"))
                for tensor, array in (*there.items(), *results.items()):
                    if not context.set_tensor_address(tensor, array.data_ptr()):
                        raise BackendError(
                            backend.failure(f"{name} refused the address of {tensor}")
                        )
                scratch = backend.scratch(trt.scratch_bytes(self._engine, profile), stream)
                trt.set_scratch(context, scratch.data_ptr(), scratch.numel())
                if not context.execute_async_v3(stream):
                    raise BackendError(backend.failure(f"{name} could not be enqueued"))
            finally:
                with self._lock:
                    self._idle[profile, stream].append(context)
            fetch()

        return call

    def _borrow(self, profile: int, stream: int) -> Any:
        """Return a context that only earlier work of the same stream may still be using."""
        with self._lock:
            idle = self._idle[profile, stream]
            if idle:
                return idle.pop()
        context = trt.create_context(self._backend.library, self._engine)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise BackendError(
                self._backend.failure(f"{self._spec.name} gave no context for profile {profile}")
            )
        return context


class TensorRtBackend(DeviceMemory):
    """Runs the engines of a bundle.

    Engines are read when they are first needed, after their SHA-256 was compared. All of them share
    one block of scratch memory per stream, as they run one after the other.

    Args:
        bundle: the opened bundle.
        flavour: ``tensorrt`` or ``tensorrt-rtx``.
        device: see :class:`DeviceMemory`; of GPUs, the first one.

    Raises:
        BackendError: if the bundle has no engines of this flavour for this GPU and version, or for
            another GPU than the first.
        MissingExtraError: if the library or torch is not installed.
    """

    captures = False  # several graphs replayed from one context: not proven to be right

    def __init__(self, bundle: Bundle, flavour: str, *, device: str = "cuda") -> None:
        chosen = trt.flavour(flavour)
        self.name: str = chosen.name
        self._engines = find_engines(bundle, chosen)
        super().__init__(device)
        if self.device.index:
            raise BackendError(
                f"engines run on the first GPU that is visible, not on {device}: set "
                f"CUDA_VISIBLE_DEVICES={self.device.index} and open the session on cuda"
            )
        self.library = trt.load(chosen)
        self.profiles = self._engines.profiles
        self._bundle = bundle
        self._logger = trt.logger(self.library)
        self._runtime: Any = self.library.Runtime(self._logger)
        self._graphs: dict[str, TensorRtGraph] = {}
        self._scratch: dict[int, Array] = {}
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        """See :meth:`sdt_deploy.runtime.backend.Backend.has`."""
        return name in self._engines.engines

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        with self._lock:
            if self._runtime is None:
                raise BackendError("the session is closed")
            if name not in self._graphs:
                spec = self._engines.engines.get(name)
                if spec is None:
                    raise BackendError(
                        f"{self._bundle.path} has no engine of {name} among its engines "
                        f"{self._engines.name}; build it: "
                        f"{build_command(self._bundle.path, self._engines, (name,))}"
                    )
                content = read_engine(self._bundle.path, spec)
                engine = self._runtime.deserialize_cuda_engine(content)
                if engine is None:
                    raise BackendError(self.failure(f"{spec.file} could not be loaded"))
                graph = self._bundle.manifest.graphs[name]
                self._graphs[name] = TensorRtGraph(graph, engine, self)
            return self._graphs[name]

    def scratch(self, n_bytes: int, stream: int) -> Array:
        """Return a block of at least ``n_bytes`` for work on ``stream``.

        Blocks and contexts of a stream are kept until the session is closed: use few streams.
        """
        block = self._scratch.get(stream)
        if block is None or block.numel() < n_bytes:
            block = self._scratch[stream] = self.empty((max(n_bytes, 1),), "uint8")
        return block

    def failure(self, what: str) -> str:
        """See :class:`DeviceMemory`: the last errors that the library logged."""
        lines = self._logger.take()
        return "\n".join([f"{self.name}: {what}", *lines])

    def close(self) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.close`."""
        with self._lock:
            self._graphs.clear()
            self._scratch.clear()
            self._runtime = None


def find_engines(bundle: Bundle, flavour: trt.Flavour) -> EngineSet:
    """Return the engines of a bundle that run here.

    Raises:
        BackendError: if there are none: which GPU and version they were built for, and what to do.
        MissingExtraError: if the flavour's library is not installed.
    """
    found = [each for each in bundle.manifest.engines if each.flavour == flavour.name]
    build = f"sdt-deploy build-engine {bundle.path} --target {flavour.name}"
    if not found:
        raise BackendError(f"{bundle.path} has no {flavour.name} engines; build them: {build}")
    version = trt.checked_version(flavour)
    here = driver()
    if here.problem is not None:
        raise BackendError(f"{flavour.name} engines need a GPU: {here.problem}")
    gpu = here.gpus[0]
    fitting = [each for each in found if gpu.compute_capability in each.compute_capabilities]
    for engines in fitting:
        if engines.version == version:
            return engines
    theirs = ", ".join(f"{each.name} by version {each.version}" for each in found)
    built = f"the {flavour.name} engines of {bundle.path} were built for other GPUs"
    advice = f"build for this one: {build}"
    if fitting:
        built = f"the {flavour.name} engines of {bundle.path} were built by another version"
        advice = f"build them again: {build_command(bundle.path, fitting[0])}"
    supported = flavour.compute_capabilities
    if supported is not None and gpu.compute_capability not in supported:
        advice = f"{flavour.name} does not run on it at all; use {flavour.alternative}"
    raise BackendError(
        f"{built} ({theirs}). Here are {gpu.name}, of compute capability "
        f"{gpu.compute_capability}, and version {version}: {advice}"
    )
