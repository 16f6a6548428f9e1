"""One call behind ``sdt-deploy profile``."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from sdt_deploy.bundle import Bundle
from sdt_deploy.choices import PathName
from sdt_deploy.errors import BackendError
from sdt_deploy.profiling.device import DeviceTimer
from sdt_deploy.profiling.recorder import RecordingBackend, Span
from sdt_deploy.profiling.trace import chrome_trace
from sdt_deploy.runtime.backend import Backend
from sdt_deploy.runtime.backends import default_padded_tokens, open_backend
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits

WARM_UP_RUNS = 3
MIN_RUNS = 7
MAX_RUNS = 500
OPERATOR_RUNS = 5
"""Runs in which every operator is timed; they are slower than others."""
Recorded = tuple[list[Span], RunResult]
"""Spans, each run's own before those inside it, and the result of the last run."""


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """All calls of one kind of operator in one graph, per run."""

    graph: str
    operator: str
    n_calls: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a batch goes; medians over ``n_runs``, in milliseconds."""

    path: str
    backend: str
    batch: int
    n_tokens: int
    mean_depth: float
    n_runs: int
    total_ms: float
    engine_ms: dict[str, float]
    """Each graph, the engine alone. On a GPU: between two events on its stream."""
    host_ms: dict[str, float]
    """All else: planning the route, moving rows, preparing calls."""
    active_tokens: dict[str, int]
    """Of every stage."""
    operators: tuple[OperatorTime, ...]
    """Longest first; none where the backend does not time them."""
    operator_run_ms: float | None
    """Median of the runs in which operators were timed."""
    trace: dict[str, Any]
    """Those runs, or the others where there are none; see
    :func:`sdt_deploy.profiling.trace.chrome_trace`."""


def profile(
    bundle: Bundle,
    batch: TokenBatch,
    *,
    path: PathName = "sparse",
    backend: str = "onnxruntime-cpu",
    n_threads: int | None = None,
    budget_s: float = 2.0,
) -> Profile:
    """Measure one batch, first in whole graphs, then operator by operator.

    Args:
        bundle: what to run.
        batch: the batch; a large one runs in parts, whose times are added.
        path: which path.
        backend: see :meth:`Session.open`. On a GPU, times come from CUDA events, each piece is an
            NVTX range, and operators are left to Nsight Systems.
        n_threads: see :meth:`Session.open`.
        budget_s: seconds for the runs in whole graphs.

    Raises:
        SdtDeployError: if the bundle, the batch or the backend cannot be used.
    """
    if backend == "onnxruntime-compiled":
        raise BackendError(
            "nothing can be timed inside the compiled loop but what bench shows; profile the same "
            "graphs with onnxruntime-cpu"
        )
    opened: Backend
    if backend == "onnxruntime-cpu":
        opened = RecordingBackend(bundle, n_threads=n_threads)
    else:
        opened = open_backend(backend, bundle, n_threads=n_threads)
    limits = PartLimits(max_padded_tokens=default_padded_tokens(backend))
    with Session(bundle, opened, part_limits=limits) as session:
        if isinstance(opened, RecordingBackend):
            spans, result = _record(session, opened, batch, path, budget_s)
        else:
            assert isinstance(opened, DeviceMemory)
            spans, result = _record_device(session, opened, batch, path, budget_s)
    operators: tuple[OperatorTime, ...] = ()
    operator_run_ms, traced = None, spans
    if backend == "onnxruntime-cpu":
        with tempfile.TemporaryDirectory() as directory:
            recorder = RecordingBackend(bundle, n_threads=n_threads, operators=Path(directory))
            with Session(bundle, recorder, part_limits=limits) as session:
                traced, _ = _record(session, recorder, batch, path, 0.0, n_runs=OPERATOR_RUNS)
                begin = traced[0].start_ns if traced else 0
                inside = [one for one in recorder.operator_spans() if one.start_ns >= begin]
        operators = _operators(inside, OPERATOR_RUNS)
        operator_run_ms = median(span.ms for span in traced if span.kind == "run")
        traced = [*traced, *inside]
    total, engine, host = _parts(spans)
    stages = {spec.name: spec.layers[0] for spec in bundle.manifest.stages if spec.layers}
    active = result.layer_usage.active_tokens
    return Profile(
        path=path,
        backend=backend,
        batch=len(batch.lengths),
        n_tokens=batch.n_tokens,
        mean_depth=result.layer_usage.mean_depth,
        n_runs=sum(span.kind == "run" for span in spans),
        total_ms=total,
        engine_ms=engine,
        host_ms=host,
        active_tokens={name: active[layer] for name, layer in stages.items()},
        operators=operators,
        operator_run_ms=operator_run_ms,
        trace=chrome_trace(traced, f"{bundle.path.name}, {path}, {backend}"),
    )


def _record(
    session: Session,
    backend: RecordingBackend,
    batch: TokenBatch,
    path: PathName,
    budget_s: float,
    n_runs: int = MIN_RUNS,
) -> Recorded:
    """Run ``batch`` over and over on the CPU."""

    def once() -> Recorded:
        backend.spans.clear()
        with backend.span("run", "run"):
            result = session.run_batch(batch, path=path)
        return [backend.spans[-1], *backend.spans[:-1]], result

    return _repeated(once, budget_s, n_runs)


def _record_device(
    session: Session, backend: DeviceMemory, batch: TokenBatch, path: PathName, budget_s: float
) -> Recorded:
    """Do the same on a GPU, whose pieces are timed there."""
    loop = session.device_loop
    if loop is None:
        raise BackendError(
            f"{session.bundle.path} is not profiled on {session.backend.name}: its batches do not "
            "stay on the GPU. Export with --attention fused"
        )
    timer = DeviceTimer(backend)

    def once() -> Recorded:
        with timer.run():
            result = session.run_batch(batch, path=path)
        return timer.spans(), result

    loop.observe(timer.piece)
    try:
        return _repeated(once, budget_s, MIN_RUNS)
    finally:
        loop.observe(None)


def _repeated(once: Callable[[], Recorded], budget_s: float, n_runs: int) -> Recorded:
    """Warm up, then run until the budget is spent, ``n_runs`` times at least."""
    for _ in range(WARM_UP_RUNS):
        once()
    spans: list[Span] = []
    begin = perf_counter()
    done = 0
    while done < n_runs or (perf_counter() - begin < budget_s and done < MAX_RUNS):
        found, result = once()
        spans += found
        done += 1
    return spans, result


def _parts(spans: Sequence[Span]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return the medians of a run, of each graph in it, and of what the host does."""
    runs: list[dict[str, dict[str, float]]] = []
    totals: list[float] = []
    for span in spans:
        if span.kind == "run":
            totals.append(span.ms)
            runs.append({"graph": defaultdict(float), "host": defaultdict(float)})
        else:
            runs[-1][span.kind][span.name] += span.ms
    for total, run in zip(totals, runs, strict=True):
        spent = sum(run["graph"].values()) + sum(run["host"].values())
        run["host"]["everything else"] = total - spent
    engine, host = (
        {name: median(run[kind].get(name, 0.0) for run in runs) for name in runs[0][kind]}
        for kind in ("graph", "host")
    )
    return median(totals), engine, host


def _operators(spans: Sequence[Span], n_runs: int) -> tuple[OperatorTime, ...]:
    """Sum operators by graph and kind, per run, longest first."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for span in spans:
        groups[span.graph or "", span.name].append(span.ms)
    found = [
        OperatorTime(graph=graph, operator=name, n_calls=len(ms) / n_runs, ms=sum(ms) / n_runs)
        for (graph, name), ms in groups.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.ms))
