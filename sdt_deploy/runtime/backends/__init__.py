"""Backends by name; each is imported when it is asked for."""

from __future__ import annotations

from typing import get_args

from sdt_deploy.bundle import Bundle
from sdt_deploy.choices import BackendName
from sdt_deploy.cores import usable_cores
from sdt_deploy.errors import BackendError
from sdt_deploy.extras import require
from sdt_deploy.ort import pool_threads
from sdt_deploy.ort_library import library_threads
from sdt_deploy.runtime.backend import Backend

BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
ON_CPU = ("onnxruntime-cpu", "onnxruntime-compiled")


def open_backend(name: str, bundle: Bundle, *, n_threads: int | None = None) -> Backend:
    """Open the backend ``name`` on ``bundle``.

    Raises:
        BackendError: if there is no such backend.
        MissingExtraError: if what it needs is not installed.
    """
    if name == "onnxruntime-cpu":
        from sdt_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpuBackend

        return OnnxRuntimeCpuBackend(bundle, n_threads=n_threads)
    if name == "onnxruntime-compiled":
        for module in ("onnxruntime", "numba"):
            require(module, extra="compiled", purpose=f"The backend {name}")
        return _compiled(bundle, n_threads)
    if n_threads is not None:
        raise BackendError(f"n_threads is for {' and '.join(ON_CPU)}; {name} has no thread pool")
    if name == "onnxruntime-cuda":
        from sdt_deploy.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(bundle)
    if name == "torch":
        from sdt_deploy.runtime.backends.torch_backend import TorchBackend

        return TorchBackend(bundle)
    if name in ("tensorrt", "tensorrt-rtx"):
        from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, name)
    raise BackendError(f"no backend is called {name!r}; there are: {', '.join(BACKENDS)}")


def default_padded_tokens(name: str) -> int:
    """Return the padded tokens that a backend runs at once unless the session is told otherwise.

    On a CPU, what is best for its caches, by the threads of the pool if there is one yet; on a GPU,
    what is large enough to keep it busy.
    """
    if name in ON_CPU:
        threads = pool_threads() if name == "onnxruntime-cpu" else library_threads()
        return max(2048, 1024 * (threads or usable_cores()))
    return 131_072


def _compiled(bundle: Bundle, n_threads: int | None) -> Backend:
    try:
        from sdt_deploy.runtime.backends.onnxruntime_compiled import OnnxRuntimeCompiledBackend
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        raise BackendError(
            f"Numba finds no folder to keep compiled code in: {error}. Set NUMBA_CACHE_DIR to one "
            "that can be written"
        ) from error
    return OnnxRuntimeCompiledBackend(bundle, n_threads=n_threads)
