"""Sparse against dense: same backend, same threads, one process, interleaved run by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from sdt_deploy.bench.cases import TokenSource
from sdt_deploy.bench.memory import device_peak_bytes, peak_bytes
from sdt_deploy.bench.parts import median_parts
from sdt_deploy.bench.timing import interleave, wall_ms
from sdt_deploy.bundle import Bundle
from sdt_deploy.choices import PathName
from sdt_deploy.config import ModelConfig
from sdt_deploy.costs import dense_flops
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.dispatch import needed_flops
from sdt_deploy.runtime.padded import padded_arrays
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import select

Oracle = Callable[[TokenBatch, RunResult], tuple[np.ndarray, int]]
"""Takes a batch and what the runtime made of it; returns the oracle's output, packed, with every
token through the same layers, and how many tokens the oracle itself would route otherwise."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One row of the benchmark; times are medians in milliseconds."""

    batch: int
    seq: int
    n_tokens: int
    n_batches: int
    """Different batches of this size that were measured in turn."""
    backend: str
    precision: str
    n_stages: int
    mean_depth: float
    depth_histogram: tuple[int, ...]
    ideal_ratio: float
    """Active layer-tokens over all."""
    flops_ratio: float
    """Operations of the sparse over the dense function, attention, entry and head included."""
    dense_ms: float
    masked_ms: float
    sparse_ms: float
    single_ms: float | None
    """The whole sparse loop in one graph; None where the bundle holds none."""
    beside_ms: float | None
    """The sparse path of the other bundle; None where there is none."""
    full_depth_ms: float
    """The sparse path with every token at full depth."""
    auto_ms: float
    auto_path: str
    ratio: float
    """``sparse_ms / dense_ms``"""
    auto_ratio: float
    overhead_us: float
    """Median time of the runtime itself per stage call, in microseconds: all of ``run_batch`` but
    engine calls and copies of rows."""
    efficiency: float
    """``flops_ratio / ratio``"""
    spread_ms: dict[str, float]
    """Interquartile range of each path's times."""
    n_runs: int
    dense_peak_bytes: int | None
    sparse_peak_bytes: int | None
    max_abs_error: float | None
    """Against the oracle at equal depths; None where torch is not installed."""
    routing_flips: int | None
    """Tokens whose depth differs from the oracle's."""
    useful_rows: float | None = None
    """Active rows over the rows that stages processed, where these are padded to buckets."""
    parts_ms: dict[str, float] | None = None
    """Where the time of a sparse run goes, see :func:`sdt_deploy.bench.parts.median_parts`."""
    stage_tokens: dict[str, float] | None = None
    """Active tokens of every stage, mean over the batches."""


@dataclass(frozen=True, kw_only=True)
class TextsResult:
    """Real lengths: texts in batches, times are medians in milliseconds."""

    n_texts: int
    """Texts measured, evenly spaced over the file."""
    n_texts_in_file: int
    n_truncated: int
    """Texts cut to the model's positions."""
    n_tokens: int
    batch: int
    mean_depth: float
    flops_ratio: float
    """Against dense without any padding."""
    dense_padded_ms: float
    """Dense, batches in the file's order, padded to the longest."""
    dense_sorted_ms: float
    """Dense, batches of similar length."""
    sparse_ms: float
    """Sparse, batches in the file's order."""
    sparse_sorted_ms: float
    """Sparse, batches of similar length."""
    full_depth_ms: float
    """The sparse path with every token at full depth, batches in the file's order: what packing
    alone gives."""
    spread_ms: dict[str, float]
    """Interquartile range of each candidate's times."""
    n_runs: int
    ratio_padded: float
    """``sparse_ms / dense_padded_ms``"""
    ratio_sorted: float
    """``sparse_sorted_ms / dense_sorted_ms``"""


