"""The one place that makes ONNX Runtime sessions: thread pool, options, provider check.

A forked child inherits opened sessions and shares their memory, but not the pool's threads, and the
pool cannot be made again: it runs every operator in the calling thread. Fork while no session runs,
or ONNX Runtime's own locks may stay locked in the child.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from sdt_deploy.config import is_integer, shown
from sdt_deploy.cores import usable_cores
from sdt_deploy.errors import BackendError, ConfigError, MissingProviderError
from sdt_deploy.extras import require
from sdt_deploy.forking import fork_safe_lock

SLOWER_FUSIONS = ("MatMulAddFusion", "BiasGeluFusion", "SkipLayerNormFusion")
"""Graph optimisations of ONNX Runtime that cost time on the CPU, dense baseline included; see
``docs/decisions/002-graph-forms.md``."""

MAX_THREADS = 1024
"""More are taken for a slip; ONNX Runtime would try to start them all."""
SMALLEST_MODEL = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b'
    b"\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
"""An ONNX model, ``y = Identity(x)`` with ``x [1]`` float32, to reach the arena through: a run is
the one way to have it give memory back. (The runtime does without the package onnx.)"""
SHRINKING = "memory.enable_memory_arena_shrinkage", "cpu:0"
"""The option of a run that has the arena give memory back when it ends."""
_lock = fork_safe_lock()
_pool_threads: int | None = None
"""Threads of the process-wide pool; 0 if the host application made it."""


def runtime() -> Any:
    """Import onnxruntime, or say how to install it."""
    return require("onnxruntime", extra="cpu", purpose="Running ONNX graphs")


_OF_PYBIND11 = (RuntimeError, MemoryError, TypeError, ValueError, IndexError, OverflowError)
"""What C++ exceptions become on their way to Python."""


def _is_of_library(error: Exception) -> bool:
    """Tell whether ONNX Runtime raised ``error``, not a signal handler that ran behind its call.

    Its own classes share no public base.
    """
    kind = type(error)
    return kind.__module__.startswith("onnxruntime.") or kind in _OF_PYBIND11


def _raise_as_ours(what: str, error: Exception) -> NoReturn:
    """Raise a :class:`BackendError` of what the library raised, and anything else as it is."""
    if not _is_of_library(error):
        raise error
    raise BackendError(f"{what}: {error}") from error


def checked_threads(n_threads: int | None) -> int:
    """Return how many threads a pool is to have; None: the cores this process may use.

    Raises:
        ConfigError: if ``n_threads`` is not a number of threads from 1 to :data:`MAX_THREADS`.
    """
    if n_threads is None:
        return usable_cores()
    if not is_integer(n_threads, 1, MAX_THREADS):
        raise ConfigError(
            f"n_threads must be a whole number from 1 to {MAX_THREADS}, not {shown(n_threads)}; "
            "None takes all cores"
        )
    return n_threads


def warn_of_waiting(n_threads: int) -> None:
    """Warn if a pool is to have more threads than there are cores."""
    if n_threads > usable_cores():
        warnings.warn(
            f"{n_threads} threads share {usable_cores()} usable cores: they wait for each other, "
            "which makes runs many times as long",
            stacklevel=4,
        )


def check_pool(n_threads: int, asked: int | None) -> None:
    """Check that a pool of ``n_threads`` serves who asked for so many; None: any will do.

    Raises:
        BackendError: if it does not.
    """
    if asked and asked != n_threads:
        raise BackendError(
            f"this process already runs ONNX Runtime with {n_threads} threads and cannot "
            f"change to {asked}: the pool is made once, and a forked process has one "
            "thread. Set n_threads before the first session"
        )


def ensure_thread_pool(n_threads: int | None = None) -> None:
    """Make the thread pool that all sessions of the process share, once.

    A pool per session would leave the idle ones spinning beside the busy one, which costs a factor
    of several. If the host application already made the pool, it is kept.

    Args:
        n_threads: threads that run one operator; None: the cores this process may use, or what the
            pool already has.

    Raises:
        ConfigError: if ``n_threads`` is not a number of threads from 1 to :data:`MAX_THREADS`.
        BackendError: if the pool exists with another number of threads, as it does, with one, in a
            child that was forked after the first session was opened.
    """
    global _pool_threads
    wanted = checked_threads(n_threads)
    with _lock:
        if _pool_threads is None:
            warn_of_waiting(wanted)
            try:
                runtime().set_global_thread_pool_sizes(wanted, 1)
                _pool_threads = wanted
            except Exception as error:
                if not _is_of_library(error):
                    raise
                _pool_threads = 0  # the host application made the pool
            _share_arena()
        if n_threads and _pool_threads == 0:
            warnings.warn(
                f"the host application made ONNX Runtime's thread pool; n_threads={n_threads} "
                "has no effect",
                stacklevel=3,
            )
        else:
            check_pool(_pool_threads, n_threads)


def _forget_threads() -> None:
    """In a forked child: the pool is there, its threads are not."""
    global _pool_threads
    _pool_threads = _pool_threads and 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _share_arena() -> None:
    """Register one memory arena for all sessions of the process.

    Stages run one after the other, so one block of scratch memory, warm in the caches, serves all.
    """
    ort = runtime()
    kind, purpose = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    arena = ort.OrtArenaCfg(0, 0, -1, -1)  # no limit, ONNX Runtime's own way of growing
    # A host application that registered an arena keeps it.
    with contextlib.suppress(Exception):
        ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, purpose), arena)


def free_arena() -> None:
    """Give back to the system what the shared arena holds and no session uses.

    Sessions that go on running take what they need anew.
    """
    ort = runtime()
    provider = "CPUExecutionProvider"
    freeing = ort.RunOptions()
    freeing.add_run_config_entry(*SHRINKING)
    try:
        session = ort.InferenceSession(SMALLEST_MODEL, _shared_options(), providers=[provider])
        session.run(None, {"x": np.zeros(1, dtype=np.float32)}, freeing)
    except Exception as error:  # the host application's allocator may be no arena
        if not _is_of_library(error):
            raise


def pool_threads() -> int | None:
    """Return the threads of the shared pool; 0: made by the host application, None: not made."""
    return _pool_threads


def _shared_options() -> Any:
    """Options of a session that uses the pool and the arena of the process."""
    options = runtime().SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    return options


def open_session(
    path: Path,
    *,
    n_threads: int | None = None,
    disabled_optimizers: Sequence[str] = SLOWER_FUSIONS,
    profile: Path | None = None,
) -> Any:
    """Open an ONNX graph on the CPU provider, with the shared pool and graph optimisations.

    Args:
        path: the graph.
        n_threads: see :func:`ensure_thread_pool`.
        disabled_optimizers: graph optimisations to leave out, by ONNX Runtime's names.
        profile: time every operator; the beginning of the name of the file that its
            ``end_profiling`` writes.

    Returns:
        An ``onnxruntime.InferenceSession``; its ``run`` may be called from several threads.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        MissingProviderError: if this build of onnxruntime lacks the provider.
        BackendError: if the graph cannot be opened.
    """
    provider = "CPUExecutionProvider"
    _with_provider(provider, extra="cpu")
    ensure_thread_pool(n_threads)
    options = _shared_options()
    options.enable_mem_pattern = False  # would lay a second block out for each new batch size
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return _opened(path, options, (provider, {}), disabled_optimizers)


def open_cuda_session(path: Path, *, device_id: int, stream: int) -> Any:
    """Open an ONNX graph on the CUDA provider, to be run by :func:`bind_addresses`.

    Args:
        path: the graph.
        device_id: the GPU, in CUDA's order.
        stream: handle of the CUDA stream that all of its work goes to; not the default stream.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        MissingProviderError: if this build of onnxruntime lacks the provider, or its libraries
            cannot be loaded.
        BackendError: if the graph cannot be opened.
    """
    provider = "CUDAExecutionProvider"
    ort = _with_provider(provider, extra="gpu")
    ort.preload_dlls()  # from the packages that torch brought
    ensure_thread_pool()  # for what is left to the CPU; where there is one, all sessions use it
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_mem_pattern = False  # would allocate anew on the second run of a size
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.log_severity_level = 3
    where = {
        "device_id": device_id,
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",  # otherwise in powers of two
        "use_tf32": 0,  # float32 means float32, as it does in the exported bundle
    }
    return _opened(path, options, (provider, where), ())


def _with_provider(provider: str, *, extra: str) -> Any:
    """Return onnxruntime if its build has ``provider``."""
    ort = require("onnxruntime", extra=extra, purpose="Running ONNX graphs")
    if provider not in ort.get_available_providers():
        raise MissingProviderError(
            f"onnxruntime {ort.__version__} has no {provider}, only "
            f'{", ".join(ort.get_available_providers())}: pip install "sdt-deploy[{extra}]"'
        )
    return ort


def _opened(
    path: Path,
    options: Any,
    provider: tuple[str, Mapping[str, Any]],
    disabled_optimizers: Sequence[str],
) -> Any:
    """Open a session on ``provider`` and no other."""
    options.graph_optimization_level = runtime().GraphOptimizationLevel.ORT_ENABLE_ALL
    try:
        session = runtime().InferenceSession(
            str(path),
            options,
            providers=[provider],
            disabled_optimizers=list(disabled_optimizers),
        )
    except Exception as error:
        _raise_as_ours(f"{path} cannot be opened by ONNX Runtime", error)
    if session.get_providers()[0] != provider[0]:  # it warns, and falls back to the CPU
        raise MissingProviderError(
            f"{path} runs on {session.get_providers()}, not on {provider[0]}: the provider's "
            "libraries could not be loaded"
        )
    return session


@functools.cache
def _native() -> tuple[Any, Any]:
    """Return onnxruntime's native module and its name for the CPU's memory."""
    native = runtime().capi.onnxruntime_pybind11_state
    return native, native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)


def bind_arrays(
    session: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> Callable[[], None]:
    """Prepare a run of ``session`` on ``inputs`` that writes into the arrays ``outputs``.

    Both are C-contiguous arrays of the graph's dtypes; they are read and written in place when the
    run is called, without copies, and belong to the caller.

    This speaks to onnxruntime's native module. Its Python classes do the same, but check much on
    the way: with caches that the weights have just swept, 0.05 to 0.1 ms a call.

    Raises:
        BackendError: if the engine refuses them, or, from the run, fails.
    """
    native, cpu = _native()
    wrap, engine = native.OrtValue.ortvalue_from_numpy, session._sess
    binding = native.SessionIOBinding(engine)
    try:
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, wrap(array, cpu))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, wrap(array, cpu))
    except Exception as error:
        _raise_as_ours("ONNX Runtime refused arrays", error)

    def run(_: object = (inputs, outputs)) -> None:  # the arrays live as long as the call
        try:
            engine.run_with_iobinding(binding, None)
        except Exception as error:
            _raise_as_ours("ONNX Runtime failed", error)

    return run


Address = tuple[int, tuple[int, ...], str]
"""Address of an array in the GPU's memory, its shape, and its type by the name that NumPy gives it,
or ``bfloat16``."""


def bind_addresses(
    session: Any, inputs: Mapping[str, Address], outputs: Mapping[str, Address], *, device_id: int
) -> Callable[[], None]:
    """Prepare a run of ``session``, from :func:`open_cuda_session`, on arrays in the GPU's memory.

    The run enqueues on the session's stream and returns without waiting.

    Raises:
        BackendError: if the engine refuses them, or, from the run, fails.
    """
    binding = session.io_binding()
    try:
        for name, (address, shape, dtype) in inputs.items():
            binding.bind_input(name, "cuda", device_id, _element_type(dtype), shape, address)
        for name, (address, shape, dtype) in outputs.items():
            binding.bind_output(name, "cuda", device_id, _element_type(dtype), shape, address)
    except Exception as error:
        _raise_as_ours("ONNX Runtime refused arrays", error)
    options = runtime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run() -> None:
        try:
            session.run_with_iobinding(binding, options)
        except Exception as error:
            _raise_as_ours("ONNX Runtime failed", error)

    return run


def _element_type(dtype: str) -> Any:
    """Return a type as ``io_binding`` takes it: of NumPy, or a number of ONNX's TensorProto."""
    return 16 if dtype == "bfloat16" else np.dtype(dtype).type
