"""TensorRT's builder, as far as polygraphy calls it, for versions that are not here.

The real worker and the real polygraphy run with it; ``fakes/`` is on the path of their process. As
in :mod:`tests.runtime.fake_tensorrt`, objects have the members of the real ones, called with what
these take. Parsers drop what they ignore and know no operators of later versions, by the facts in
``docs/decisions/010-engines.md``.

An engine is JSON: what was asked of the builder, under ``asked``, and the graph as the parser got
it, which :class:`tests.runtime.fake_tensorrt.ICudaEngine` computes.
"""

from __future__ import annotations

import base64
import enum
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

from sdt_deploy.exporters.engine_graphs import value_types
from tests.exporters import fake_network
from tests.exporters.fake_network import ITensor, LayerType
from tests.runtime.fake_tensorrt import (
    SIGNATURES,
    VERSIONS,
    Checked,
    DataType,
    FakeLibrary,
    Severity,
    accepted,
)

FAILING = "FAKE_TENSORRT_FAILING"
"""Environment variable: names of graphs that cannot be built."""
CRASHING = "FAKE_TENSORRT_CRASHING"
"""Likewise of graphs that end the process."""
_LENGTHS = 6
"""Place of the key lengths among the inputs of ``Attention``."""


class BuildingLibrary(FakeLibrary):
    """Stands for the module ``tensorrt`` of a version in :data:`VERSIONS`, builder included."""

    Logger = Severity
    DataType = DataType
    LayerType = LayerType

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.number = VERSIONS[version]
        self.numbers = tuple(int(part) for part in self.number.split(".")[:2])
        for owner, members in SIGNATURES[version]["members"].items():
            if "__members__" in members:
                setattr(self, owner, enum.IntEnum(owner, members["__members__"]))
        if "IProgressMonitor" in SIGNATURES[version]["members"]:
            self.IProgressMonitor = IProgressMonitor

    def _made(self, owner: str, *args: Any) -> None:
        signature = SIGNATURES[self.version]["members"][owner]["__init__"]
        assert accepted(signature, args, {}), (owner, args)

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        self._made("Builder", logger)
        return self.checked(Builder(self, logger))

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        self._made("OnnxParser", network, logger)
        return self.checked(OnnxParser(self, network))

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        signature = SIGNATURES[self.version]["members"]["module"]["init_libnvinfer_plugins"]
        assert accepted(signature, [logger, namespace], {})
        return True


class IProgressMonitor:
    def __init__(self) -> None:
        self.initialised = True


class INetworkDefinition(fake_network.INetworkDefinition):
    def __init__(self, library: BuildingLibrary, flags: int) -> None:
        super().__init__([], library.version)
        self.flags = flags
        self.inputs: list[ITensor] = []
        self.proto: onnx.ModelProto | None = None
        self.graph = ""

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return Checked(self.inputs[index], self.version)

    def get_flag(self, flag: int) -> bool:
        return bool(self.flags >> flag & 1)


class ParserError:
    def __init__(self, desc: str, node: onnx.NodeProto | None = None) -> None:
        self.text = desc if node is None else f"In node 0 with name: {node.name}. {desc}"

    def __str__(self) -> str:
        return self.text


class OnnxParser:
    def __init__(self, library: BuildingLibrary, network: Any) -> None:
        self.library = library
        self.network: INetworkDefinition = network.fake()
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, model: str) -> bool:
        proto, number = _loaded(Path(model)), self.library.numbers
        for node in proto.graph.node:
            self._read(node, number)
        self.errors += [
            ParserError(f"{self.library.number} reads opset 17, not {each.version}")
            for each in proto.opset_import
            if number < (10,) and not each.domain and each.version > 17
        ]
        if self.errors:
            return False
        network, types = self.network, value_types(proto)
        network.proto, network.graph = proto, Path(model).stem
        for value in proto.graph.input:
            shape = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
            network.inputs.append(ITensor(value.name, fake_network.TYPES[types[value.name]], shape))
        if number < (10,):  # which alone is told about layers
            network.layers = fake_network.parsed(proto, types, network.version).layers
        return True

    def _read(self, node: onnx.NodeProto, number: tuple[int, ...]) -> None:
        """Change a node as the parser misreads it, or say why it cannot be read."""
        members = SIGNATURES[self.library.version]["members"]
        known = {
            "Attention": "add_attention" in members["INetworkDefinition"],
            "TRT_Attention": "AttentionIOForm" in members,
        }
        if not known.get(node.op_type, not node.domain):
            self.errors.append(ParserError(f"no importer for {node.op_type}", node))
        if node.op_type == "Attention":
            del node.input[_LENGTHS:]  # "Unused Input"
        if number < (10,):
            if node.op_type == "Shape":
                del node.attribute[:]
            if node.op_type == "ReduceMax":
                del node.input[1:]


