"""What GPUs this process sees, asked from the driver alone: no CUDA library has to be installed."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from dataclasses import dataclass

from sdt_deploy.errors import ConfigError

_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h."""


def read_capability(text: str) -> tuple[int, int]:
    """Parse a compute capability such as ``8.9``.

    Raises:
        ConfigError: if it is none.
    """
    match = _CAPABILITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"a compute capability is written like 8.9, not {text!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that the driver offers to this process."""

    name: str
    compute_capability: str
    """As NVIDIA writes it, such as ``9.0``."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The CUDA driver, or why there is none."""

    gpus: tuple[Gpu, ...] = ()
    """In CUDA's order; ``CUDA_VISIBLE_DEVICES`` applies."""
    cuda_version: str | None = None
    """Highest CUDA version that the driver runs."""
    problem: str | None = None
    """One sentence if no GPU can be used, with the remedy; None otherwise."""


@functools.cache
def driver() -> Driver:
    """Ask the driver, once in a process. Starts no CUDA context."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(
            problem=f"no NVIDIA driver, as {library} was not found: install it, or let the "
            "container see the GPU (docker run --gpus all)"
        )
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status = cuda.cuInit(0)
    if status:
        return Driver(
            cuda_version=cuda_version,
            problem=f"the NVIDIA driver offers no GPU, as cuInit returned {status}: see that "
            "nvidia-smi lists one, and that CUDA_VISIBLE_DEVICES does not hide it",
        )
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(cuda, number) for number in range(count.value))
    return Driver(
        gpus=gpus,
        cuda_version=cuda_version,
        problem=None
        if gpus
        else "the NVIDIA driver offers no GPU to this process: see that CUDA_VISIBLE_DEVICES "
        "does not hide it, and start a container with docker run --gpus all",
    )


def _gpu(cuda: ctypes.CDLL, number: int) -> Gpu:
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), number)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, number)
        numbers.append(value.value)
    return Gpu(name=name.value.decode(), compute_capability=f"{numbers[0]}.{numbers[1]}")
