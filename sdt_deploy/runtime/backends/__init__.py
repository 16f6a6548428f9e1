"""Backends by name; each is imported when it is asked for."""

from __future__ import annotations

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backend import Backend

BACKENDS = ("onnxruntime-cpu", "tensorrt", "tensorrt-rtx")


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
    if name in ("tensorrt", "tensorrt-rtx"):
        from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(bundle, name)
    raise BackendError(f"no backend is called {name!r}; there are: {', '.join(BACKENDS)}")
