"""The report: complete, in one file, and drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.bench.charts import break_even
from sdt_deploy.bench.html import report_page
from sdt_deploy.bench.parts import median_parts, parts_of
from sdt_deploy.bench.run import BenchOptions, run_bench
from sdt_deploy.pages import Page
from sdt_deploy.runtime.result import Timings
from sdt_deploy.runtime.session import Session
from tests.browser import fetched, needs_browser, rendered
from tests.samples import ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]


@pytest.fixture(scope="module")
def measured(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``report.html`` and ``bench.json``."""
    path = tmp_path_factory.mktemp("report")
    options = BenchOptions(
        cases="1x3,2x20",
        budget_s=0.1,
        with_memory=True,
        report_file=path / "report.html",
        json_file=path / "bench.json",
    )
    run_bench(exported("active-lm").bundle, options)
    return path


@pytest.fixture(scope="module")
def document(measured: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((measured / "bench.json").read_text())
    return found


def charts(html: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="charts">(.*?)</script>', html)
    assert match is not None
    found: list[dict[str, Any]] = json.loads(match[1])
    return found


def test_everything_is_in_one_file(measured: Path, document: dict[str, Any]) -> None:
    html = (measured / "report.html").read_text()
    assert html == report_page(document)
    assert fetched(html) == []
    for case in document["cases"]:
        for value in (
            *(f"{case['batch']}x{case['seq']}", f"{case['ratio']:.3f}", f"{case['dense_ms']:.2f}"),
            *(f"{case['max_abs_error']:.1e}", f"{case['flops_ratio']:.3f}"),
        ):
            assert f">{value}</td>" in html
    env = document["environment"]
    for text in (env["processor"], env["date"], f"numpy {env['packages']['numpy']}"):
        assert text in html
    assert "Not evaluated" in html
    drawn = charts(html)
    assert len(drawn) == 5
    for chart in drawn:
        svg = vl_convert.vegalite_to_svg({**chart, "width": 600})
        assert svg.count("<path") > 2


def test_charts_show_the_figures(measured: Path, document: dict[str, Any]) -> None:
    ratios, stages, depths, _, memory = charts((measured / "report.html").read_text())
    cases = document["cases"]
    lines = ratios["layer"][1]["data"]["values"]
    assert {row["ratio"] for row in lines if row["line"].startswith("ideal")} == {
        case["ideal_ratio"] for case in cases
    }
    rows = stages["data"]["values"]
    for case in cases:
        name = f"{case['batch']}x{case['seq']}"
        mine = [row for row in rows if row["case"] == name]
        assert [row["part"] for row in mine] == list(case["parts_ms"])
        assert sum(1 for row in mine if row["tokens"]) == case["n_stages"]
        active = sum(case["stage_tokens"].values())
        assert active == pytest.approx(case["mean_depth"] * case["n_tokens"])
        shares = [row["share"] for row in depths["data"]["values"] if row["case"] == name]
        assert sum(shares) == pytest.approx(1)
    assert len(memory["data"]["values"]) == 2 * len(cases)


def test_a_report_of_less(document: dict[str, Any]) -> None:
    """Without memory, accuracy and parts; with a quality record, and names that are no HTML."""
    cases = [
        {
            **case,
            **dict.fromkeys(("dense_peak_bytes", "sparse_peak_bytes", "max_abs_error")),
            **dict.fromkeys(("routing_flips", "parts_ms", "single_ms")),
        }
        for case in document["cases"]
    ]
    bundle = {**document["bundle"], "name": "</script><b>", "quality": {"mean_cosine": 0.91234}}
    html = report_page({**document, "cases": cases, "bundle": bundle})
    assert len(charts(html)) == 3
    assert "0.9123" in html
    assert "<b></h1>" not in html
    assert html.count("Not measured") == 3


def test_charts_cannot_leave_their_script() -> None:
    page = Page(title="x")
    page.chart({"title": "</script><!--"}, says="nothing")
    assert charts(page.to_html()) == [{"title": "</script><!--"}]


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (500, True)])
def test_a_browser_draws_it(measured: Path, width: int, dark: bool) -> None:
    dom, said = rendered(measured / "report.html", width=width, dark=dark)
    assert said == []
    assert dom.count('class="marks"') == 5
    ink = {dark: "#e6edf3", not dark: "#1c2128"}
    assert f'fill="{ink[True]}"' in dom
    assert f'fill="{ink[False]}"' not in dom


def case(n_tokens: int, ratio: float) -> dict[str, Any]:
    return {"n_tokens": n_tokens, "ratio": ratio}


def test_break_even() -> None:
    assert break_even([case(40, 0.9), case(80, 0.8)]) == 0
    assert break_even([case(40, 1.2), case(80, 1.0)]) is None
    assert break_even([case(160, 0.5), case(40, 1.5)]) == pytest.approx(80)
    assert break_even([case(10, 1.2), case(10, 0.7), case(1000, 0.8)]) == pytest.approx(100)
    assert break_even([case(10, 0.9), case(20, 1.1), case(40, 0.9)]) == pytest.approx(800**0.5)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.1, 3)), min_size=1, max_size=9))
def test_beyond_break_even_sparse_is_faster(points: list[tuple[int, float]]) -> None:
    even = break_even([case(*point) for point in points])
    if even is None:
        assert max(ratio for n, ratio in points if n == max(points)[0]) >= 1
    else:
        assert all(ratio < 1 for n, ratio in points if n > even * (1 + 1e-9))


def test_parts_are_the_whole(exported: Exported) -> None:
    sample = exported("all-grouped")
    names = ["stage-00", "stage-01"]
    with Session.open(sample.bundle, max_padded_tokens=16) as session:
        batch = random_batch(sample.model.config, [9, 5, 12], 0)
        timings = session.run_batch(batch, path="sparse").timings
        assert len(timings.stages) == len(timings.stage_ms) > len(names)
        parts = parts_of(timings, names)
    assert list(parts) == ["entry", *names, "head", "copies", "runtime"]
    assert sum(parts.values()) == pytest.approx(timings.total_ms)
    assert sum(parts[name] for name in names) == pytest.approx(sum(timings.stage_ms))


def test_parts_of_runs_without_them() -> None:
    assert median_parts([Timings(total_ms=1.0)], ["stage-00"]) is None
    runs = [Timings(total_ms=4, stage_ms=(n,), stages=(0,)) for n in (1.0, 2.0, 3.0)]
    found = median_parts(runs, ["stage-00", "stage-01"])
    assert found is not None
    assert (found["stage-00"], found["stage-01"], found["runtime"]) == (2, 0, 2)
