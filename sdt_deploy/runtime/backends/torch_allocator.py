"""Torch's caching allocator for libraries that take allocation functions by address.

So their memory is shared with torch, counted by it, and, while a CUDA graph is captured, owned by
the graph: engines that run one after the other use one block of scratch memory.
"""

from __future__ import annotations

import ctypes
from typing import Any


class TorchAllocator:
    """Two C functions that allocate on the caller's current stream.

    It must outlive everything that was allocated with it. A failed allocation gives a null pointer,
    which the library reports.

    Args:
        torch: the module.
        device: the GPU.
    """

    def __init__(self, torch: Any, device: Any) -> None:
        def allocate(n_bytes: int) -> int:
            try:
                return int(torch.cuda.caching_allocator_alloc(n_bytes, device))
            except Exception:  # an exception cannot pass through C
                return 0

        def free(address: int | None) -> None:
            if address:
                torch.cuda.caching_allocator_delete(address)

        self._functions: tuple[Any, Any] = (
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(allocate),
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free),
        )

    @property
    def addresses(self) -> tuple[int, int]:
        """``void *allocate(size_t)`` and ``void free(void *)``."""
        first, second = (ctypes.cast(each, ctypes.c_void_p).value for each in self._functions)
        assert first is not None
        assert second is not None
        return first, second
