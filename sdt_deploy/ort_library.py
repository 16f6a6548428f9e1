"""ONNX Runtime's C library, for loops that Python is not to slow down.

Every wheel of onnxruntime carries it beside its Python module. It is a copy of its own, with its
own thread pool and memory arena: run in turn in one process, the idle threads of the two spin
beside the busy ones, so a process should use one of them.

Functions are called by their place in the table ``OrtApi`` of ``onnxruntime_c_api.h``; places never
change, new functions are added at the end.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sdt_deploy.errors import BackendError
from sdt_deploy.forking import fork_safe_lock
from sdt_deploy.ort import (
    SHRINKING,
    SLOWER_FUSIONS,
    SMALLEST_MODEL,
    check_pool,
    checked_threads,
    pool_threads,
    runtime,
    warn_of_waiting,
)

API_VERSION = 21


class Function(IntEnum):
    """Places in the table."""

    GET_ERROR_MESSAGE = 2
    CREATE_SESSION = 7
    CREATE_SESSION_FROM_ARRAY = 8
    RUN = 9
    CREATE_SESSION_OPTIONS = 10
    DISABLE_MEM_PATTERN = 17
    CREATE_RUN_OPTIONS = 39
    CREATE_TENSOR_WITH_DATA_AS_ORT_VALUE = 49
    CREATE_CPU_MEMORY_INFO = 69
    RELEASE_STATUS = 93
    RELEASE_SESSION = 95
    RELEASE_VALUE = 96
    RELEASE_RUN_OPTIONS = 97
    CREATE_ENV_WITH_GLOBAL_THREAD_POOLS = 119
    DISABLE_PER_SESSION_THREADS = 120
    CREATE_THREADING_OPTIONS = 121
    ADD_SESSION_CONFIG_ENTRY = 130
    CREATE_AND_REGISTER_ALLOCATOR = 144
    SET_GLOBAL_INTRA_OP_NUM_THREADS = 147
    SET_GLOBAL_INTER_OP_NUM_THREADS = 148
    CREATE_ARENA_CFG = 156
    ADD_RUN_CONFIG_ENTRY = 165


ELEMENT_TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
}
"""``ONNXTensorElementDataType`` by NumPy's names."""
_LIBRARIES = ("libonnxruntime.so.*", "libonnxruntime.*.dylib")
_DEVICE_ALLOCATOR, _ARENA_ALLOCATOR, _ERRORS_ONLY = 0, 1, 3
_lock = fork_safe_lock()
_library: OrtLibrary | None = None


