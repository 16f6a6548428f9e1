"""What ``sdt-deploy bench`` measured, as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sdt_deploy.bench.charts import (
    Case,
    break_even,
    case_name,
    depth_chart,
    efficiency_chart,
    memory_chart,
    ratio_chart,
    stages_chart,
)
from sdt_deploy.description import quality_figures
from sdt_deploy.pages import Page


def report_page(document: Mapping[str, Any]) -> str:
    """Return the report.

    Args:
        document: what ``sdt-deploy bench --json`` prints.

    Raises:
        MissingExtraError: if vl-convert-python is not installed.
    """
    cases: Sequence[Case] = document["cases"]
    bundle, env = document["bundle"], document["environment"]
    model, first = bundle["model"], cases[0]
    page = Page(
        title=f"Sparse against dense: {bundle['name']}",
        subtitle=f"{model['n_layers']} layers, d_model {model['d_model']}, {bundle['numbers']}, "
        f"{first['backend']}, {env['n_threads']} threads, {env['processor']}, {env['date'][:10]}",
    )
    page.facts(_facts(cases, model["n_layers"]))
    page.heading("Time over tokens")
    page.text(
        "Time of the sparse model over that of the dense one: same process, same threads, "
        f"interleaved, medians, on {env['tokens']}. Below 1, sparse is faster. The dashed line "
        "counts operations instead of time, the dotted one only how many layers tokens pass "
        "through: the nearest that the measured line can come."
    )
    page.chart(ratio_chart(cases), says="Ratios of sparse to dense over the tokens of a batch")
    page.heading("Where the time goes")
    stages = stages_chart(cases)
    if stages is None:
        page.text(
            "Not measured in parts: on this backend the host does not wait between the stages."
        )
    else:
        page.text(
            "One sparse run in parts. Each stage processes its active tokens; copies move rows "
            "between stages, and the runtime plans the route and prepares the calls."
        )
        page.chart(stages, says="Milliseconds of each part of a sparse run")
    page.heading("Depth of the tokens")
    page.chart(depth_chart(cases), says="Share of tokens at each depth")
    page.heading("Efficiency")
    page.text("100 %: every operation that is saved saves its share of the time.")
    page.chart(efficiency_chart(cases), says="Efficiency of each case")
    page.heading("Memory")
    memory = memory_chart(cases)
    if memory is None:
        page.text("Not measured (--no-memory, or no system that tells).")
    else:
        page.text("Peak of one run above the loaded weights, each path in a process of its own.")
        page.chart(memory, says="Peak memory of dense and sparse in each case")
    page.heading("Accuracy")
    _accuracy(page, cases)
    page.heading("Quality")
    _quality(page, bundle["quality"])
    page.heading("All figures")
    page.table(_COLUMNS, map(_row, cases))
    _texts(page, document["texts"])
    page.heading("Environment")
    packages = {name: found for name, found in env["packages"].items() if found}
    page.definitions(
        {
            "date": env["date"],
            "processor": env["processor"],
            "GPUs": ", ".join(env["gpus"]) or "none",
            "cores, threads": f"{env['n_cores']}, {env['n_threads']}",
            "platform": f"{env['platform']}, Python {env['python']}",
            "packages": ", ".join(f"{name} {found}" for name, found in packages.items()),
            "source": bundle["provenance"].get("source", "unknown"),
            "licence": bundle["provenance"].get("license") or "unknown",
            "thresholds": ", ".join(f"{value:.4g}" for value in model["thresholds"]),
            "context": model["context"],
        }
    )
    page.code(env["command"])
    return page.to_html()


def _facts(cases: Sequence[Case], n_layers: int) -> dict[str, tuple[str, str]]:
    best = min(cases, key=lambda case: case["ratio"])
    worst = max(cases, key=lambda case: case["ratio"])
    depths = [case["mean_depth"] for case in cases]
    flips = [case["routing_flips"] for case in cases if case["routing_flips"] is not None]
    even = break_even(cases)
    if even is None:
        said = "not reached", "slower at the largest size measured"
    elif not even:
        said = f"below {min(case['n_tokens'] for case in cases)}", "faster at every size measured"
    else:
        said = f"{even:.0f} tokens", "interpolated between the sizes measured"
    return {
        "best ratio": (f"{best['ratio']:.2f}", f"at {case_name(best)}"),
        "worst ratio": (f"{worst['ratio']:.2f}", f"at {case_name(worst)}"),
        "break-even": said,
        "mean depth": (f"{min(depths):.2f}–{max(depths):.2f}", f"of {n_layers} layers"),
        "routing flips": (
            (str(sum(flips)), "tokens at another depth than in PyTorch")
            if flips
            else ("–", "not measured")
        ),
    }


def _accuracy(page: Page, cases: Sequence[Case]) -> None:
    measured = [case for case in cases if case["max_abs_error"] is not None]
    if not measured:
        page.text("Not measured: torch and onnx are not installed.")
        return
    page.text(
        "Against the PyTorch model at equal depths. A routing flip is a token that takes another "
        "depth than in PyTorch, because its score lies on a threshold."
    )
    page.table(
        ("case", "largest error", "routing flips", "tokens"),
        [
            (
                case_name(case),
                f"{case['max_abs_error']:.1e}",
                str(case["routing_flips"]),
                str(case["n_tokens"] * case["n_batches"]),
            )
            for case in measured
        ],
    )


def _quality(page: Page, quality: Mapping[str, Any] | None) -> None:
    if quality is None:
        page.text("Not evaluated. sdt-deploy evaluate compares the bundle with its dense teacher:")
        page.code("sdt-deploy evaluate BUNDLE --teacher MODEL --texts held-out.txt")
        return
    page.text("Beside the dense teacher on held-out text, as recorded in the bundle.")
    page.definitions(
        {name.replace("_", " "): value for name, value in quality_figures(quality).items()}
    )


_COLUMNS = (
    *("case", "dense ms", "sparse ms", "ratio", "single ms", "masked ms", "full depth ms"),
    *("auto ms", "auto path", "FLOPs ratio", "ideal", "depth", "µs a stage", "spread ms", "runs"),
)


def _row(case: Case) -> tuple[str, ...]:
    single = case["single_ms"]
    return (
        case_name(case),
        f"{case['dense_ms']:.2f}",
        f"{case['sparse_ms']:.2f}",
        f"{case['ratio']:.3f}",
        "–" if single is None else f"{single:.2f}",
        f"{case['masked_ms']:.2f}",
        f"{case['full_depth_ms']:.2f}",
        f"{case['auto_ms']:.2f}",
        case["auto_path"],
        f"{case['flops_ratio']:.3f}",
        f"{case['ideal_ratio']:.3f}",
        f"{case['mean_depth']:.2f}",
        f"{case['overhead_us']:.0f}",
        f"{case['spread_ms']['sparse']:.2f}",
        str(case["n_runs"]),
    )


def _texts(page: Page, texts: Mapping[str, Any] | None) -> None:
    if texts is None:
        return
    page.heading("Real lengths")
    page.text(
        f"{texts['n_texts']} of {texts['n_texts_in_file']} texts in batches of {texts['batch']}, "
        f"{texts['n_tokens']} tokens, {texts['n_truncated']} texts cut to the model's positions."
    )
    page.table(
        ("batches", "dense ms", "sparse ms", "ratio"),
        [
            (
                "in the order of the file",
                f"{texts['dense_padded_ms']:.2f}",
                f"{texts['sparse_ms']:.2f}",
                f"{texts['ratio_padded']:.3f}",
            ),
            (
                "of similar lengths",
                f"{texts['dense_sorted_ms']:.2f}",
                f"{texts['sparse_sorted_ms']:.2f}",
                f"{texts['ratio_sorted']:.3f}",
            ),
        ],
    )
