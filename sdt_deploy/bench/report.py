"""The benchmark as a table, and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from sdt_deploy.bench.benchmark import CaseResult, TextsResult
from sdt_deploy.extras import require
from sdt_deploy.files import write_file


def table(cases: Sequence[CaseResult]) -> Table:
    """Lay out the results; ``ratio``, ``beside`` and ``single`` are times over that of dense.

    Both of the latter would not fit into 80 columns.
    """
    title = "sparse against dense: median ms; µs of the runtime per stage"
    result = Table(title=title, padding=(0, 0, 0, 1))
    two = any(case.beside_ms is not None for case in cases)
    other = "beside" if two else "single"
    columns = ("case", "dense", "sparse", "ratio", other, "FLOPs", "full", "auto", "µs", "depth")
    for name in (*columns, "error"):
        result.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        flips = f" +{case.routing_flips} flips" if case.routing_flips else ""
        error = "-" if case.max_abs_error is None else f"{case.max_abs_error:.0e}{flips}"
        style = "green" if case.ratio < 1 else "red"
        result.add_row(
            f"{case.batch}x{case.seq}",
            f"{case.dense_ms:.2f}",
            f"{case.sparse_ms:.2f}",
            f"[{style}]{case.ratio:.2f}[/{style}]",
            _ratio(case.beside_ms if two else case.single_ms, case.dense_ms),
            f"{case.flops_ratio:.2f}",
            f"{case.full_depth_ms / case.dense_ms:.2f}",
            f"{case.auto_ratio:.2f}",
            f"{case.overhead_us:.0f}",
            f"{case.mean_depth:.2f}",
            error,
        )
    return result


def _ratio(part_ms: float | None, dense_ms: float) -> str:
    return "-" if part_ms is None else f"{part_ms / dense_ms:.2f}"


def remarks(cases: Sequence[CaseResult], texts: TextsResult | None) -> list[str]:
    """Say in words where sparse wins and where it loses."""
    lines = []
    losing = [f"{case.batch}x{case.seq} ({case.ratio:.2f})" for case in cases if case.ratio >= 1]
    if losing:
        lines.append(f"sparse is slower than dense at: {', '.join(losing)}")
    elif cases:
        lines.append("sparse is faster than dense in every case")
    auto = [f"{c.batch}x{c.seq} ({c.auto_ratio:.2f})" for c in cases if c.auto_ratio > 1.02]
    if auto:
        lines.append(f'path="auto" is slower than dense by more than 2 % at: {", ".join(auto)}')
    flips = sum(case.routing_flips or 0 for case in cases)
    if flips:
        lines.append(f"{flips} tokens took another depth than in the PyTorch model")
    if cases and cases[0].max_abs_error is None:
        lines.append("accuracy was not measured: torch and onnx are not installed")
    more_memory = [
        f"{c.batch}x{c.seq} ({c.sparse_peak_bytes / c.dense_peak_bytes:.2f})"
        for c in cases
        if c.sparse_peak_bytes and c.dense_peak_bytes and c.sparse_peak_bytes > c.dense_peak_bytes
    ]
    if more_memory:
        lines.append(f"sparse needs more memory than dense at: {', '.join(more_memory)}")
    if texts is not None:
        cut = f", {texts.n_truncated} of them cut to length" if texts.n_truncated else ""
        lines.append(
            f"{texts.n_texts} of {texts.n_texts_in_file} real texts{cut}, in batches of "
            f"{texts.batch}: sparse takes {texts.ratio_padded:.2f} of the time of padded dense "
            f"(packing alone, at full depth: {texts.full_depth_ms / texts.dense_padded_ms:.2f}); "
            f"with batches of similar length {texts.ratio_sorted:.2f} of dense "
            f"(FLOPs {texts.flops_ratio:.2f})"
        )
    return lines


def plot(cases: Sequence[CaseResult], path: Path) -> None:
    """Draw measured, FLOPs and ideal ratios over the number of tokens, as PNG.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if ``path`` cannot be written.
    """
    require("matplotlib", extra="demo", purpose="Drawing the plot")
    from matplotlib.figure import Figure

    ordered = sorted(cases, key=lambda case: case.n_tokens)
    tokens = [case.n_tokens for case in ordered]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1.0, color="0.4", linewidth=1)
    axes.annotate("dense", (tokens[0], 1.0), xytext=(0, 3), textcoords="offset points", color="0.4")
    axes.plot(tokens, [c.ratio for c in ordered], "o-", label="measured: sparse / dense")
    axes.plot(tokens, [c.auto_ratio for c in ordered], ".-", label="measured: auto / dense")
    axes.plot(tokens, [c.flops_ratio for c in ordered], "--", label="operations: sparse / dense")
    axes.plot(
        tokens, [c.ideal_ratio for c in ordered], ":", label="ideal: active layer-tokens / all"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(tokens)), labels=[str(n) for n in sorted(set(tokens))])
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    axes.set_xlabel("tokens in the batch")
    axes.set_ylabel("ratio")
    first, depths = ordered[0], [case.mean_depth for case in ordered]
    axes.set_title(
        f"mean depth {min(depths):.1f} to {max(depths):.1f} of {len(first.depth_histogram) - 1}, "
        f"{first.backend}, {first.precision}"
    )
    axes.legend(loc="lower right")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    write_file(path, stream.getvalue())
