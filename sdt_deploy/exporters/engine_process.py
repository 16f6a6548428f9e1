"""Run :mod:`sdt_deploy.exporters.engine_worker` in a process and follow what it reports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdt_deploy.buckets import Shapes
from sdt_deploy.errors import BackendError
from sdt_deploy.exporters.engine_worker import RTX_SWITCH

OnStep = Callable[[str, str, int, int], None]
"""Called with the graph, the phase of its build, steps done and steps in the phase."""


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One engine to build."""

    graph: str
    onnx: Path
    profiles: tuple[Mapping[str, Shapes], ...]
    """For each optimization profile, the shapes of every input."""
    attention: str | None
    """What to ask for, one of :data:`sdt_deploy.engines.ATTENTIONS`; None: the graph has none."""
    key: str
    """See :attr:`sdt_deploy.engines.EngineSpec.key`."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What came of one job."""

    graph: str
    output: Path
    build_s: float = 0.0
    attention: str | None = None
    """What the engine got."""
    attention_reason: str | None = None
    """See :attr:`sdt_deploy.engines.EngineSpec.attention_reason`."""
    scratch_bytes: int | None = None
    layers: Sequence[str] | None = None
    problem: str | None = None
    """What the library said if it failed; None if the engine stands at ``output``."""


def environment(*, rtx: bool) -> dict[str, str]:
    """Return the environment of a process in which polygraphy uses one flavour."""
    return {**os.environ, RTX_SWITCH: "1" if rtx else "0"}


def early_end(what: str, code: int, errors: bytes) -> BackendError:
    """Return the error of a process that ended before its work did, with its last lines."""
    lines = errors.decode(errors="replace").strip().splitlines()[-15:] or ["it wrote nothing"]
    advice = "`sdt-deploy doctor` says whether the library works here"
    return BackendError("\n".join([f"the process that {what} ended with {code}:", *lines, advice]))


def run_worker(
    jobs: Sequence[EngineJob],
    directory: Path,
    options: Mapping[str, Any],
    *,
    on_step: OnStep = lambda graph, phase, done, total: None,
) -> Generator[Built, None, None]:
    """Build engines in a process of their own; yield what came of each as soon as it is there.

    Where the library ends the process, that is what came of the graph it was at; another process
    builds the rest. Whoever does not read to the end closes the iterator (``contextlib.closing``),
    which ends the process.

    Args:
        jobs: what to build.
        directory: where the files go, each named after its graph.
        options: the job's other fields, see :func:`sdt_deploy.exporters.engine_worker.build`.
        on_step: see :data:`OnStep`. An exception from it, Ctrl-C too, ends the process.

    Raises:
        BackendError: if the first process ended before it began with a graph.
    """
    left = list(jobs)
    begun = False
    while left:
        done: set[str] = set()
        try:
            with contextlib.closing(_run_process(left, directory, options, on_step)) as builds:
                for built in builds:
                    done.add(built.graph)
                    yield built
            return
        except _EarlyEndError as end:
            if not end.started and not begun:
                raise end.error from None
            begun = True
            left = [job for job in left if job.graph not in done]
            # One that does not even begin would not for the next graph either.
            failed, left = (left[:1], left[1:]) if end.started else (left, [])
            for job in failed:
                output = directory / f"{job.graph}.engine"
                yield Built(graph=job.graph, output=output, problem=str(end.error))


class _EarlyEndError(Exception):
    """The process ended before its work did; ``started``: whether it had begun with a graph."""

    def __init__(self, error: BackendError, *, started: bool) -> None:
        super().__init__(error)
        self.error = error
        self.started = started


def _run_process(
    jobs: Sequence[EngineJob], directory: Path, options: Mapping[str, Any], on_step: OnStep
) -> Generator[Built, None, None]:
    """Build in one process; arguments as in :func:`run_worker`.

    Raises:
        _EarlyEndError: if it ended before its work did.
    """
    outputs = {job.graph: directory / f"{job.graph}.engine" for job in jobs}
    request = {
        **options,
        "graphs": [
            {
                "name": job.graph,
                "onnx": str(job.onnx.resolve()),
                "output": str(outputs[job.graph].resolve()),
                "profiles": job.profiles,
                "attention": job.attention,
            }
            for job in jobs
        ],
    }
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdt_deploy.exporters.engine_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(rtx=options["rtx"]),
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        started = ended = False
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                kind, graph = event.pop("event"), event.pop("graph")
                ended = kind == "end"
                if kind == "start":
                    started = True
                    on_step(graph, "read the graph", 0, 0)
                elif kind == "step":
                    on_step(graph, event["phase"], event["done"], event["total"])
                elif kind == "decompose":
                    what = f"decomposed attention, as fused could not be built: {event['reason']}"
                    on_step(graph, what, 0, 0)
                elif kind == "built":
                    yield Built(graph=graph, output=outputs[graph], **event)
                elif kind == "failed":
                    problem = "\n".join(event["lines"]) or "the library gave no reason"
                    yield Built(graph=graph, output=outputs[graph], problem=problem)
        except BrokenPipeError:
            pass  # it ended at once; why stands below
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            process.wait()
        if not ended:
            errors.seek(0)
            error = early_end("builds engines", process.returncode, errors.read())
            raise _EarlyEndError(error, started=started)
