"""TensorRT libraries that compute with ONNX Runtime, to test the backend where there is no GPU.

They take addresses, keep one profile for each context, and log why they refuse, as the real ones
do. :data:`METHODS` says which version has which method with which parameters;
``test_fakes_have_real_signatures`` compares that with the real library that is installed.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdt_deploy.ort import open_session

METHODS: Mapping[str, Mapping[str, tuple[frozenset[str], tuple[str, ...]]]] = {
    "Runtime": {
        "deserialize_cuda_engine": (frozenset({"8.6", "10", "11"}), ("serialized_engine",)),
    },
    "ICudaEngine": {
        "get_tensor_profile_shape": (frozenset({"8.6", "10", "11"}), ("name", "profile_index")),
        "create_execution_context": (frozenset({"10", "11"}), ("strategy",)),
        # 8.6: NvInferRuntime.h, ICudaEngine::createExecutionContextWithoutDeviceMemory
        "create_execution_context_without_device_memory": (frozenset({"8.6"}), ()),
        "get_device_memory_size_for_profile": (frozenset({"10"}), ("profile_index",)),
        "get_device_memory_size_for_profile_v2": (frozenset({"10", "11"}), ("profile_index",)),
    },
    "IExecutionContext": {
        "set_input_shape": (frozenset({"8.6", "10", "11"}), ("name", "shape")),
        "set_tensor_address": (frozenset({"8.6", "10", "11"}), ("name", "memory")),
        "set_optimization_profile_async": (
            frozenset({"8.6", "10", "11"}),
            ("profile_index", "stream_handle"),
        ),
        "set_device_memory": (frozenset({"10", "11"}), ("memory", "size")),
        "execute_async_v3": (frozenset({"8.6", "10", "11"}), ("stream_handle",)),
    },
}
"""For each class and method, the versions that have it and its parameters after ``self``."""


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class _Versioned:
    """Has those of its methods that its version has."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library

    def __getattribute__(self, name: str) -> Any:
        known = METHODS.get(type(self).__name__, {})
        if name in known and self.library.version not in known[name][0]:
            raise AttributeError(name)
        return super().__getattribute__(name)


class FakeLibrary:
    """Stands for the module ``tensorrt`` of version ``8.6``, ``10`` or ``11``.

    Every engine's ``scratch`` is the memory it asks for; ``calls`` lists what was enqueued, as
    ``(graph, profile, stream)``; a graph named in ``failing`` cannot be enqueued.
    """

    ILogger = ILogger

    def __init__(self, version: str) -> None:
        self.version = version
        self.calls: list[tuple[str, int, int]] = []
        self.contexts: list[IExecutionContext] = []
        self.failing: set[str] = set()
        if version != "8.6":
            self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")

    def Runtime(self, logger: ILogger) -> Runtime:  # noqa: N802
        return Runtime(self, logger)


class Runtime(_Versioned):
    def __init__(self, library: FakeLibrary, logger: ILogger) -> None:
        super().__init__(library)
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        content = json.loads(serialized_engine)
        if content["version"] != self.library.version:
            self.logger.log(Severity.ERROR, "the engine is of another version")
            return None
        return ICudaEngine(self.library, self.logger, content)


class ICudaEngine(_Versioned):
    def __init__(self, library: FakeLibrary, logger: ILogger, content: Any) -> None:
        super().__init__(library)
        self.logger = logger
        self.graph = content["graph"]
        self.profiles = content["profiles"]
        self.session = open_session(Path(content["onnx"]))
        self.scratch = 1000
        if library.version == "8.6":
            self.device_memory_size = self.scratch

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.scratch + profile_index

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    def create_execution_context(self, strategy: object) -> IExecutionContext:
        assert strategy == "USER_MANAGED"
        return self._context()

    def create_execution_context_without_device_memory(self) -> IExecutionContext:
        return self._context()

    def _context(self) -> IExecutionContext:
        context = IExecutionContext(self)
        self.library.contexts.append(context)
        return context


class IExecutionContext(_Versioned):
    def __init__(self, engine: ICudaEngine) -> None:
        super().__init__(engine.library)
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.device_memory = 0

    def _refuse(self, why: str) -> bool:
        self.engine.logger.log(Severity.ERROR, why)
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert self.profile is None, "a context keeps its profile"
        self.profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        inside = len(shape) == len(low) and all(
            a <= b <= c for a, b, c in zip(low, shape, high, strict=True)
        )
        self.shapes[name] = shape
        return inside or self._refuse(f"{name}: {shape} is outside the profile")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.profile is not None
        assert size >= self.engine.scratch + self.profile
        self.device_memory = memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.device_memory, "no scratch memory was set"
        session, graph = self.engine.session, self.engine.graph
        if graph in self.library.failing:
            return self._refuse(f"{graph}: out of luck")
        feeds = {}
        for item in session.get_inputs():
            dtype = np.dtype("int32" if "int32" in item.type else "float32")
            feeds[item.name] = _view(self.addresses[item.name], self.shapes[item.name], dtype)
        names = [item.name for item in session.get_outputs()]
        for name, found in zip(names, session.run(names, feeds), strict=True):
            _view(self.addresses[name], found.shape, found.dtype)[...] = found
        assert self.profile is not None
        self.library.calls.append((graph, self.profile, stream_handle))
        return True


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_char * n_bytes).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
