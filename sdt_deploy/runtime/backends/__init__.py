"""Backends by name; each is imported when it is asked for."""

from __future__ import annotations

from sdt_deploy.bundle import Bundle
from sdt_deploy.cores import usable_cores
from sdt_deploy.errors import BackendError
from sdt_deploy.ort import pool_threads
from sdt_deploy.runtime.backend import Backend

BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "torch")


def open_backend(name: str, bundle: Bundle, *, n_threads: int | None = None) -> Backend:
    """Open the backend ``name`` on ``bundle``.

    Raises:
        BackendError: if there is no such backend.
        MissingExtraError: if what it needs is not installed.
    """
    if name == "onnxruntime-cpu":
        from sdt_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpuBackend

        return OnnxRuntimeCpuBackend(bundle, n_threads=n_threads)
    if n_threads is not None:
        raise BackendError(f"n_threads is for onnxruntime-cpu; {name} has no thread pool")
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
    if name == "onnxruntime-cpu":
        return max(2048, 1024 * (pool_threads() or usable_cores()))
    return 131_072
