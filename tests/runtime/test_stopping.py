"""Runs that are stopped end after the current stage and leave the session usable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import pytest

import sdt_deploy
from sdt_deploy.errors import DeadlineExceededError, InputError, RunCancelledError
from sdt_deploy.runtime import stopping
from sdt_deploy.runtime.backend import Array, Call, Graph
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import CONFIGS, assert_parity, random_batch, random_model

CONFIG = CONFIGS["active-lm"][0]
MODEL = random_model(CONFIG, 0)
FULL = (-1.0,) * CONFIG.n_layers


class HookedBackend(OracleBackend):
    """Calls ``hook`` with the graph's name after each engine call."""

    hook: Callable[[str], None] = staticmethod(lambda name: None)

    def graph(self, name: str) -> Graph:
        graph = super().graph(name)

        class Hooked:
            def bind(_, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:  # noqa: N805
                call = graph.bind(inputs, outputs)

                def run() -> None:
                    call()
                    self.hook(name)

                return run

        return Hooked()


def hooked_session(limits: PartLimits | None = None) -> tuple[Session, HookedBackend]:
    bundle = memory_bundle(MODEL)
    backend = HookedBackend(bundle, MODEL)
    return Session(bundle, backend, part_limits=limits), backend


@pytest.mark.parametrize(("after", "n_stages"), [("entry", 0), ("stage-00", 1), ("stage-01", 2)])
def test_a_cancelled_run_stops_after_the_current_stage(after: str, n_stages: int) -> None:
    session, backend = hooked_session()
    batch = random_batch(CONFIG, [5, 9], 0)
    cancel = threading.Event()
    backend.hook = lambda name: cancel.set() if name == after else None
    with pytest.raises(RunCancelledError, match="was cancelled"):
        session.run_batch(batch, thresholds=FULL, path="sparse", cancel=cancel)
    assert len(backend.calls) == n_stages
    assert session.statistics().n_runs == 0
    assert_parity(session, MODEL, batch, FULL)
    cancel.clear()
    backend.hook = lambda name: None
    found = session.run_batch(batch, thresholds=FULL, path="sparse", cancel=cancel, timeout_s=1e6)
    assert found.output.shape == (14, CONFIG.vocab_size)


def test_a_run_past_its_deadline_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    session, backend = hooked_session()
    batch = random_batch(CONFIG, [5, 9], 0)
    now = [100.0]
    monkeypatch.setattr(stopping, "monotonic", lambda: now[0])

    def pass_time(name: str) -> None:
        now[0] += 1.0

    backend.hook = pass_time
    with pytest.raises(DeadlineExceededError, match=r"within timeout_s=2\.5") as caught:
        session.run(
            batch.input_ids, batch.cu_seqlens, thresholds=FULL, path="sparse", timeout_s=2.5
        )
    assert isinstance(caught.value, TimeoutError)
    assert [call.stage for call in backend.calls] == ["stage-00", "stage-01"]
    session.run(batch.input_ids, batch.cu_seqlens, thresholds=FULL, path="sparse", timeout_s=5.0)


@pytest.mark.parametrize("path", ["sparse", "masked"])
def test_a_run_in_parts_stops_between_them(path: str) -> None:
    session, backend = hooked_session(PartLimits(max_padded_tokens=10))
    batch = random_batch(CONFIG, [10, 10, 10], 0)
    cancel, names = threading.Event(), []

    def hook(name: str) -> None:
        names.append(name)
        if name in ("head", "masked"):
            cancel.set()

    backend.hook = hook
    with pytest.raises(RunCancelledError):
        session.run_batch(batch, path=path, cancel=cancel)  # type: ignore[arg-type]
    assert names.count("head" if path == "sparse" else "masked") == 1


@pytest.mark.parametrize("path", ["auto", "sparse", "masked", "dense"])
def test_nothing_runs_once_it_is_too_late(path: str) -> None:
    session, backend = hooked_session()
    cancel = threading.Event()
    cancel.set()
    backend.hook = lambda name: pytest.fail(f"{name} ran")
    for stop in ({"cancel": cancel}, {"timeout_s": 0}):
        with pytest.raises(sdt_deploy.RunCancelledError):
            session.run([1, 2], [0, 2], path=path, **stop)  # type: ignore[arg-type]


def test_stopped_runs_return_their_buffers() -> None:
    session, backend = hooked_session()
    cancel = threading.Event()
    backend.hook = lambda name: cancel.set()
    for _ in range(5):
        cancel.clear()
        with pytest.raises(RunCancelledError):
            session.run([1, 2], [0, 2], thresholds=FULL, path="sparse", cancel=cancel)
    assert session._buffers.n_idle == 1


@pytest.mark.parametrize("timeout_s", [-1.0, np.nan])
def test_a_deadline_in_the_past(timeout_s: float) -> None:
    session, _ = hooked_session()
    with pytest.raises(InputError, match="0 or more"):
        session.run([1], [0, 1], timeout_s=timeout_s)


def test_what_is_no_event_is_refused() -> None:
    for cancel in (True, lambda: False):
        with pytest.raises(InputError, match=r"cancel must be a threading\.Event"):
            stopping.stop_check(None, cancel)  # type: ignore[arg-type]
    with pytest.raises(DeadlineExceededError, match="timeout_s=0"):
        stopping.stop_check(np.float32(0), None)()  # type: ignore[misc, arg-type]
