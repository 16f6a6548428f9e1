"""What a closed session leaves behind: nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.runtime.backends import ON_CPU, onnxruntime_cpu
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session
from tests.runtime.test_stopping import FULL, hooked_session
from tests.runtime.test_windows import HEADS, open_with_tokenizer
from tests.samples import ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every ONNX Runtime session that a test opens."""
    found: list[weakref.ref[Any]] = []
    open_session = onnxruntime_cpu.open_session

    def remember(*args: Any, **kwargs: Any) -> Any:
        session = open_session(*args, **kwargs)
        found.append(weakref.ref(session))
        return session

    monkeypatch.setattr(onnxruntime_cpu, "open_session", remember)
    return found


def test_close_frees_engines_and_buffers(
    exported: Exported, engines: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    batch = random_batch(bundle.manifest.model, [9, 4], 0)
    session = Session.open(bundle)
    buffers: list[weakref.ref[np.ndarray]] = []
    allocate = session.backend.empty

    def remember(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = allocate(shape, dtype)
        if len(shape) == 2:  # states; scores belong to the result
            buffers.append(weakref.ref(array))
        return array

    monkeypatch.setattr(session.backend, "empty", remember)
    session.run_batch(batch)
    session.run_batch(batch, path="masked")
    result = session.run_batch(batch, path="dense")
    gc.collect()
    assert len(engines) == len(bundle.manifest.graphs)
    assert all(ref() is not None for ref in [*engines, *buffers[-2:]])
    session.close()
    session.close()
    gc.collect()
    assert [ref() for ref in [*engines, *buffers]] == [None] * len([*engines, *buffers])
    assert result.output.shape == (13, 53)
    for path in ("auto", "sparse", "masked", "dense"):
        with pytest.raises(BackendError, match="closed"):
            session.run_batch(batch, path=path)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="closed"):
        session.cost_model()


MEMORY = """
import re, sys
import numpy as np
import sdt_deploy

def resident():
    status = open("/proc/self/status").read()
    return int(re.search(r"^RssAnon:\\s+(\\d+) kB", status, re.MULTILINE)[1])

def ids(batch, length):
    return np.ones((batch, length), dtype=np.int64)

other = sdt_deploy.Session.open(sys.argv[1], backend=sys.argv[2])
expected = other.run(ids(2, 9), path="sparse").output
session = sdt_deploy.Session.open(sys.argv[1], backend=sys.argv[2])
session.run(ids(2, 9), path="dense")
before = resident()
session.run(ids(400, 40), path="dense")
after = resident()
session.close()
print(before, after, resident())
assert (other.run(ids(2, 9), path="sparse").output == expected).all()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ON_CPU)
def test_close_frees_the_memory_of_large_runs(backend: str, exported: Exported) -> None:
    """ONNX Runtime's arena would keep it for the rest of the process."""
    arguments = [sys.executable, "-c", MEMORY, str(exported("all-embedding").bundle), backend]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, closed = map(int, done.stdout.split())
    assert after - before > 30_000
    assert closed - before < (after - before) / 5


def test_close_frees_the_tokenizer(tmp_path: Path) -> None:
    session = open_with_tokenizer(tmp_path, HEADS["mean"])
    tokenizer = weakref.ref(session.tokenizer)
    session.close()
    assert tokenizer() is None
    with pytest.raises(BackendError, match="closed"):
        session.run("w1 w2")


def test_a_run_that_is_closed_under_way_gives_its_buffers_up() -> None:
    session, backend = hooked_session()
    backend.hook = lambda name: session.close() if name == "stage-00" else None
    session.run([1, 2], [0, 2], thresholds=FULL, path="sparse")  # this engine outlives its closing
    assert session._buffers.n_idle == 0
    with pytest.raises(BackendError, match="closed"):
        session.run([1, 2], [0, 2], path="sparse")


def errors_of_runs_while_it_is_closed(
    session: Session, batch: TokenBatch, path: str
) -> list[BaseException]:
    """Close a session while three threads run on it, again and again, until that fails."""
    started = threading.Barrier(4)
    errors: list[BaseException] = []

    def work() -> None:
        session.run_batch(batch, path=path)  # type: ignore[arg-type]
        started.wait()
        try:
            while True:
                session.run_batch(batch, path=path)  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    session.close()
    for thread in threads:
        thread.join(timeout=60)
    return errors


@pytest.mark.parametrize("path", ["sparse", "single", "masked"])
def test_runs_under_way_end(exported: Exported, engines: list[weakref.ref[Any]], path: str) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [30, 12, 25], 0)
    errors = errors_of_runs_while_it_is_closed(Session.open(sample.bundle), batch, path)
    assert [type(error) for error in errors] == [BackendError] * 3
    assert all("closed" in str(error) for error in errors)
    errors.clear()  # their tracebacks hold frames
    gc.collect()
    assert all(ref() is None for ref in engines)
