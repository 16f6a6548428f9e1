"""Sessions in forked and in spawned processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdt_deploy.runtime.session import Session
from tests.samples import ExportedModel

GOLDEN = Path(__file__).parents[1] / "data" / "golden-bundle-v1"

PRE_FORK = """
import os, signal, sys, threading
import numpy as np
import sdt_deploy
from sdt_deploy import ort

n_threads, run_first = int(sys.argv[2]), sys.argv[3] == "run first"
ids, cu = np.arange(40) % 11, np.arange(0, 41, 5)
with sdt_deploy.Session.open(sys.argv[1], n_threads=n_threads) as session:
    if run_first:
        session.run(ids, cu)
    # Another thread holds every lock at the time of the fork.
    held, done = threading.Event(), threading.Event()
    def hold():
        locks = session._calibration_lock, session._monitor._lock, session.backend._lock, ort._lock
        for lock in locks:
            lock.acquire()
        held.set()
        done.wait()
        for lock in locks:
            lock.release()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    workers = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)  # a child that hangs is killed
            code = 1
            try:
                paths = "sparse", "masked", "auto"
                outputs = [session.run(ids, cu, path=path).output for path in paths]
                np.savez(f"{sys.argv[4]}/{number}.npz", *outputs)
                with sdt_deploy.Session.open(sys.argv[1]) as another:
                    another.run(ids, cu)
                assert ort.pool_threads() == 1
                code = 0
            finally:
                os._exit(code)
        workers.append(pid)
    done.set()
    thread.join()
    statuses = [os.waitpid(pid, 0)[1] for pid in workers]
    assert statuses == [0] * 4, statuses
    expected = session.run(ids, cu, path="sparse").output
    assert ort.pool_threads() == n_threads
for number in range(4):
    with np.load(f"{sys.argv[4]}/{number}.npz") as outputs:
        assert len(outputs) == 3
        for output in outputs.values():
            np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("first", ["run first", "fork first"])
def test_forked_workers_share_a_session(tmp_path: Path, n_threads: int, first: str) -> None:
    arguments = [str(GOLDEN), str(n_threads), first, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", PRE_FORK, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_session_cannot_be_pickled(exported: Callable[[str], ExportedModel]) -> None:
    bundle = exported("active-lm").bundle
    with Session.open(bundle) as session, pytest.raises(TypeError, match="pass the path") as caught:
        pickle.dumps(session)
    assert str(bundle) in str(caught.value)
