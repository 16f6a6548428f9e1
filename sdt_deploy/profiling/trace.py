"""Spans as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The format is Chrome's Trace Event Format: complete events (``"ph": "X"``), microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdt_deploy.profiling.recorder import Span

_ROWS = {"run": 1, "graph": 1, "host": 1, "operator": 2}
_NAMES = {1: "host: runs, graphs, planning", 2: "ONNX Runtime: operators"}


def chrome_trace(spans: Sequence[Span], title: str) -> dict[str, Any]:
    """Return the trace as JSON types; time starts with the first span."""
    start = min((span.start_ns for span in spans), default=0)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}},
        *(
            {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}
            for row, name in _NAMES.items()
        ),
    ]
    events += [
        {
            "ph": "X",
            "pid": 1,
            "tid": _ROWS[span.kind],
            "name": span.name,
            "cat": span.kind,
            "ts": (span.start_ns - start) / 1e3,
            "dur": (span.end_ns - span.start_ns) / 1e3,
            **({"args": {"graph": span.graph}} if span.graph else {}),
        }
        for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
