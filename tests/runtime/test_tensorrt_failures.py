"""Failures of the library while a batch runs: each is an error with its reason, and no result."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits
from sdt_deploy.choices import PathName
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backends import tensorrt as backend_module
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.backends.tensorrt import TensorRtBackend
from sdt_deploy.runtime.session import Session
from tests.runtime.fake_tensorrt import FakeLibrary
from tests.runtime.test_tensorrt import HOPPER, VERSIONS, with_engines
from tests.samples import ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]
LIMITS = BatchLimits(max_seqlen=21, max_batch=9, max_padded_tokens=9 * 21)
PLACES: list[tuple[PathName, str]] = [
    ("sparse", "entry"),
    ("sparse", "stage-01"),
    ("sparse", "head"),
    ("masked", "masked"),
    ("dense", "dense"),
]


@pytest.fixture(params=["host loop", "device loop"])
def opened(
    request: pytest.FixtureRequest,
    exported: Exported,
    fused: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Session, FakeLibrary, Any]:
    """A session, its library and a batch, which takes every stage."""
    library = FakeLibrary("11.4")
    found = (exported if request.param == "host loop" else fused)("all-embedding")
    bundle = with_engines(found.bundle, tmp_path / "bundle", "11.4", limits=LIMITS)
    monkeypatch.setattr(trt, "load", lambda flavour: library)
    monkeypatch.setattr(trt, "installed_version", lambda flavour: VERSIONS["11.4"])
    monkeypatch.setattr(backend_module, "driver", lambda: HOPPER)
    session = Session(bundle, TensorRtBackend(bundle, "tensorrt", device="cpu"))
    assert session.on_device == (request.param == "device loop")
    # Long sequences, so that the loop on a device counts and runs by stages.
    return session, library, random_batch(found.model.config, [21, 19, 20, 17, 21], seed=1)


Opened = tuple[Session, FakeLibrary, Any]


@pytest.mark.parametrize(("path", "graph"), PLACES)
def test_a_failed_enqueue_is_an_error_with_its_reason(
    opened: Opened, path: PathName, graph: str
) -> None:
    session, library, batch = opened
    with session:
        expected = session.run_batch(batch, path=path).output
        library.failing.add(graph)
        with pytest.raises(BackendError, match=rf"{graph} could not be enqueued\n.*out of luck"):
            session.run_batch(batch, path=path)
        library.failing.clear()
        np.testing.assert_array_equal(session.run_batch(batch, path=path).output, expected)
    with pytest.raises(BackendError, match="closed"):
        session.run_batch(batch)


@pytest.mark.parametrize(("path", "graph"), PLACES)
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("set_tensor_address", "refused the address of"),
        ("create_execution_context", "gave no context for profile"),
        ("set_optimization_profile_async", "gave no context for profile"),
    ],
)
def test_what_a_context_refuses_is_an_error_with_its_reason(
    opened: Opened, path: PathName, graph: str, call: str, said: str
) -> None:
    session, library, batch = opened
    first = "entry" if path == "sparse" else graph
    with session:
        library.refusing.add(call)
        with pytest.raises(BackendError, match=rf"{first} {said} .*\n.*out of luck"):
            session.run_batch(batch, path=path)
        assert not library.calls
        library.refusing.clear()
        assert len(session.run_batch(batch, path=path).output) == len(batch.lengths)


class Event:
    """An event behind work that failed."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def failed_memory() -> DeviceMemory:
    memory = DeviceMemory("cpu")
    memory.name = "tensorrt"
    memory.device = SimpleNamespace(type="cuda")
    real = memory.torch
    memory._torch = SimpleNamespace(
        OutOfMemoryError=real.OutOfMemoryError,
        cuda=SimpleNamespace(Event=Event),
        empty=lambda shape, dtype, pin_memory: real.empty(shape, dtype=dtype),
        real=real,
    )
    return memory


@pytest.mark.parametrize("what", ["mark", "wait", "fetch"])
def test_work_that_fails_after_it_was_enqueued_is_an_error_of_the_backend(what: str) -> None:
    memory = failed_memory()
    calls: dict[str, Callable[[], object]] = {
        "mark": memory.mark(),
        "wait": memory.wait,
        "fetch": lambda: memory.fetch(memory.torch.real.zeros(3)),
    }
    message = "tensorrt: work on the GPU failed after it was enqueued"
    with pytest.raises(BackendError, match=rf"{message}(.|\n)*illegal memory access"):
        calls[what]()


@pytest.mark.parametrize("block", ["counts", "result"])
def test_a_copy_that_meets_such_a_failure_is_too(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    """In the loop on a device, where results are copied from blocks of it."""
    session, _, batch = opened
    if not session.on_device:
        pytest.skip("the loop on the host fetches arrays, as above")
    from sdt_deploy.runtime.device_buffers import PinnedBlock

    fetch = PinnedBlock.fetch

    def failing(self: PinnedBlock) -> None:
        if (block == "counts") == ("counts" in self.there):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        fetch(self)

    monkeypatch.setattr(PinnedBlock, "fetch", failing)
    with session, pytest.raises(BackendError, match=re.escape("after it was enqueued")):
        session.run_batch(batch, path="sparse")