def _loaded(path: Path) -> onnx.ModelProto:
    """Load a graph whose weights file is a hard link, which onnx does not follow."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        where = {each.key: each.value for each in tensor.external_data}
        if where:
            content = path.with_name(where["location"]).read_bytes()[int(where["offset"]) :]
            tensor.raw_data = content[: int(where["length"])]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return proto


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [[int(size) for size in shape] for shape in (min, opt, max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        return True

    def serialize(self) -> Any:
        return HostMemory(self.content + b"+")


class HostMemory(bytes):
    def __enter__(self) -> HostMemory:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class IBuilderConfig:
    def __init__(self, library: BuildingLibrary) -> None:
        self.library: Any = library
        self.flags = {library.BuilderFlag.TF32}  # type: ignore[attr-defined]
        self.preview: set[Any] = set()
        self.pools: dict[Any, int] = {}
        self.profiles: list[Any] = []
        self.timing_cache: Any = None
        self.max_aux_streams = -1  # its own choice
        self.progress_monitor: Any = None
        self.profiling_verbosity = self.library.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.engine_capability = self.library.EngineCapability.STANDARD
        self.default_device_type = self.library.DeviceType.GPU
        self.DLA_core = -1
        self.int8_calibrator = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self.flags

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self.preview.add if enable else self.preview.discard)(feature)

    def get_preview_feature(self, feature: Any) -> bool:
        return feature in self.preview

    def get_quantization_flag(self, flag: Any) -> bool:
        return False

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self.pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self.pools.get(pool, 0)

    def get_tactic_sources(self) -> int:
        return 0

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.fake().shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        return self.library.checked(ITimingCache(bytes(serialized_timing_cache)))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timing_cache


class Builder:
    def __init__(self, library: BuildingLibrary, logger: Any) -> None:
        self.library: Any = library
        self.logger = logger

    def create_network(self, flags: int = 0) -> Any:
        return self.library.checked(INetworkDefinition(self.library, flags))

    def create_builder_config(self) -> Any:
        return self.library.checked(IBuilderConfig(self.library))

    def create_optimization_profile(self) -> Any:
        return self.library.checked(IOptimizationProfile())

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        """Build, unless something is wrong: then it logs that and gives nothing."""
        network, config = network.fake(), config.fake()
        problem = self._problem(network, config) or self._stopped(config)
        if problem:
            self.logger.log(Severity.ERROR, problem)
            return None
        named = {
            "flags": config.flags,
            "network_flags": [
                flag
                for flag in self.library.NetworkDefinitionCreationFlag
                if network.get_flag(flag)
            ],
            "preview_features": config.preview,
        }
        asked: dict[str, Any] = {
            name: sorted(each.name for each in flags) for name, flags in named.items()
        }
        asked["pools"] = {pool.name: size for pool, size in config.pools.items()}
        asked["max_aux_streams"] = config.max_aux_streams
        asked["timing_cache"] = config.timing_cache.fake().content.decode()
        asked["layers_held"] = sum(layer.asked is not None for layer in network.layers)
        content = {
            "version": self.library.version,
            "graph": network.graph,
            "model": base64.b64encode(network.proto.SerializeToString()).decode(),
            "profiles": config.profiles,
            "asked": asked,
        }
        return HostMemory(json.dumps(content).encode())

    def _problem(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        flags = self.library.NetworkDefinitionCreationFlag
        if self.library.numbers < (10,) and not network.get_flag(flags.EXPLICIT_BATCH):
            return "networks without EXPLICIT_BATCH are not supported by the parser"
        typed = hasattr(flags, "STRONGLY_TYPED") and network.get_flag(flags.STRONGLY_TYPED)
        if typed and {flag.name for flag in config.flags} & {"FP16", "BF16"}:
            return "precision flags cannot be set for a strongly typed network"
        if network.graph in os.environ.get(CRASHING, "").split():
            os.kill(os.getpid(), signal.SIGSEGV)
        if network.graph in os.environ.get(FAILING, "").split():
            return f"Error Code 10: Could not find any implementation for {self._named(network)}."
        if not config.profiles:
            return "Network has dynamic inputs, but no optimization profile has been defined"
        for shapes in config.profiles:
            for tensor in network.inputs:
                low, best, high = shapes[tensor.name]
                sizes = zip(tensor.shape, low, best, high, strict=True)
                if not all(a <= b <= c and n in (-1, a) for n, a, b, c in sizes):
                    return f"{tensor.name}: {low} {best} {high} do not fit {tensor.shape}"
        return None

    def _named(self, network: INetworkDefinition) -> str:
        """Name two nodes as a fused one."""
        assert network.proto is not None
        nodes = network.proto.graph.node
        return f"node {{ForeignNode[{nodes[0].name}...{nodes[-1].name}]}}"

    def _stopped(self, config: IBuilderConfig) -> str | None:
        monitor = config.progress_monitor
        if monitor is None:
            return None
        assert monitor.initialised
        monitor.phase_start("Building Engine", None, 2)
        going_on = all(monitor.step_complete("Building Engine", step) for step in range(2))
        monitor.phase_finish("Building Engine")
        return None if going_on else "the build was cancelled"


def built(content: bytes) -> SimpleNamespace:
    """Return what a builder was asked for, from the bytes of an engine."""
    return SimpleNamespace(**json.loads(content)["asked"])


def graph_of(content: bytes) -> bytes:
    """Return the graph that an engine was built from, as the parser got it."""
    return base64.b64decode(json.loads(content)["model"])
