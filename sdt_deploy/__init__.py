"""Deploy depth-sparse transformers: score, route, compact, run.

::

    with sdt_deploy.Session.open("bundle") as session:
        result = session.run(input_ids, cu_seqlens)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdt_deploy.errors import (
    BackendError,
    BuildError,
    BundleError,
    BundleFormatError,
    BundleIntegrityError,
    CheckpointError,
    ConfigError,
    DeadlineExceededError,
    ExportError,
    InputError,
    MissingExtraError,
    MissingProviderError,
    OutputError,
    RunCancelledError,
    SdtDeployError,
    TrainingError,
    VerificationError,
)
from sdt_deploy.version import __version__ as __version__

if TYPE_CHECKING:
    from sdt_deploy.bundle import Bundle, Manifest
    from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig, RotaryConfig
    from sdt_deploy.runtime.caches import CacheUsage
    from sdt_deploy.runtime.generation import GenerationResult, generate
    from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
    from sdt_deploy.runtime.session import Session
    from sdt_deploy.runtime.statistics import DepthDriftWarning, SessionStatistics

_LAZY = {
    "Bundle": "sdt_deploy.bundle",
    "CacheUsage": "sdt_deploy.runtime.caches",
    "GenerationResult": "sdt_deploy.runtime.generation",
    "generate": "sdt_deploy.runtime.generation",
    "DepthDriftWarning": "sdt_deploy.runtime.statistics",
    "Manifest": "sdt_deploy.bundle",
    "ExportConfig": "sdt_deploy.config",
    "HeadConfig": "sdt_deploy.config",
    "ModelConfig": "sdt_deploy.config",
    "RotaryConfig": "sdt_deploy.config",
    "LayerUsage": "sdt_deploy.runtime.result",
    "RunResult": "sdt_deploy.runtime.result",
    "Session": "sdt_deploy.runtime.session",
    "SessionStatistics": "sdt_deploy.runtime.statistics",
    "Timings": "sdt_deploy.runtime.result",
}

__all__ = [
    "BackendError",
    "BuildError",
    "Bundle",
    "BundleError",
    "BundleFormatError",
    "BundleIntegrityError",
    "CacheUsage",
    "CheckpointError",
    "ConfigError",
    "DeadlineExceededError",
    "DepthDriftWarning",
    "ExportConfig",
    "ExportError",
    "GenerationResult",
    "HeadConfig",
    "InputError",
    "LayerUsage",
    "Manifest",
    "MissingExtraError",
    "MissingProviderError",
    "ModelConfig",
    "OutputError",
    "RotaryConfig",
    "RunCancelledError",
    "RunResult",
    "SdtDeployError",
    "Session",
    "SessionStatistics",
    "Timings",
    "TrainingError",
    "VerificationError",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
