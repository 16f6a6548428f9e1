"""Signal handlers run in the middle of a call: what they do and raise comes out as it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdt_deploy import ort
from sdt_deploy.errors import BackendError, CheckpointError
from sdt_deploy.tokenization import TextTokenizer
from tests.samples import ExportedModel
from tests.textmodels import tokenizer

Exported = Callable[[str], ExportedModel]


class TooLateError(Exception):
    """What a task queue raises in its workers."""


class OfLibrary:
    """Stands for an engine, or for a tokenizer; raises what it is given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def fail(self, *of: object, **how: object) -> Any:
        raise self.error

    run_with_iobinding = encode_batch_fast = fail


@pytest.mark.parametrize("error", [TooLateError("5 s"), TimeoutError("5 s"), KeyboardInterrupt()])
def test_what_a_handler_raises_is_no_failure_of_a_library(
    error: BaseException, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ort.open_session(exported("active-lm").bundle / "head.onnx")
    call = ort.bind_arrays(session, {}, {})
    monkeypatch.setattr(session, "_sess", OfLibrary(error))
    made = TextTokenizer(tokenizer())
    monkeypatch.setattr(made, "_tokenizer", OfLibrary(error))
    with pytest.raises(type(error)) as raised:
        made.encode(["w3"])
    assert raised.value is error
    binding, engine = ort._native()[0], OfLibrary(error)
    monkeypatch.setattr(binding, "SessionIOBinding", lambda engine: engine)
    monkeypatch.setattr(session, "_sess", engine)
    with pytest.raises(type(error)) as raised:
        ort.bind_arrays(session, {}, {})()
    assert raised.value is error
    with pytest.raises(BackendError):
        call()  # nothing is bound: the library's own error


@pytest.mark.parametrize("error", [Exception("odd"), ValueError("odd")])
def test_failures_of_the_tokenizers(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TextTokenizer(tokenizer())
    monkeypatch.setattr(made, "_tokenizer", OfLibrary(error))
    with pytest.raises(CheckpointError, match="odd"):
        made.encode(["w3"])


def test_threads_that_the_tokenizers_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = TextTokenizer(tokenizer())
    error = Exception("The global thread pool has not been initialized")
    monkeypatch.setattr(made, "_tokenizer", OfLibrary(error))
    with pytest.raises(BackendError, match="TOKENIZERS_PARALLELISM"):
        made.encode(["w3"])


CLOSING = """
import os, signal, sys
import numpy as np
import sdt_deploy
from sdt_deploy.runtime.backends import onnxruntime_cpu

signal.alarm(100)
session = sdt_deploy.Session.open(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *of: session.close())
open_session = onnxruntime_cpu.open_session

def interrupted(path):
    os.kill(os.getpid(), signal.SIGTERM)
    return open_session(path)

onnxruntime_cpu.open_session = interrupted
try:
    session.run(np.arange(20) % 11, [0, 9, 20], path=sys.argv[2])
except sdt_deploy.BackendError as error:
    print(error)
try:
    session.run(np.arange(20) % 11, [0, 9, 20], path="sparse")
except sdt_deploy.BackendError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signals here")
@pytest.mark.parametrize("path", ["dense", "auto"])
def test_a_handler_may_close_the_session(path: str, exported: Exported) -> None:
    """It runs in the thread that opens a graph, and holds the lock."""
    bundle: Path = exported("active-lm").bundle
    done = subprocess.run(
        [sys.executable, "-c", CLOSING, str(bundle), path], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["the session is closed"] * 2, done.stderr
