"""A backend that writes down when each of its calls began and ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns, time_ns
from typing import Any

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import BackendError
from sdt_deploy.ort import open_session
from sdt_deploy.runtime.backend import Array, Call, Graph, HostArray
from sdt_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpuBackend, OnnxRuntimeGraph
from sdt_deploy.runtime.routing import RoutePlan, RouteRules


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took time; nanoseconds of ``time.monotonic_ns``."""

    name: str
    kind: str
    """``run``, ``graph``, ``host`` or ``operator``."""
    start_ns: int
    end_ns: int
    graph: str | None = None
    """Of an operator: the graph that it is in."""

    @property
    def ms(self) -> float:
        """Milliseconds."""
        return (self.end_ns - self.start_ns) / 1e6


class RecordingBackend(OnnxRuntimeCpuBackend):
    """ONNX Runtime on the CPU, with a span for every call.

    Args:
        bundle: see :class:`OnnxRuntimeCpuBackend`.
        n_threads: likewise.
        operators: an empty directory: let ONNX Runtime time every operator too, which slows runs
            down. None: graphs as a whole only.
    """

    def __init__(
        self, bundle: Bundle, *, n_threads: int | None = None, operators: Path | None = None
    ) -> None:
        super().__init__(bundle, n_threads=n_threads)
        self.spans: list[Span] = []
        self._directory = operators
        self._engines: dict[str, Any] = {}

    @contextmanager
    def span(self, name: str, kind: str) -> Iterator[None]:
        """Record what happens inside."""
        start = monotonic_ns()
        yield
        self.spans.append(Span(name=name, kind=kind, start_ns=start, end_ns=monotonic_ns()))

    def graph(self, name: str) -> Graph:
        """See :meth:`sdt_deploy.runtime.backend.Backend.graph`."""
        if self._directory is None:
            return _RecordingGraph(super().graph(name), name, self)
        if name not in self._engines:
            path = self._bundle.file(self._bundle.manifest.graphs[name].file)
            self._engines[name] = open_session(path, profile=self._directory / name)
            self._bundle.check_current()
        return _RecordingGraph(OnnxRuntimeGraph(self._engines[name]), name, self)

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.take`."""
        with self.span("sort rows", "host"):
            super().take(rows, index, out)

    def plan(
        self,
        scores: Array,
        thresholds: Sequence[float],
        cu_seqlens: HostArray,
        rules: RouteRules,
    ) -> RoutePlan:
        """See :meth:`sdt_deploy.runtime.backend.Backend.plan`."""
        with self.span("plan the route", "host"):
            return super().plan(scores, thresholds, cu_seqlens, rules)

    def operator_spans(self) -> list[Span]:
        """End ONNX Runtime's profiling; return what it wrote down, of all graphs.

        Raises:
            BackendError: if its files cannot be read.
        """
        found = []
        for name, engine in self._engines.items():
            start = _monotonic(engine.get_profiling_start_time_ns())
            path = Path(engine.end_profiling())
            try:
                events = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise BackendError(
                    f"ONNX Runtime's profile {path} cannot be read: {error}"
                ) from error
            found += [
                Span(
                    name=event["args"]["op_name"],
                    kind="operator",
                    start_ns=start + event["ts"] * 1000,
                    end_ns=start + (event["ts"] + event["dur"]) * 1000,
                    graph=name,
                )
                for event in events
                if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            ]
        return found


def _monotonic(start_ns: int) -> int:
    """Return ONNX Runtime's start on the clock of the spans.

    It says to be comparable with ``time.monotonic_ns``, and is with ``time.time_ns`` on Linux.
    """
    monotonic, wall = monotonic_ns(), time_ns()
    is_wall = abs(start_ns - wall) < abs(start_ns - monotonic)
    return start_ns - (wall - monotonic) if is_wall else start_ns


class _RecordingGraph:
    def __init__(self, graph: Graph, name: str, backend: RecordingBackend) -> None:
        self._graph, self._name, self._backend = graph, name, backend

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Call:
        """See :meth:`sdt_deploy.runtime.backend.Graph.bind`."""
        call: Callable[[], None] = self._graph.bind(inputs, outputs)

        def recorded() -> None:
            with self._backend.span(self._name, "graph"):
                call()

        return recorded
