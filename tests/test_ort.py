"""The one thread pool of the process, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdt_deploy import ort
from sdt_deploy.errors import BackendError, ConfigError, MissingProviderError
from sdt_deploy.runtime.session import Session

GOLDEN = Path(__file__).parent / "data" / "golden-bundle-v1"

RUN = """
import sys, warnings
import numpy as np
import sdt_deploy
from sdt_deploy import ort
warnings.simplefilter("error")
def run(n_threads=None):
    with sdt_deploy.Session.open(sys.argv[1], n_threads=n_threads) as session:
        assert session.run([3, 4, 5], [0, 1, 3], path="sparse").output.shape == (2, 8)
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN + code, str(GOLDEN)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_session_sets_the_size_and_others_follow() -> None:
    code = """
run(2); run(); run(2)
assert ort.pool_threads() == 2
try:
    run(1)
except sdt_deploy.BackendError as error:
    print(error)
"""
    assert "already runs ONNX Runtime with 2 threads and cannot change to 1" in python(code)


def test_the_pool_keeps_to_the_quota_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    code = f"""
from pathlib import Path
from sdt_deploy import cores
cores.CGROUPS, cores.MEMBERSHIP = Path({str(tmp_path)!r}), Path({str(tmp_path / "membership")!r})
cores.os.sched_getaffinity = lambda pid: set(range(4))
run()
assert ort.pool_threads() == 1
"""
    python(code)


def test_a_pool_of_the_host_application_is_kept() -> None:
    code = """
import onnxruntime
onnxruntime.set_global_thread_pool_sizes(1, 1)
run()
assert ort.pool_threads() == 0
try:
    run(2)
except UserWarning as warning:
    print(warning)
"""
    assert "host application made ONNX Runtime's thread pool" in python(code)


def test_a_missing_provider_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort.runtime(), "get_available_providers", lambda: ["OtherProvider"])
    with pytest.raises(MissingProviderError, match="no CPUExecutionProvider, only OtherProvider"):
        ort.open_session(GOLDEN / "entry.onnx")


def test_a_graph_that_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(BackendError, match="cannot be opened"):
        ort.open_session(tmp_path / "broken.onnx")


def test_a_wrong_input_is_a_backend_error() -> None:
    session = ort.open_session(GOLDEN / "head.onnx")
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        ort.bind_arrays(session, {}, {})()


@pytest.mark.parametrize("n_threads", [0, -1, 1025, 100_000, 10**30, 1.5, True, "2", [2]])
def test_thread_numbers_out_of_range(n_threads: object) -> None:
    before = ort.pool_threads()
    with pytest.raises(ConfigError, match=r"n_threads must be a whole number from 1 to 1024"):
        Session.open(GOLDEN, n_threads=n_threads)  # type: ignore[arg-type]
    assert ort.pool_threads() == before
