"""Signatures of what this package uses of TensorRT, read from the real packages.

    python -m tests.runtime.tensorrt_signatures WHEEL... > tests/data/tensorrt-signatures.json

The wheels are those of the bindings alone (``tensorrt-bindings`` 8.6.1, ``tensorrt-cu12-bindings``
10.0.1 and 10.13.3.9, ``tensorrt-cu13-bindings`` 10.14.1.48 and 11.4.0.106, for the Python that runs
this). Their
module says in its docstrings what it takes. It loads without TensorRT's libraries, against empty
ones with the same names that ``gcc`` makes here; no function of them is called. The installed
``tensorrt_rtx`` is read too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

TABLE = Path(__file__).parents[1] / "data" / "tensorrt-signatures.json"
Members = Mapping[str, Mapping[str, Any]]
USED: Mapping[str, tuple[str, ...]] = {
    "ILogger": ("__init__", "log", "Severity"),
    "Runtime": ("__init__", "deserialize_cuda_engine"),
    "ICudaEngine": (
        "num_optimization_profiles",
        "device_memory_size",
        "device_memory_size_v2",
        "get_tensor_profile_shape",
        "create_engine_inspector",
        "create_execution_context",
        "create_execution_context_without_device_memory",
        "get_device_memory_size_for_profile",
        "get_device_memory_size_for_profile_v2",
    ),
    "IExecutionContext": (
        "device_memory",
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    ),
    "EngineInspector": ("get_engine_information",),
    "LayerInformationFormat": ("JSON",),
    "IProgressMonitor": ("__init__", "phase_start", "phase_finish", "step_complete"),
    "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
    "Builder": (
        "__init__",
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "IBuilderConfig": (
        "set_flag",
        "clear_flag",
        "get_flag",
        "set_preview_feature",
        "get_preview_feature",
        "set_quantization_flag",
        "get_quantization_flag",
        "set_memory_pool_limit",
        "get_memory_pool_limit",
        "add_optimization_profile",
        "num_optimization_profiles",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "get_tactic_sources",
        "max_aux_streams",
        "progress_monitor",
        "profiling_verbosity",
        "engine_capability",
        "default_device_type",
        "DLA_core",
        "int8_calibrator",
    ),
    "IOptimizationProfile": ("set_shape", "set_shape_input"),
    "ITimingCache": ("serialize", "combine"),
    "OnnxParser": ("__init__", "parse_from_file", "num_errors", "get_error"),
    "INetworkDefinition": (
        "num_layers",
        "get_layer",
        "__getitem__",
        "num_inputs",
        "get_input",
        "get_flag",
        "add_attention",
    ),
    "ILayer": (
        "name",
        "type",
        "precision",
        "precision_is_set",
        "num_inputs",
        "num_outputs",
        "get_input",
        "get_output",
        "set_output_type",
    ),
    "ITensor": ("name", "dtype", "shape", "is_shape_tensor"),
    "DataType": ("FLOAT", "HALF", "BF16", "INT32", "BOOL"),
    "LayerType": ("CAST", "SHAPE", "CONSTANT", "SHUFFLE", "ELEMENTWISE"),
    "AttentionIOForm": ("__members__",),
    "NetworkDefinitionCreationFlag": ("__members__",),
    "BuilderFlag": ("__members__",),
    "PreviewFeature": ("__members__",),
    "QuantizationFlag": ("__members__",),
    "MemoryPoolType": ("__members__",),
    "TacticSource": ("__members__",),
    "ProfilingVerbosity": ("__members__",),
    "EngineCapability": ("__members__",),
    "DeviceType": ("__members__",),
}
"""Classes and members: what this package uses, and what polygraphy does for it at a build. A
version that lacks one has no entry for it."""
FUNCTIONS = ("init_libnvinfer_plugins",)
"""Of the module itself, under the name ``module``."""


def members(module: ModuleType) -> dict[str, dict[str, Any]]:
    """Describe the members of :data:`USED` that ``module`` has.

    Methods are lists of overloads, each a list of parameters ``[name, type, has a default]``
    without ``self``; properties are ``read`` or ``write``; the members of an enumeration have their
    numbers; all else is ``constant``.
    """
    functions = {name: overloads(getattr(module, name).__doc__ or "", name) for name in FUNCTIONS}
    found: dict[str, dict[str, Any]] = {"module": functions}
    for owner, names in USED.items():
        cls = getattr(module, owner, None)
        if cls is not None:
            found[owner] = {n: member(cls, n) for n in names if n in vars(cls)}
    return found


def member(cls: type, name: str) -> Any:
    """Describe one member."""
    value = vars(cls)[name]
    if name == "__members__":
        return {key: int(each) for key, each in cls.__members__.items()}  # type: ignore[attr-defined]
    if isinstance(value, property):
        return "read" if value.fset is None else "write"
    if not callable(value) or isinstance(value, type):
        return "constant"
    return overloads(value.__doc__ or "", name)


def overloads(documented: str, name: str) -> list[list[list[Any]]]:
    """Read a docstring of pybind11."""
    lines = re.findall(
        rf"^(?:\d+\. )?{name}\(((?:self|logger): .*)\) -> ", documented, re.MULTILINE
    )
    assert lines, f"{name} documents no signature"
    parameters = [re.split(r", (?=\w+: )", each) for each in lines]
    return [[parameter(x) for x in each if not x.startswith("self: ")] for each in parameters]


def parameter(text: str) -> list[Any]:
    """Read ``name: module.Type = default``."""
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(": ")
    return [name, re.sub(r"[\w.:]*[.:](?=\w)", "", kind), bool(default)]


def of_wheel(wheel: Path) -> dict[str, dict[str, Any]]:
    """Describe the module in a wheel, in a process that has empty libraries for it."""
    with tempfile.TemporaryDirectory() as directory:
        zipfile.ZipFile(wheel).extractall(directory)
        (module,) = Path(directory).glob("*/tensorrt.so")
        header = run("readelf", "-d", module)
        symbols = run("nm", "-D", "--undefined-only", module)
        absent = re.findall(r" U (\w*(?:INTERNAL|[Nn]v|PluginRegistry)\w*)$", symbols, re.MULTILINE)
        source = Path(directory) / "empty.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in absent))
        for library in re.findall(r"NEEDED.*\[(libnv[^\]]*)\]", header):
            target = Path(directory) / library
            run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", target, source)
        environment = {**os.environ, "LD_LIBRARY_PATH": directory}
        command = [sys.executable, "-m", __spec__.name, "--module", str(module)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True)
    return dict(json.loads(done.stdout))


def run(*command: str | Path) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return done.stdout.decode()


def of_module(path: str) -> dict[str, dict[str, Any]]:
    """Describe a compiled module."""
    spec = importlib.util.spec_from_file_location("tensorrt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return members(module)


def main() -> None:
    """Print the table."""
    if sys.argv[1] == "--module":
        sys.stdout.write(json.dumps(of_module(sys.argv[2])))
        return
    table = {}
    for path in map(Path, sys.argv[1:]):
        distribution, number = path.name.split("-")[:2]
        name = ".".join(number.split(".")[:2])
        source = f"{distribution.replace('_', '-')} {number} from PyPI"
        table[name] = {"source": source, "members": of_wheel(path)}
    import tensorrt_rtx

    table["rtx"] = {
        "source": f"tensorrt-rtx {version('tensorrt-rtx')} from PyPI",
        "members": members(tensorrt_rtx),
    }
    text = json.dumps(table, indent=1)  # a signature on one line
    sys.stdout.write(re.sub(r"\n {5,}|\n {4}(?=[\]}])", " ", text) + "\n")


if __name__ == "__main__":
    main()
