"""TensorRT libraries that compute with ONNX Runtime, to test the backend where there is no GPU.

They take addresses, keep one profile for each context, and log why they refuse, as the real ones
do. What they offer is seen through :class:`Checked` only: the members that the version really has,
called with what it really takes, by the signatures in ``tests/data/tensorrt-signatures.json``.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import json
import operator
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdt_deploy.ort import open_session
from tests.runtime.tensorrt_signatures import TABLE

SIGNATURES: dict[str, Any] = json.loads(TABLE.read_text())
"""By version, see :mod:`tests.runtime.tensorrt_signatures`."""
VERSIONS = {
    "8.6": "8.6.1",
    "10.0": "10.0.1",
    "10.13": "10.13.3.9",
    "10.14": "10.14.1.48",
    "11.4": "11.4.0.106",
}
"""Those that there are fakes of, with the whole number."""


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4


DTYPES = {
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
}


def _is_integer(value: object) -> bool:
    if isinstance(value, bool | float):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) <= 8 and all(map(_is_integer, value))


def _is_named(enumeration: str) -> Callable[[Any], bool]:
    return lambda value: type(value).__name__ == enumeration and isinstance(value, enum.IntEnum)


def _is_checked(owner: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Checked) and type(value.fake()).__name__ == owner


ENUMERATIONS = (
    "BuilderFlag",
    "PreviewFeature",
    "QuantizationFlag",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
)
OWNERS = "INetworkDefinition", "IBuilderConfig", "IOptimizationProfile", "ITimingCache"

ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_integer,
    "SupportsInt": _is_integer,
    "tuple": lambda value: isinstance(value, tuple) and _is_shape(value),
    "list": lambda value: isinstance(value, list) and _is_shape(value),
    "Dims": _is_shape,
    "buffer": lambda value: isinstance(value, bytes | bytearray | memoryview),
    "Buffer": lambda value: isinstance(value, bytes | bytearray | memoryview),
    # pybind11 raises where a subclass forgot to call its base's __init__.
    "ILogger": lambda value: isinstance(value, ILogger) and value.initialised,
    "ExecutionContextAllocationStrategy": lambda value: isinstance(value, Strategy),
    "LayerInformationFormat": lambda value: isinstance(value, LayerInformationFormat),
    "DataType": lambda value: isinstance(value, DataType),
    "bool": lambda value: isinstance(value, bool),
    # An ILogger is handed over as a capsule, by pybind11 itself.
    "capsule": lambda value: isinstance(value, ILogger) and value.initialised,
    "CapsuleType": lambda value: isinstance(value, ILogger) and value.initialised,
    **{name: _is_named(name) for name in ENUMERATIONS},
    **{name: _is_checked(name) for name in OWNERS},
    "object": lambda value: False,
    "IRuntimeConfig": lambda value: False,
    "IStreamReader": lambda value: False,
    "IStreamReaderV2": lambda value: False,
}
"""What is accepted for a parameter of a type; this package makes no object of the last ones."""


def accepted(
    overloads: Sequence[Sequence[Any]], args: Sequence[Any], named: dict[str, Any]
) -> bool:
    """Tell whether an overload takes these arguments, as pybind11 would."""
    for parameters in overloads:
        names = [name for name, _, _ in parameters]
        given = {**dict(zip(names, args, strict=False)), **named}
        if (
            len(args) <= len(names)
            and len(given) == len(args) + len(named)
            and set(given) <= set(names)
            and all(name in given or optional for name, _, optional in parameters)
            and all(ACCEPTS[kind](given[name]) for name, kind, _ in parameters if name in given)
        ):
            return True
    return False


class Checked:
    """An object of the fakes, with the members and the signatures of the real one."""

    def __init__(self, fake: Any, version: str) -> None:
        owner = type(fake).__name__
        object.__setattr__(self, "_fake", fake)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_version", version)
        object.__setattr__(self, "_members", SIGNATURES[version]["members"][owner])

    def fake(self) -> Any:
        """Return what is behind it; for other fakes."""
        return self._fake

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> Any:
        return self.__getattr__("__getitem__")(index)

    def _member(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"{self._owner} of TensorRT {self._version} has no {name}")
        return self._members[name]

    def __getattr__(self, name: str) -> Any:
        member, found = self._member(name), getattr(self._fake, name)
        if not isinstance(member, list):
            return found

        def call(*args: Any, **named: Any) -> Any:
            if not accepted(member, args, named):
                raise TypeError(f"{name}: {args} {named} are not {member}")
            return found(*args, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        assert self._member(name) == "write", name
        before = getattr(self._fake, name)
        if isinstance(before, enum.Enum):
            assert type(value) is type(before), (name, value)
        elif isinstance(before, int):
            assert _is_integer(value), (name, value)
        setattr(self._fake, name, value)


class FakeLibrary:
    """Stands for the module ``tensorrt`` of a version in :data:`SIGNATURES`.

    Every engine's ``scratch`` is the memory it asks for; ``calls`` lists what was enqueued, as
    ``(graph, profile, stream)``; a graph named in ``failing`` cannot be enqueued, and calls named
    in ``refusing`` fail.
    """

    ILogger = ILogger
    LayerInformationFormat = LayerInformationFormat

    def __init__(self, version: str) -> None:
        self.version = version
        self.calls: list[tuple[str, int, int]] = []
        self.contexts: list[IExecutionContext] = []
        self.failing: set[str] = set()
        self.refusing: set[str] = set()
        if "ExecutionContextAllocationStrategy" in SIGNATURES[version]["members"]:
            self.ExecutionContextAllocationStrategy = Strategy

    def checked(self, fake: Any) -> Any:
        return Checked(fake, self.version)

    def Runtime(self, logger: ILogger) -> Any:  # noqa: N802
        assert accepted(SIGNATURES[self.version]["members"]["Runtime"]["__init__"], [logger], {})
        return self.checked(Runtime(self, logger))


class Runtime:
    def __init__(self, library: FakeLibrary, logger: ILogger) -> None:
        self.library = library
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        content = json.loads(serialized_engine)
        if content["version"] != self.library.version:
            self.logger.log(Severity.ERROR, "the engine is of another version")
            return None
        return self.library.checked(ICudaEngine(self.library, self.logger, content))


class ICudaEngine:
    def __init__(self, library: FakeLibrary, logger: ILogger, content: Any) -> None:
        self.library = library
        self.logger = logger
        self.graph = content["graph"]
        self.profiles = content["profiles"]
        self.session = _opened(content)
        self.scratch = self.device_memory_size = 1000

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def create_engine_inspector(self) -> Any:
        return self.library.checked(EngineInspector(self))

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self.scratch + profile_index

    get_device_memory_size_for_profile_v2 = get_device_memory_size_for_profile

    def create_execution_context(self, strategy: Strategy = Strategy.STATIC) -> Any:
        assert strategy is Strategy.USER_MANAGED, "it would take scratch memory of its own"
        return self.create_execution_context_without_device_memory()

    def create_execution_context_without_device_memory(self) -> Any:
        if "create_execution_context" in self.library.refusing:
            self.logger.log(Severity.ERROR, "out of luck")
            return None
        context = IExecutionContext(self)
        self.library.contexts.append(context)
        return self.library.checked(context)


class EngineInspector:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        """Names where nothing else is asked of the build, or objects (``DETAILED``)."""
        assert format is LayerInformationFormat.JSON
        named = ["query + key + value", {"Name": "x" * 1000, "LayerType": "gemm"}]
        return json.dumps({"Layers": named, "Bindings": self.engine.graph})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.library = engine.library
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
        if "set_optimization_profile_async" in self.library.refusing:
            return self._refuse("out of luck")
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
        if "set_tensor_address" in self.library.refusing:
            return self._refuse("out of luck")
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
            dtype = np.dtype(DTYPES[item.type])
            feeds[item.name] = _view(self.addresses[item.name], self.shapes[item.name], dtype)
        names = [item.name for item in session.get_outputs()]
        for name, found in zip(names, session.run(names, feeds), strict=True):
            _view(self.addresses[name], found.shape, found.dtype)[...] = found
        assert self.profile is not None
        self.library.calls.append((graph, self.profile, stream_handle))
        return True


class ReferenceSession:
    """A graph that ONNX Runtime does not compute, with masks to broadcast or ragged attention."""

    def __init__(self, proto: Any) -> None:
        from onnx import TensorProto
        from onnx.reference import ReferenceEvaluator

        from tests.runtime.ragged import TRT_Attention

        self._evaluator = ReferenceEvaluator(proto, new_ops=[TRT_Attention])
        self._inputs = [
            SimpleNamespace(
                name=each.name,
                type=f"tensor({TensorProto.DataType.Name(each.type.tensor_type.elem_type).lower()})",
            )
            for each in proto.graph.input
        ]

    def get_inputs(self) -> list[Any]:
        return self._inputs

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self._evaluator.output_names]

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        return list(self._evaluator.run(names, feeds))


def _opened(content: Any) -> Any:
    """Open the graph of an engine: a file, or what a fake of the builder put into it."""
    if "onnx" in content:
        return open_session(Path(content["onnx"]))
    import onnx

    proto = onnx.load_from_string(base64.b64decode(content["model"]))
    if any(node.op_type.endswith("Attention") for node in proto.graph.node):
        return ReferenceSession(proto)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        path.write_bytes(base64.b64decode(content["model"]))
        return open_session(path)


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_char * n_bytes).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
