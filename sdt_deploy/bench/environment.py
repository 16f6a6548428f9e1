"""What a measurement depends on."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdt_deploy.cores import usable_cores
from sdt_deploy.gpu import driver
from sdt_deploy.ort import pool_threads
from sdt_deploy.ort_library import library_threads
from sdt_deploy.version import __version__


def environment() -> dict[str, Any]:
    """Describe what a measurement depends on."""
    packages: dict[str, str | None] = {"sdt-deploy": __version__}
    for name in ("onnxruntime", "onnxruntime-gpu", "numpy", "torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "gpus": [gpu.name for gpu in driver().gpus],
        "n_cores": usable_cores(),
        "n_threads": pool_threads() or library_threads(),
        "packages": packages,
    }


def _command() -> str:
    program = Path(sys.argv[0]).name
    started = ["python", "-m", "sdt_deploy"] if program == "__main__.py" else [program]
    return shlex.join([*started, *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