def measure_case(
    session: Session,
    source: TokenSource,
    size: tuple[int, int],
    *,
    budget_s: float,
    oracle: Oracle | None,
    with_memory: bool,
    n_threads: int | None,
    beside: Session | None = None,
) -> CaseResult:
    """Measure one size.

    Args:
        session: opened on the bundle.
        source: tokens to fill the case with.
        size: ``(batch, seq)``.
        budget_s: see :func:`sdt_deploy.bench.timing.interleave`.
        oracle: None leaves accuracy out.
        with_memory: start a process per path to measure its peak memory.
        n_threads: as the session was opened with.
        beside: opened on another bundle of the same model, to time its sparse path.
    """
    manifest = session.manifest
    config = manifest.model
    batches = source.batches(*size, session.bundle)
    full = (-1.0,) * config.n_layers
    sparse_times: list[Timings] = []

    def sparse(batch: TokenBatch) -> None:
        start = perf_counter()
        timings = session.run_batch(batch, path="sparse").timings
        call_ms = (perf_counter() - start) * 1e3
        sparse_times.append(replace(timings, total_ms=call_ms))

    more: dict[str, Callable[[], object]] = {}
    whole: Callable[[TokenBatch, PathName], Callable[[], object]] = partial(padded_call, session)
    clock = wall_ms
    if isinstance(session.backend, DeviceMemory):
        clock = session.backend.clock
        if session.on_device:  # then all paths go through the same captured graphs

            def whole(batch: TokenBatch, path: PathName) -> Callable[[], object]:
                return partial(session.run_batch, batch, path=path)

    if "single" in manifest.graphs:
        runs = [partial(session.run_batch, batch, path="single") for batch in batches]
        more["single"] = in_turn(runs)
    if beside is not None:
        runs = [partial(beside.run_batch, batch, path="sparse") for batch in batches]
        more["beside"] = in_turn(runs)
    auto_paths = Counter(session.run_batch(batch).path for batch in batches)
    times = interleave(
        {
            "dense": in_turn([whole(batch, "dense") for batch in batches]),
            "masked": in_turn([whole(batch, "masked") for batch in batches]),
            "sparse": in_turn([partial(sparse, batch) for batch in batches]),
            **more,
            "full_depth": in_turn(
                [
                    partial(session.run_batch, batch, path="sparse", thresholds=full)
                    for batch in batches
                ]
            ),
            "auto": in_turn([partial(session.run_batch, batch) for batch in batches]),
        },
        budget_s=budget_s,
        clock=clock,
    )
    results = [session.run_batch(batch, path="sparse") for batch in batches]
    error, flips = None, None
    if oracle is not None:
        compared = [oracle(batch, found) for batch, found in zip(batches, results, strict=True)]
        pairs = list(zip(results, compared, strict=True))
        error = max(float(np.abs(found.output - output).max()) for found, (output, _) in pairs)
        flips = sum(flipped for _, flipped in compared)
    usage = LayerUsage.of(
        np.concatenate([found.depths for found in results]),
        None if results[0].active is None else np.concatenate([r.active for r in results]),
        config.n_layers,
    )
    processed = sum(sum(found.stage_rows) for found in results)
    useful = sum(usage.active_tokens) / processed if processed else None
    dense_ms, sparse_ms = times["dense"].median_ms, times["sparse"].median_ms
    needed = sum(routed_flops(config, found) for found in results)
    lengths = [length for batch in batches for length in batch.lengths.tolist()]
    flops_ratio = needed / dense_flops(config, lengths)
    peaks: dict[str, int | None] = {}
    for path in ("dense", "sparse") if with_memory else ():
        name = session.backend.name
        if session.on_device:
            peaks[path] = device_peak_bytes(session.bundle, name, path, batches[0])
        else:
            peaks[path] = peak_bytes(session.bundle.path, name, path, batches[0], n_threads)
    return CaseResult(
        batch=size[0],
        seq=size[1],
        n_tokens=batches[0].n_tokens,
        n_batches=len(batches),
        backend=session.backend.name,
        precision=manifest.export.numbers,
        n_stages=len(manifest.stages),
        mean_depth=usage.mean_depth,
        depth_histogram=usage.depth_histogram,
        ideal_ratio=usage.ideal_ratio,
        flops_ratio=flops_ratio,
        dense_ms=dense_ms,
        masked_ms=times["masked"].median_ms,
        sparse_ms=sparse_ms,
        single_ms=times["single"].median_ms if "single" in more else None,
        beside_ms=times["beside"].median_ms if beside is not None else None,
        full_depth_ms=times["full_depth"].median_ms,
        auto_ms=times["auto"].median_ms,
        auto_path="+".join(sorted(auto_paths)),
        ratio=sparse_ms / dense_ms,
        auto_ratio=times["auto"].median_ms / dense_ms,
        overhead_us=median(
            each.overhead_ms * 1e3 / max(1, len(each.stage_ms)) for each in sparse_times
        ),
        efficiency=flops_ratio * dense_ms / sparse_ms,
        spread_ms={name: timed.spread_ms for name, timed in times.items()},
        n_runs=times["sparse"].n_runs,
        dense_peak_bytes=peaks.get("dense"),
        sparse_peak_bytes=peaks.get("sparse"),
        max_abs_error=error,
        routing_flips=flips,
        useful_rows=useful,
        parts_ms=median_parts(sparse_times, [stage.name for stage in manifest.stages]),
        stage_tokens={
            stage.name: usage.active_tokens[stage.layers[0]] / len(batches)
            for stage in manifest.stages
            if stage.layers is not None
        },
    )


