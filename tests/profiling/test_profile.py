"""Profiles: complete, nested, and of what was run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig
from sdt_deploy.errors import BackendError, InputError
from sdt_deploy.profiling.device import DeviceTimer
from sdt_deploy.profiling.inputs import profiled_batch
from sdt_deploy.profiling.profile import OPERATOR_RUNS, profile
from sdt_deploy.profiling.recorder import RecordingBackend, Span
from sdt_deploy.profiling.trace import chrome_trace
from sdt_deploy.runtime.graph_cache import GraphCache
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleDeviceBackend, memory_bundle
from tests.samples import CONFIGS, ExportedModel, random_batch, random_model
from tests.test_cli import call

Exported = Callable[[str], ExportedModel]


def test_where_the_time_goes(exported: Exported) -> None:
    sample = exported("all-grouped")
    bundle = Bundle.open(sample.bundle)
    batch = random_batch(sample.model.config, [9, 5, 12], 0)
    found = profile(bundle, batch, budget_s=0.1)
    assert (found.batch, found.n_tokens) == (3, 26)
    stages = [spec.name for spec in bundle.manifest.stages]
    assert list(found.engine_ms) == ["entry", *stages, "head"]
    assert set(found.host_ms) >= {"plan the route", "everything else"}
    with Session.open(sample.bundle) as session:
        usage = session.run_batch(batch, path="sparse").layer_usage
    first = [spec.layers[0] for spec in bundle.manifest.stages if spec.layers]
    assert list(found.active_tokens.values()) == [usage.active_tokens[i] for i in first]
    whole = sum(found.engine_ms.values()) + sum(found.host_ms.values())
    assert found.total_ms > 0
    assert min(found.engine_ms.values()) > 0
    assert whole == pytest.approx(found.total_ms, rel=0.5)  # of medians

    operators = Counter[str]()
    for one in found.operators:
        operators[one.graph] += round(one.n_calls * OPERATOR_RUNS)
        assert one.n_calls == round(one.n_calls), "operators of a run that was cut in two"
    assert set(operators) == set(found.engine_ms)
    products = sum(one.n_calls for one in found.operators if "MatMul" in one.operator)
    assert products >= 6 * sample.model.config.n_layers
    assert found.operator_run_ms is not None


def test_the_trace_is_nested(exported: Exported, tmp_path: Path) -> None:
    """Graphs and host work lie in their run, operators in the call of their graph."""
    sample = exported("active-lm")
    out = tmp_path / "trace.json"
    text = call("profile", sample.bundle, "--case", "2x9", "--budget", 0.1, "--trace", out)
    assert "MatMul" in text
    assert "host" in text
    events = json.loads(out.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in events if event["ph"] == "M"} == {
        "process_name",
        "thread_name",
    }
    kinds = Counter(span["cat"] for span in spans)
    assert kinds["run"] == OPERATOR_RUNS
    assert min(span["ts"] for span in spans) == 0

    def inside(inner: dict[str, float], outer: dict[str, float], slack_us: float) -> bool:
        begins = outer["ts"] - slack_us <= inner["ts"]
        return begins and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + slack_us

    for span in spans:
        if span["cat"] in ("graph", "host"):
            assert any(inside(span, run, 1) for run in spans if run["cat"] == "run"), span
        if span["cat"] == "operator":
            calls = [one for one in spans if one["name"] == span["args"]["graph"]]
            assert any(inside(span, one, 2000) for one in calls), span  # two clocks


@pytest.mark.parametrize("path", ["dense", "masked", "single"])
def test_other_paths(exported: Exported, path: str) -> None:
    sample = exported("active-lm")
    batch = random_batch(sample.model.config, [9, 5], 0)
    found = profile(Bundle.open(sample.bundle), batch, path=path, budget_s=0.1)  # type: ignore[arg-type]
    assert list(found.engine_ms) == [path]
    assert {one.graph for one in found.operators} == {path}


@pytest.mark.parametrize("path", ["sparse", "single", "masked", "dense"])
def test_the_slower_fusions_are_off(exported: Exported, path: str) -> None:
    """Decision 002: on the CPU their kernels take longer than the nodes that they replace."""
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9, 5], 0)
    found = profile(Bundle.open(sample.bundle), batch, path=path, budget_s=0.1)  # type: ignore[arg-type]
    operators = {one.operator for one in found.operators}
    assert "LayerNormalization" in operators
    assert not operators & {"SkipLayerNormalization", "BiasGelu"}


def test_recording_changes_nothing(exported: Exported) -> None:
    sample = exported("all-grouped")
    batch = random_batch(sample.model.config, [9, 5, 12], 0)
    bundle = Bundle.open(sample.bundle)
    with (
        Session.open(bundle) as plain,
        Session(bundle, RecordingBackend(bundle)) as recorded,
    ):
        for path in ("sparse", "dense"):
            expected = plain.run_batch(batch, path=path)  # type: ignore[arg-type]
            found = recorded.run_batch(batch, path=path)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found.output, expected.output)


def test_bad_inputs(exported: Exported) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    assert profiled_batch(bundle, None, None).n_tokens == 8 * 33
    for case, message in (("2x3,2x4", "one case"), ("2x99", "reach 33"), ("2", "BATCHxSEQ")):
        with pytest.raises(InputError, match=message):
            profiled_batch(bundle, case, None)
    with pytest.raises(InputError, match="no tokenizer"):
        profiled_batch(bundle, None, ["a text"])
    message = call("profile", bundle.path, "--case", "2x3", "--text", "x", code=2)
    assert "not both" in message


def test_an_empty_trace() -> None:
    assert [e["ph"] for e in chrome_trace([], "x")["traceEvents"]] == ["M", "M", "M"]
    span = Span(name="a", kind="run", start_ns=5_000, end_ns=9_000)
    assert chrome_trace([span], "x")["traceEvents"][-1]["dur"] == 4
    assert span.ms == pytest.approx(0.004)


@pytest.mark.parametrize("lengths", [[9, 5, 12], [29, 25, 32]])
def test_pieces_of_a_device_loop(lengths: list[int]) -> None:
    """On torch's CPU device, where the host's clock stands in for CUDA events."""
    config, _ = CONFIGS["active-lm"]
    model = random_model(config, 0)
    bundle = memory_bundle(model, ExportConfig(attention="fused"))
    batch = random_batch(config, lengths, 0)
    with Session(bundle, OracleDeviceBackend(bundle, model)) as session:
        loop = session.device_loop
        assert loop is not None
        timer = DeviceTimer(session.backend)  # type: ignore[arg-type]
        loop.observe(timer.piece)
        with timer.run():
            result = session.run_batch(batch, path="sparse")
        spans = timer.spans()
        loop.observe(None)
        session.run_batch(batch, path="sparse")
        assert timer.spans() == []
    run, *pieces = spans
    n_stages = len(result.stage_rows)
    names = ["entry", *(f"stage-{i:02d}" for i in range(n_stages)), "head"]
    if batch.n_tokens <= 64:  # one graph for all
        names = ["sparse"]
    assert [piece.name for piece in pieces] == names
    assert run.start_ns <= pieces[0].start_ns
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(pieces))
    assert pieces[-1].end_ns <= run.end_ns


def test_a_backend_that_cannot_be_profiled(exported: Exported) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    batch = random_batch(bundle.manifest.model, [3], 0)
    with pytest.raises(BackendError):
        profile(bundle, batch, backend="fpga")


class CudaLog:
    """What a timer and a cache of graphs ask of ``torch.cuda``, written down in order."""

    def __init__(self) -> None:
        said: list[str] = []
        self.said = said

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                said.append("event")

            def elapsed_time(self, other: Event) -> float:
                return 1.0

        class Graph:
            def capture_begin(self, **_: object) -> None:
                said.append("capture")

            def capture_end(self) -> None:
                said.append("captured")

            def replay(self) -> None:
                said.append("replay")

        self.Event, self.CUDAGraph = Event, Graph
        self.graph_pool_handle = object
        self.nvtx = SimpleNamespace(
            range_push=lambda name: said.append(f"<{name}>"), range_pop=lambda: said.append("</>")
        )


def test_ranges_and_events_lie_around_pieces_and_outside_captures() -> None:
    """CUDA is played by a log here; ``tests/gpu`` runs it."""
    cuda = CudaLog()
    torch = SimpleNamespace(cuda=cuda)
    backend = SimpleNamespace(torch=torch, device=SimpleNamespace(type="cuda"), wait=lambda: None)
    timer = DeviceTimer(backend)  # type: ignore[arg-type]
    graphs = GraphCache(torch, enabled=True)
    graphs.observer = timer.piece

    def run() -> list[str]:
        cuda.said.clear()
        with timer.run():
            graphs.launch(("entry", "bucket"), lambda: cuda.said.append("work"))
            graphs.launch(("stage", 3, "bucket"), lambda: cuda.said.append("work"))
        return cuda.said

    first = ["work", "capture", "work", "captured"]
    assert run() == [
        *("event", "<run>"),
        *("event", "<entry>", *first, "</>", "event"),
        *("event", "<stage-03>", *first, "</>", "event"),
        "</>",
    ]
    assert [span.name for span in timer.spans()] == ["run", "entry", "stage-03"]
    assert [one for one in run() if one == "replay" or one.startswith("<")] == [
        *("<run>", "<entry>", "replay", "</>", "<stage-03>", "replay", "</>", "</>"),
    ]

    def fails() -> None:
        raise BackendError("an engine failed")

    cuda.said.clear()
    with pytest.raises(BackendError), timer.run():
        graphs.launch(("head", "bucket"), fails)
    assert cuda.said.count("</>") == 2, "a range was left open"
