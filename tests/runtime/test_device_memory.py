from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backends.device import DeviceMemory

GB = 10**9


def test_what_a_run_takes_is_what_the_driver_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of engines, which torch's allocator knows nothing of, and what torch itself keeps."""
    free = {"driver": 10 * GB, "torch": 2 * GB}
    calls: list[str] = []

    def empty_cache() -> None:
        calls.append("empty_cache")
        free["driver"], free["torch"] = free["driver"] + free["torch"], 0

    def mem_get_info(device: object) -> tuple[int, int]:
        calls.append("mem_get_info")
        return free["driver"], 80 * GB

    cuda = SimpleNamespace(
        synchronize=lambda device: calls.append("synchronize"),
        empty_cache=empty_cache,
        mem_get_info=mem_get_info,
    )
    memory = DeviceMemory("cpu")
    monkeypatch.setattr(memory, "_torch", SimpleNamespace(cuda=cuda))

    def run() -> None:
        calls.append("run")
        free["driver"] -= 3 * GB  # what torch had kept could not hide it: that was given back

    assert memory.peak_bytes(run) == 3 * GB
    assert calls == ["synchronize", "empty_cache", "mem_get_info", "run", "synchronize", calls[2]]


def test_too_little_memory_is_told_from_work_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DeviceMemory("cpu")
    with pytest.raises(BackendError, match="can't allocate memory"):
        memory.empty((10**15,), "float32")

    def full(*of: object, **how: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BackendError, match="run smaller batches: CUDA out of memory"):
        memory.empty((3,), "float32")