def measure_texts(
    session: Session,
    texts: tuple[np.ndarray, np.ndarray],
    *,
    batch: int,
    budget_s: float,
    n_texts_in_file: int,
    n_truncated: int,
) -> TextsResult:
    """Measure the lengths of real texts.

    Args:
        session: opened on the bundle.
        texts: packed ids ``[n_tokens]`` and ``cu_seqlens [n_texts + 1]``.
        batch: texts in a batch.
        budget_s: see :func:`sdt_deploy.bench.timing.interleave`.
        n_texts_in_file: for the record.
        n_truncated: for the record.
    """
    config = session.manifest.model
    everything = TokenBatch.from_packed(*texts, config=config)
    lengths = everything.lengths
    in_order = _batches(everything, np.arange(len(lengths)), batch)
    by_length = _batches(everything, np.argsort(lengths, kind="stable"), batch)

    def dense(batches: list[TokenBatch]) -> Callable[[], None]:
        calls = [padded_call(session, one, "dense") for one in batches]

        def run() -> None:
            for call in calls:
                call()

        return run

    def sparse(
        batches: list[TokenBatch], thresholds: tuple[float, ...] | None = None
    ) -> Callable[[], list[RunResult]]:
        return lambda: [
            session.run_batch(one, path="sparse", thresholds=thresholds) for one in batches
        ]

    times = interleave(
        {
            "dense_padded": dense(in_order),
            "dense_sorted": dense(by_length),
            "sparse": sparse(in_order),
            "sparse_sorted": sparse(by_length),
            "full_depth": sparse(in_order, (-1.0,) * config.n_layers),
        },
        budget_s=budget_s,
    )
    results = sparse(in_order)()
    needed = sum(routed_flops(config, one) for one in results)
    ms = {name: timed.median_ms for name, timed in times.items()}
    depth_sum = sum(int(result.depths.sum()) for result in results)
    return TextsResult(
        n_texts=len(lengths),
        n_texts_in_file=n_texts_in_file,
        n_truncated=n_truncated,
        n_tokens=int(lengths.sum()),
        batch=batch,
        mean_depth=depth_sum / int(lengths.sum()),
        flops_ratio=needed / dense_flops(config, lengths.tolist()),
        dense_padded_ms=ms["dense_padded"],
        dense_sorted_ms=ms["dense_sorted"],
        sparse_ms=ms["sparse"],
        sparse_sorted_ms=ms["sparse_sorted"],
        full_depth_ms=ms["full_depth"],
        spread_ms={name: timed.spread_ms for name, timed in times.items()},
        n_runs=times["sparse"].n_runs,
        ratio_padded=ms["sparse"] / ms["dense_padded"],
        ratio_sorted=ms["sparse_sorted"] / ms["dense_sorted"],
    )


def routed_flops(config: ModelConfig, result: RunResult) -> float:
    """Return the operations that the route of ``result`` needs."""
    return needed_flops(config, result.depths, result.cu_seqlens, result.active)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a call that makes the next of ``calls`` each time, over and over."""
    endless = cycle(calls)
    return lambda: next(endless)()


def padded_call(session: Session, batch: TokenBatch, path: PathName) -> Callable[[], None]:
    """Return a call of a whole-model graph with inputs and outputs bound beforehand."""
    config = session.manifest.model
    inputs, outputs = padded_arrays(config, batch, config.thresholds, path)
    backend = session.backend
    with backend.running():
        bound = backend.graph(path).bind(inputs, outputs)

    def call() -> None:
        with backend.running():
            bound()

    return call


def document(
    env: dict[str, Any],
    tokens: str,
    cases: Sequence[CaseResult],
    texts: TextsResult | None,
    bundle: Bundle,
) -> dict[str, Any]:
    """Return what ``bench --json`` prints, and what the report shows."""
    manifest = bundle.manifest
    return {
        "bundle": {
            "name": bundle.path.resolve().name,
            "model": manifest.model.to_dict(),
            "numbers": manifest.export.numbers,
            "provenance": manifest.provenance,
            "quality": manifest.quality,
        },
        "environment": {**env, "tokens": tokens},
        "cases": [asdict(case) for case in cases],
        "texts": None if texts is None else asdict(texts),
    }


def _batches(everything: TokenBatch, order: np.ndarray, size: int) -> list[TokenBatch]:
    return [select(everything, order[i : i + size]) for i in range(0, len(order), size)]
