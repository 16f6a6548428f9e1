"""The one place that knows TensorRT's flavours and versions.

Builder and runtime both ask here what a library can do and how it is called; all else is the same
for TensorRT 8.6, 10 and 11 and for TensorRT-RTX. Facts are from the headers and release notes of
each version, and for TensorRT-RTX 1.7 from experiments (``docs/decisions/010-engines.md``).
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sdt_deploy.buckets import Shapes
from sdt_deploy.config import EngineFlavour, Precision
from sdt_deploy.errors import BackendError, ConfigError
from sdt_deploy.extras import require

MAX_LAYER_NAME = 200
FUSED_SINCE = (10, 14)
"""The first version of ``tensorrt`` with attention layers, by its bindings."""
PACKED_SINCE = (11, 1)
"""The first with the ``TRT_Attention`` that graphs are written for. 11.0 has ragged attention too,
but the order of the operator's inputs differs between versions."""


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of NVIDIA's two libraries."""

    name: EngineFlavour
    module: str
    distributions: tuple[str, ...]
    """Packages that carry it, the first being the one to install."""
    oldest: tuple[int, ...]
    builds_for_other_gpus: bool
    """Whether an engine can be built for a GPU that is not here."""
    compute_capabilities: tuple[str, ...] | None
    """GPUs that its engines run on; None: all that the installed version supports."""
    limited: Mapping[str, tuple[Precision, ...]] = field(default_factory=dict)
    """By compute capability: the only precisions that stages can be built in for it."""
    polygraphy_rtx: bool = False
    """Which of the two polygraphy is to load."""
    alternative: EngineFlavour | None = None
    """What to take on GPUs that it does not run on."""


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt": Flavour(
        name="tensorrt",
        module="tensorrt",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        oldest=(8, 6),
        builds_for_other_gpus=False,
        compute_capabilities=None,
    ),
    "tensorrt-rtx": Flavour(
        name="tensorrt-rtx",
        module="tensorrt_rtx",
        distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
        oldest=(1, 7),
        builds_for_other_gpus=True,
        compute_capabilities=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        limited={"7.5": ("float16",)},  # 1.7.1: "FP32 GEMM is not supported", no bfloat16 either
        polygraphy_rtx=True,
        alternative="tensorrt",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one version of a flavour can do."""

    legacy: bool
    """Whether it is 8.6, the only one without strong types: builder flags allow narrow ones, and
    layers are held to float32. Its parser reads opset 17, and misreads more; contexts share a
    profile only if it is asked for."""
    precisions: tuple[Precision, ...]
    timing_cache: bool
    """Whether a timing cache has an effect."""
    pins_times: bool
    """Whether a build can be held to the times that such a cache has."""
    fused_attention: bool
    """Whether ONNX's ``Attention`` can be built."""
    packed_attention: bool
    """Whether attention takes ragged batches (``AttentionIOForm.PACKED_NHD``)."""


def flavour(name: str) -> Flavour:
    """Return a flavour by name.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in FLAVOURS:
        raise ConfigError(f"the target is one of {', '.join(FLAVOURS)}, not {name!r}")
    return FLAVOURS[name]


def installed_version(chosen: Flavour) -> str | None:
    """Return the version of a flavour's installed package without importing it; None: not there."""
    for distribution in chosen.distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def checked_version(chosen: Flavour) -> str:
    """Return the installed version.

    Raises:
        MissingExtraError: if the library is not installed.
        BackendError: if it is too old.
    """
    found = installed_version(chosen)
    if found is None:
        require(chosen.module, extra=chosen.name, purpose=f"The target {chosen.name}")
        found = str(load(chosen).__version__)  # installed without a package, as on a Jetson
    if _numbers(found) < chosen.oldest:
        raise BackendError(
            f"{chosen.name} {found} is too old, {written(chosen.oldest)} or newer is needed: "
            f"pip install --upgrade {chosen.distributions[0]}"
        )
    return found


def load(chosen: Flavour) -> Any:
    """Import the library.

    Raises:
        MissingExtraError: if it is not installed.
        BackendError: if its libraries cannot be loaded.
    """
    try:
        return require(chosen.module, extra=chosen.name, purpose=f"The target {chosen.name}")
    except BackendError as error:
        # The package is there, a shared library is not: CUDA's, or TensorRT's own, which the
        # package has from NVIDIA's index.
        raise BackendError(
            f"{error}. A library that it needs is missing: see docs/how-to-tensorrt.md"
        ) from error


def features(chosen: Flavour, found: str) -> Features:
    """Return what version ``found`` of a flavour can do."""
    if chosen.name == "tensorrt-rtx":
        return Features(
            legacy=False,
            precisions=("float32", "float16", "bfloat16"),
            timing_cache=False,
            pins_times=False,
            fused_attention=True,
            packed_attention=False,  # 1.7.1 reads it and has no kernel for any of its GPUs
        )
    modern = _numbers(found) >= (10,)
    return Features(
        legacy=not modern,
        precisions=("float32", "float16", "bfloat16") if modern else ("float32", "float16"),
        timing_cache=True,
        pins_times=modern,
        fused_attention=_numbers(found) >= FUSED_SINCE,
        packed_attention=_numbers(found) >= PACKED_SINCE,
    )


def written(numbers: tuple[int, ...]) -> str:
    """Write a version as text."""
    return ".".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


class _ErrorLog:
    """What the library logged of late; TensorRT keeps the first logger of a process."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=20)

    def add(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines = list(self._lines)
        self._lines.clear()
        return lines


@functools.cache
def logger(library: Any) -> Any:
    """Return the logger of the process, an ``ILogger`` whose ``take()`` gives the last errors."""

    class Logger(library.ILogger, _ErrorLog):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            _ErrorLog.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self.add(msg)

    return Logger()


def reports_progress(library: Any) -> bool:
    """Tell whether a build can be watched and cancelled; 8.6 has no ``IProgressMonitor``."""
    return hasattr(library, "IProgressMonitor")


def builder_options(library: Any, *, legacy: bool, precision: Precision) -> dict[str, Any]:
    """Return what polygraphy's configuration of a build takes for this version alone."""
    if not legacy:
        return {}
    # Profiles are to be shared; the other features are on by default, if none is named.
    options: dict[str, Any] = {
        "preview_features": list(library.PreviewFeature.__members__.values())
    }
    if precision == "float16":
        # Every layer has a kernel for float32, so "prefer" would only hide where it is not obeyed.
        options |= {"fp16": True, "precision_constraints": "obey"}
    return options


def profile_shapes(engine: Any, tensor: str, profile: int) -> Shapes:
    """Return smallest, best and largest shape of an input in a profile."""
    low, best, high = engine.get_tensor_profile_shape(tensor, profile)
    return tuple(low), tuple(best), tuple(high)


def create_context(library: Any, engine: Any) -> Any:
    """Return an execution context without scratch memory of its own; None on failure."""
    strategy = getattr(library, "ExecutionContextAllocationStrategy", None)
    if strategy is None:  # 8.6
        return engine.create_execution_context_without_device_memory()
    return engine.create_execution_context(strategy.USER_MANAGED)


def scratch_bytes(engine: Any, profile: int) -> int:
    """Return the scratch memory that a profile needs at its largest."""
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            return int(getattr(engine, name)(profile))
    return int(engine.device_memory_size)  # 8.6: of the largest profile


def engine_facts(library: Any, engine: Any) -> dict[str, Any]:
    """Return ``scratch_bytes`` of the largest profile, and ``layers`` from the engine inspector.

    These are names in the order of execution, cut to :data:`MAX_LAYER_NAME` characters: a fused
    layer is called after all that it is made of.
    """
    profiles = range(engine.num_optimization_profiles)
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    found = json.loads(text, strict=False)["Layers"]  # 8.6 may leave control characters in strings
    layers = [each["Name"] if isinstance(each, dict) else str(each) for each in found]
    return {
        "scratch_bytes": max(scratch_bytes(engine, number) for number in profiles),
        "layers": [name[:MAX_LAYER_NAME] for name in layers],
    }


def set_scratch(context: Any, address: int, n_bytes: int) -> None:
    """Give a context its scratch memory for the next call."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, n_bytes)
    else:  # 8.6 and 10.0
        context.device_memory = address