class OrtLibrary:
    """The library with its environment; one for the process, see :func:`ort_library`.

    Args:
        n_threads: threads that run one operator.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._base = _loaded()  # keeps it loaded
        self._base.OrtGetApiBase.restype = ctypes.POINTER(_GET_API)
        table = self._base.OrtGetApiBase().contents(API_VERSION)
        words = ctypes.cast(table, ctypes.POINTER(ctypes.c_int64))
        self.api: npt.NDArray[np.int64] = np.ctypeslib.as_array(words, (max(Function) + 1,))
        """Addresses of the functions."""
        self._texts: dict[str, ctypes.Array[ctypes.c_char]] = {}
        pools = self._make(Function.CREATE_THREADING_OPTIONS)
        self._do(Function.SET_GLOBAL_INTRA_OP_NUM_THREADS, pools, n_threads)
        self._do(Function.SET_GLOBAL_INTER_OP_NUM_THREADS, pools, 1)
        create = Function.CREATE_ENV_WITH_GLOBAL_THREAD_POOLS
        self._env = self._make(create, _ERRORS_ONLY, self.text("sdt-deploy"), pools)
        arena = self._make(Function.CREATE_ARENA_CFG, 0, 0, -1, -1)  # as in ort.py
        info = self._make(Function.CREATE_CPU_MEMORY_INFO, _ARENA_ALLOCATOR, 0)
        self._do(Function.CREATE_AND_REGISTER_ALLOCATOR, self._env, info, arena)
        self.memory = self._make(Function.CREATE_CPU_MEMORY_INFO, _DEVICE_ALLOCATOR, 0)
        """Address of what says that a tensor lies in the caller's memory."""
        self._options = self._make(Function.CREATE_SESSION_OPTIONS)
        self._do(Function.DISABLE_PER_SESSION_THREADS, self._options)
        self._do(Function.DISABLE_MEM_PATTERN, self._options)
        for key, value in (
            ("session.use_env_allocators", "1"),
            ("optimization.disable_specified_optimizers", ";".join(SLOWER_FUSIONS)),
        ):
            entry = self.text(key), self.text(value)
            self._do(Function.ADD_SESSION_CONFIG_ENTRY, self._options, *entry)

    def text(self, text: str) -> int:
        """Return the address of ``text`` as a C string, which is kept for good, once."""
        buffer = ctypes.create_string_buffer(text.encode())
        return ctypes.addressof(self._texts.setdefault(text, buffer))

    def open(self, path: Path) -> LibrarySession:
        """Open a graph.

        Raises:
            BackendError: if the library refuses it.
        """
        name = ctypes.create_string_buffer(os.fsencode(path))
        try:
            address = self._make(
                Function.CREATE_SESSION, self._env, ctypes.addressof(name), self._options
            )
        except BackendError as error:
            raise BackendError(f"{path} cannot be opened by ONNX Runtime: {error}") from error
        return LibrarySession(self, address)

    def check(self, status: int) -> None:
        """Raise what a call returned, if that is an error.

        Raises:
            BackendError: with the library's words.
        """
        if status:
            message = _c_function(self.api[Function.GET_ERROR_MESSAGE], 1, ctypes.c_char_p)(status)
            text = message.decode(errors="replace")
            self._release(Function.RELEASE_STATUS, status)
            raise BackendError(text)

    def free_arena(self) -> None:
        """Give back to the system what the arena holds and no session uses; see ``ort.py``."""
        model = ctypes.create_string_buffer(SMALLEST_MODEL, len(SMALLEST_MODEL))
        address = self._make(
            Function.CREATE_SESSION_FROM_ARRAY,
            self._env,
            ctypes.addressof(model),
            len(SMALLEST_MODEL),
            self._options,
        )
        options = self._make(Function.CREATE_RUN_OPTIONS)
        key, value, x, y = map(self.text, (*SHRINKING, "x", "y"))
        self._do(Function.ADD_RUN_CONFIG_ENTRY, options, key, value)
        number, one = np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.int64)
        given = self._make(
            Function.CREATE_TENSOR_WITH_DATA_AS_ORT_VALUE,
            self.memory,
            number.ctypes.data,
            number.nbytes,
            one.ctypes.data,
            1,
            ELEMENT_TYPES["float32"],
        )
        names, values = np.array([x, y]), np.array([given, 0])
        places = names.ctypes.data, values.ctypes.data
        run = (address, options, *places, 1, places[0] + 8, 1, places[1] + 8)
        try:
            self._do(Function.RUN, *run)
        finally:
            for made in values[values != 0].tolist():
                self._release(Function.RELEASE_VALUE, made)
            self._release(Function.RELEASE_RUN_OPTIONS, options)
            self._release(Function.RELEASE_SESSION, address)

    def _do(self, function: Function, *arguments: int) -> None:
        """Call a function that returns a status."""
        self.check(_c_function(self.api[function], len(arguments))(*arguments))

    def _make(self, function: Function, *arguments: int) -> int:
        """Call one that makes something; return its address."""
        made = ctypes.c_int64()
        self._do(function, *arguments, ctypes.addressof(made))
        return made.value

    def _release(self, function: Function, address: int) -> None:
        _c_function(self.api[function], 1, None)(address)


class LibrarySession:
    """An opened graph; released when nothing refers to it any more."""

    def __init__(self, library: OrtLibrary, address: int) -> None:
        self.address = address
        weakref.finalize(self, library._release, Function.RELEASE_SESSION, address)


def ort_library(n_threads: int | None = None) -> OrtLibrary:
    """Return the library of the process, loading it and making its thread pool on the first call.

    Args:
        n_threads: see :func:`sdt_deploy.ort.ensure_thread_pool`.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        ConfigError: if ``n_threads`` is no number of threads.
        BackendError: if the wheel has no library that can be loaded, or the pool has another number
            of threads.
    """
    global _library
    wanted = checked_threads(n_threads)
    with _lock:
        if _library is None:
            if pool_threads() is not None:
                warnings.warn(
                    "this process already runs ONNX Runtime's Python module; its thread pool and "
                    "that of the C library spin beside each other, which costs a factor. Use one "
                    "backend for ONNX Runtime on the CPU in a process",
                    stacklevel=4,
                )
            warn_of_waiting(wanted)
            _library = OrtLibrary(wanted)
        check_pool(_library.n_threads, n_threads)
        return _library


def library_threads() -> int | None:
    """Return the threads of the library's pool; None: not made."""
    return None if _library is None else _library.n_threads


def _forget_threads() -> None:
    """In a forked child: the pool is there, its threads are not."""
    if _library is not None:
        _library.n_threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

_GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)


def library_path() -> Path:
    """Return where the installed wheel has the library.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        BackendError: if it has none, or one that cannot be called on this system.
    """
    if os.name != "posix" or sys.maxsize < 2**32:
        raise BackendError(
            "the compiled loop calls ONNX Runtime as 64-bit Linux and macOS do; use "
            'backend="onnxruntime-cpu" here'
        )
    folder = Path(str(runtime().__file__)).parent / "capi"
    found = sorted(path for name in _LIBRARIES for path in folder.glob(name))
    if not found:
        raise BackendError(
            f"{folder} has no C library of ONNX Runtime: install onnxruntime 1.32 or later from "
            'PyPI, or use backend="onnxruntime-cpu"'
        )
    return found[0]


def _loaded() -> ctypes.CDLL:
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error


def _c_function(
    address: int, n_arguments: int, returns: Any = ctypes.c_int64
) -> Callable[..., Any]:
    """Return a C function of words and addresses."""
    return ctypes.CFUNCTYPE(returns, *[ctypes.c_int64] * n_arguments)(int(address))
