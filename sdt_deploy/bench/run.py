"""One call behind ``sdt-deploy bench``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sdt_deploy.bench.benchmark import (
    CaseResult,
    Oracle,
    TextsResult,
    document,
    measure_case,
    measure_texts,
)
from sdt_deploy.bench.cases import check_cases, default_cases, parse_cases, token_source
from sdt_deploy.bench.environment import environment
from sdt_deploy.bench.html import report_page
from sdt_deploy.bench.report import plot, remarks, table
from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import ConfigError, MissingExtraError
from sdt_deploy.extras import require
from sdt_deploy.files import check_writable, write_file
from sdt_deploy.runtime.backends import ON_CPU
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.device_loop import for_devices
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.session import Session
from sdt_deploy.tokenization import read_lines

TEXTS_BATCH = 32
MAX_TEXTS = 128
"""Longer files are measured on as many evenly spaced lines."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure and where to write it."""

    cases: str | None = None
    """``2x20,8x64``; None: the default grid."""
    texts: Path | None = None
    """Measure the lengths of these texts as well, and fill the cases with their tokens."""
    json_file: Path | None = None
    plot_file: Path | None = None
    report_file: Path | None = None
    """One HTML file with everything, see :mod:`sdt_deploy.bench.html`."""
    beside: Path | None = None
    """Another bundle of the same model, whose stages are timed as well."""
    budget_s: float = 4.0
    """Seconds of timing per case, at least seven rounds."""
    with_memory: bool = True
    with_accuracy: bool = True
    """Compare with the PyTorch model, which takes long for large models and batches."""
    n_threads: int | None = None
    backend: str = "onnxruntime-cpu"


@dataclass(frozen=True, kw_only=True)
class BenchOutcome:
    """What was measured."""

    cases: tuple[CaseResult, ...]
    texts: TextsResult | None
    table: Table
    remarks: tuple[str, ...]
    document: dict[str, Any]
    """What ``--json`` prints."""


def run_bench(
    bundle_path: Path,
    options: BenchOptions,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> BenchOutcome:
    """Measure a bundle and write the files that ``options`` name.

    Raises:
        SdtDeployError: if the bundle, a case or a target cannot be used.
    """
    bundle = Bundle.open(bundle_path)
    other = None if options.beside is None else Bundle.open(options.beside)
    if other is not None and other.manifest.model != bundle.manifest.model:
        raise ConfigError(
            f"{other.path} holds another model than {bundle.path}; bundles to be timed beside each "
            "other differ in their export only"
        )
    if options.with_memory and options.backend not in ON_CPU and not for_devices(bundle):
        raise ConfigError(
            "memory is measured on the CPU, and on a GPU for bundles with fused attention; pass "
            f"--no-memory with {options.backend}"
        )
    if options.plot_file is not None:
        require("matplotlib", extra="demo", purpose="Drawing the plot")
    if options.report_file is not None:
        require("vl_convert", extra="report", purpose="Making the report")
    for target in (options.json_file, options.plot_file, options.report_file):
        if target is not None:
            check_writable(target)
    longest = bundle.manifest.model.max_positions
    sizes = parse_cases(options.cases) if options.cases else default_cases(longest)
    check_cases(sizes, longest)
    oracle = _oracle(bundle) if options.with_accuracy else None
    results: list[CaseResult] = []
    texts_result = None
    with contextlib.ExitStack() as opened:

        def open_session(which: Bundle) -> Session:
            return opened.enter_context(
                Session.open(
                    which,
                    backend=options.backend,
                    n_threads=options.n_threads,
                    max_depth_drift=None,  # the table says how deep tokens go
                )
            )

        session = open_session(bundle)
        beside = None if other is None else open_session(other)
        texts = None
        if options.texts is not None:
            lines = read_lines(options.texts)
            chosen = np.linspace(0, len(lines) - 1, min(len(lines), MAX_TEXTS)).astype(int)
            encoded = session.tokenizer.encode([lines[i] for i in chosen])
            n_truncated = int((np.diff(encoded[1]) > longest).sum())
            texts = session.tokenizer.encode(
                [lines[i] for i in chosen], max_length=longest, overflow="truncate"
            )
        source = token_source(bundle, texts)
        for i, size in enumerate(sizes):
            progress(f"{size[0]}x{size[1]}", i, len(sizes) + 1)
            results.append(
                measure_case(
                    session,
                    source,
                    size,
                    budget_s=options.budget_s,
                    oracle=oracle,
                    with_memory=options.with_memory,
                    n_threads=options.n_threads,
                    beside=beside,
                )
            )
        if texts is not None:
            progress("real lengths", len(sizes), len(sizes) + 1)
            texts_result = measure_texts(
                session,
                texts,
                batch=TEXTS_BATCH,
                budget_s=options.budget_s,
                n_texts_in_file=len(lines),
                n_truncated=n_truncated,
            )
    content = document(environment(), source.description, results, texts_result, bundle)
    if options.json_file is not None:
        write_file(options.json_file, (json.dumps(content, indent=1) + "\n").encode())
    if options.plot_file is not None:
        plot(results, options.plot_file)
    if options.report_file is not None:
        write_file(options.report_file, report_page(content).encode())
    return BenchOutcome(
        cases=tuple(results),
        texts=texts_result,
        table=table(results),
        document=content,
        remarks=(f"measured on {source.description}", *remarks(results, texts_result)),
    )


def _oracle(bundle: Bundle) -> Oracle | None:
    """Rebuild the PyTorch model from the bundle; None where torch or onnx is not installed."""
    try:
        require("torch", extra="export", purpose="Comparing with the PyTorch model")
        require("onnx", extra="export", purpose="Comparing with the PyTorch model")
    except MissingExtraError:
        return None
    from sdt_deploy.exporters.restore import restore
    from sdt_deploy.model.inference import oracle_output

    model = restore(bundle)

    def evaluate(batch: TokenBatch, result: RunResult) -> tuple[np.ndarray, int]:
        found = oracle_output(model, batch.input_ids, batch.cu_seqlens)
        active = result.active_layers
        flips = int((found.active != active).any(axis=1).sum())
        if flips:
            found = oracle_output(model, batch.input_ids, batch.cu_seqlens, active=active)
        return found.output, flips

    return evaluate
