"""The process that builds engines, one flavour at a time: ``python -m`` this module.

polygraphy chooses the flavour once in a process, TensorRT keeps one logger in a process, prints to
the terminal from native code, and a fault in it ends the process. So :mod:`.tensorrt` starts this
one, gives it a job as JSON on the standard input, and reads one JSON event a line from the standard
output. When nobody reads any more, the build is cancelled.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
"""polygraphy's environment variable that selects TensorRT-RTX."""
_EVENT_INTERVAL_S = 0.05
_MAX_LINES = 40
_MAX_REASON = 300
_WORD = re.compile(r"[\w/]+(?:\.[\w/]+)*")
"""A node's name; not the dot behind it, nor the three between those of a fused one."""


class Reporter:
    """Writes events; learns from a closed pipe that the build is no longer wanted."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = 0.0
        self.closed = False

    def send(self, graph: str, event: str, **details: Any) -> None:
        """Write one event."""
        line = json.dumps({"graph": graph, "event": event, **details})
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self.closed = True

    def send_step(self, graph: str, phase: str, done: int, total: int) -> None:
        """Write how far a phase has come, unless the last such event was just now."""
        now = time.monotonic()
        if now - self._last >= _EVENT_INTERVAL_S:
            self._last = now
            self.send(graph, "step", phase=phase, done=done, total=total)


class _Lines(logging.Handler):
    """Keeps what the library logs about one build."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def take(self) -> list[str]:
        """Return the last lines since the last call."""
        lines, self.lines = self.lines[-_MAX_LINES:], []
        return lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip())


class _File(io.BytesIO):
    """The content of a file as polygraphy takes one that is open: it looks at the mode."""

    mode = "rb"


def monitor(trt: Any, graph: str, reporter: Reporter) -> Any:
    """Make an ``IProgressMonitor`` that reports the steps of ``graph``'s build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            reporter.send_step(graph, phase_name, step + 1, self._totals.get(phase_name, 0))
            return not reporter.closed

    return Monitor()


def build(job: Mapping[str, Any], graph: Mapping[str, Any], reporter: Reporter) -> None:
    """Build one engine and report how it went.

    Args:
        job: ``rtx``, ``compute_capabilities``, ``workspace_bytes``, ``legacy`` (8.6),
            ``precision``, ``timing_cache`` and ``pin_timing_cache``.
        graph: ``name``, ``onnx``, ``output``, ``attention`` and ``profiles``, for each a mapping
            from input to ``[min, opt, max]``. Where the library cannot build ``fused`` attention
            it becomes ``decomposed``.
        reporter: gets the events.
    """
    from polygraphy.exception import PolygraphyException

    name, asked = graph["name"], graph["attention"]
    reporter.send(name, "start")
    handler = _Lines()
    logger = logging.getLogger("Polygraphy")
    logger.addHandler(handler)
    output = Path(graph["output"])
    start = time.perf_counter()
    got, reason = asked, None
    before: list[str] = []
    try:
        try:
            output.write_bytes(build_bytes(job, graph, got, reporter))
        except PolygraphyException:
            if asked != "fused" or reporter.closed:
                raise
            before = handler.take()
            got, reason = "decomposed", first_error(before)
            before = ["with fused attention:", *before, "with decomposed attention:"]
            reporter.send(name, "decompose", reason=reason)
            output.write_bytes(build_bytes(job, graph, got, reporter))
    except PolygraphyException:  # it has logged why
        lines = [*before, *handler.take()]
        reporter.send(name, "failed", lines=[*blamed(Path(graph["onnx"]), lines), *lines])
    except (OSError, RuntimeError) as error:
        reporter.send(name, "failed", lines=[*before, *handler.take(), str(error)])
    else:
        described = {
            "build_s": round(time.perf_counter() - start, 4),
            "attention": got,
            "attention_reason": reason,
        }
        if job["gpu_here"]:
            described |= describe(output)
        reporter.send(name, "built", **described)
    finally:
        logger.removeHandler(handler)


def first_error(lines: Sequence[str]) -> str:
    """Return the first error that the library logged, on one line."""
    errors = [line for line in lines if line.startswith("[E]")] or [*lines, "it gave no reason"]
    return " ".join(errors[0].removeprefix("[E]").split())[:_MAX_REASON]


def blamed(path: Path, lines: Sequence[str]) -> list[str]:
    """Say which operators of a graph the library's errors name; nothing if they name none.

    Its parser names nodes, and so does its compiler where it has not merged them.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except DecodeError:
        return []
    words = {word for line in lines if line.startswith("[E]") for word in _WORD.findall(line)}
    found = [f"{node.op_type} ({node.name})" for node in nodes if node.name in words]
    return [f"operator: {', '.join(found)}"] if found else []


def build_bytes(
    job: Mapping[str, Any], graph: Mapping[str, Any], attention: str | None, reporter: Reporter
) -> memoryview:
    """Build one engine; arguments as in :func:`build`.

    Raises:
        PolygraphyException: if the library could not; it has logged why.
    """
    from polygraphy.backend.trt import (
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        PostprocessNetwork,
    )
    from polygraphy.mod.trt_importer import lazy_import_trt

    from sdt_deploy.trt import reports_progress

    trt = lazy_import_trt()
    progress = monitor(trt, graph["name"], reporter) if reports_progress(trt) else None
    config = build_config(trt, job, graph["profiles"], progress)
    path, legacy = Path(graph["onnx"]), job["legacy"]
    if legacy or graph["attention"] in ("fused", "packed"):
        path = adapted(path, Path(graph["output"]).parent, attention, legacy=legacy)
    network = NetworkFromOnnxPath(str(path), strongly_typed=not legacy)
    if legacy and job["precision"] != "float32":
        network = PostprocessNetwork(network, float32_keeper(trt, path), "keep float32")
    save_cache = None if job["pin_timing_cache"] else job["timing_cache"]
    return memoryview(
        EngineBytesFromNetwork(network, config=config, save_timing_cache=save_cache)()
    )


def adapted(path: Path, directory: Path, attention: str | None, *, legacy: bool) -> Path:
    """Write a graph into ``directory`` as TensorRT takes it, or 8.6 if ``legacy``."""
    import onnx

    from sdt_deploy.bundle import WEIGHTS
    from sdt_deploy.exporters import engine_graphs

    proto = onnx.load(path, load_external_data=False)
    if legacy:
        proto = engine_graphs.legacy_graph(proto)
    elif attention == "packed":
        proto = engine_graphs.packed_attention(proto)
    elif attention == "decomposed":
        proto = engine_graphs.decomposed_attention(proto)
    else:
        proto = engine_graphs.masked_attention(proto)
    weights, beside = path.with_name(WEIGHTS), directory / WEIGHTS
    if weights.exists() and not beside.exists():
        os.link(weights, beside)  # the graph names them as its neighbour
    target = directory / path.name
    onnx.save(proto, target)
    return target


def float32_keeper(trt: Any, path: Path) -> Callable[..., None]:
    """Return what keeps a network, its argument ``network``, as precise as the graph at ``path``.

    Without strong types the builder takes float16 wherever that is faster.
    """
    import onnx

    from sdt_deploy.exporters.engine_graphs import value_types
    from sdt_deploy.exporters.engine_types import keep_float32

    types = value_types(onnx.load(path, load_external_data=False))
    return functools.partial(keep_float32, trt, types)


def build_config(
    trt: Any, job: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], progress: Any
) -> Any:
    """Return polygraphy's configuration of one build; arguments as in :func:`build`."""
    from polygraphy.backend.trt import CreateConfig, Profile

    from sdt_deploy.trt import builder_options

    profiles = [Profile() for _ in shapes]
    for profile, inputs in zip(profiles, shapes, strict=True):
        for tensor, (low, best, high) in inputs.items():
            profile.add(tensor, min=low, opt=best, max=high)
    options: dict[str, Any] = {"profiles": profiles, "progress_monitor": progress}
    options["max_aux_streams"] = 0  # the caller's stream; it has others for other work
    if job["workspace_bytes"] is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job["workspace_bytes"]}
    if job["timing_cache"] is not None:
        options["load_timing_cache"] = job["timing_cache"]
        if job["pin_timing_cache"]:  # beside a path polygraphy would write a lock
            options["load_timing_cache"] = _File(Path(job["timing_cache"]).read_bytes())
            options["error_on_timing_cache_miss"] = True
    if job["rtx"]:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(compute_capabilities=job["compute_capabilities"], **options)
    own = builder_options(trt, legacy=job["legacy"], precision=job["precision"])
    return CreateConfig(**options, **own)


def describe(path: Path) -> dict[str, Any]:
    """Ask an engine for its scratch memory and its layers, where it loads here."""
    from polygraphy.backend.trt import EngineFromBytes
    from polygraphy.exception import PolygraphyException
    from polygraphy.mod.trt_importer import lazy_import_trt

    from sdt_deploy.trt import engine_facts

    try:
        return engine_facts(lazy_import_trt(), EngineFromBytes(path.read_bytes())())
    except PolygraphyException:  # built for another GPU
        return {}


def own_output() -> TextIO:
    """Return the standard output; what others print, native code too, then goes to the errors."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def main() -> None:
    """Read a job, build its graphs one after the other, report."""
    reporter = Reporter(own_output())
    job = json.load(sys.stdin)
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    logging.getLogger("Polygraphy").propagate = False
    for graph in job["graphs"]:
        if reporter.closed:
            break
        build(job, graph, reporter)
    reporter.send("", "end")


if __name__ == "__main__":
    main()
