"""The charts of a report, as Vega-Lite specifications: pure functions of the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Case = Mapping[str, Any]
"""One of ``cases`` in what ``sdt-deploy bench --json`` prints."""
COLOURS = ("#2f81d6", "#e0823d", "#3fa66b", "#b65fcf", "#8a939e")
"""Told apart by most people with a colour deficiency, on white and on black."""
_NEUTRAL = "#8a939e"


def case_name(case: Case) -> str:
    """Return ``BATCHxSEQ``."""
    return f"{case['batch']}x{case['seq']}"


def break_even(cases: Sequence[Case]) -> float | None:
    """Return the number of tokens from which on sparse is faster than dense.

    Between two measured sizes the ratio is taken to be a line over the logarithm of the tokens; of
    several cases with as many tokens the slowest counts. 0: it is faster at every measured size;
    None: it is not at the largest.
    """
    slowest: dict[int, float] = {}
    for case in cases:
        tokens = case["n_tokens"]
        slowest[tokens] = max(case["ratio"], slowest.get(tokens, 0.0))
    points = sorted(slowest.items())
    losing = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
    if not losing:
        return 0.0
    if losing[-1] == len(points) - 1:
        return None
    (low, above), (high, below) = points[losing[-1] : losing[-1] + 2]
    part = (above - 1) / (above - below)
    return math.exp(math.log(low) + part * (math.log(high) - math.log(low)))


def ratio_chart(cases: Sequence[Case]) -> dict[str, Any]:
    """Draw the measured ratios over tokens, with what operations and depths would allow."""
    lines = {
        "measured: sparse / dense": "ratio",
        "measured: auto / dense": "auto_ratio",
        "operations: sparse / dense": "flops_ratio",
        "ideal: active layer-tokens / all": "ideal_ratio",
    }
    ordered = sorted(cases, key=lambda case: (case["n_tokens"], case["seq"]))
    rows = [
        {"case": case_name(case), "tokens": case["n_tokens"], "ratio": case[key], "line": name}
        for name, key in lines.items()
        for case in ordered
    ]
    even = break_even(cases)
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"ratio": 1, "label": "dense"}]},
            "layer": [
                {"mark": {"type": "rule", "size": 1.5}},
                {
                    "mark": {"type": "text", "align": "left", "dx": 4, "dy": -7},
                    "encoding": {"x": {"value": 0}, "text": {"field": "label"}},
                },
            ],
            "encoding": {"y": {"field": "ratio", "type": "quantitative"}},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "line", "point": {"size": 45}},
            "encoding": {
                "x": {
                    "field": "tokens",
                    "type": "quantitative",
                    "title": "tokens in the batch",
                    "scale": {"type": "log", "base": 2, "nice": False, "padding": 12},
                    "axis": {
                        "values": sorted({case["n_tokens"] for case in cases}),
                        "format": "d",
                        "grid": False,
                        "labelOverlap": "greedy",
                    },
                },
                "y": {
                    "field": "ratio",
                    "type": "quantitative",
                    "title": "time or operations, over those of dense",
                    "scale": {"domainMin": 0},
                },
                "color": {
                    "field": "line",
                    "type": "nominal",
                    "title": None,
                    "legend": {"symbolType": "stroke", "symbolStrokeWidth": 2.5},
                    "scale": {"domain": list(lines), "range": list(COLOURS[:4])},
                },
                "strokeDash": {
                    "field": "line",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": list(lines), "range": [[1, 0], [1, 0], [6, 4], [2, 3]]},
                },
                "order": {"field": "tokens"},
                "tooltip": [
                    {"field": "line", "title": "line"},
                    {"field": "case", "title": "batch x sequence"},
                    {"field": "tokens", "title": "tokens"},
                    {"field": "ratio", "title": "ratio", "format": ".3f"},
                ],
            },
        },
    ]
    if even:
        layers.append(
            {
                "data": {"values": [{"tokens": even, "label": f"break-even: {even:.0f} tokens"}]},
                "layer": [
                    {"mark": {"type": "rule", "strokeDash": [3, 3]}},
                    {
                        "mark": {"type": "text", "align": "left", "dx": 5, "dy": 8},
                        "encoding": {"y": {"value": 0}, "text": {"field": "label"}},
                    },
                ],
                "encoding": {"x": {"field": "tokens", "type": "quantitative"}},
            }
        )
    return {"height": 320, "layer": layers}


def _chosen(cases: Sequence[Case]) -> dict[str, Any]:
    """Return a parameter with which the reader chooses a case; first the one of most tokens."""
    largest = max(cases, key=lambda case: case["n_tokens"])
    return {
        "name": "chosen",
        "value": case_name(largest),
        "bind": {"input": "select", "options": list(map(case_name, cases)), "name": "case "},
    }


def stages_chart(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Draw the time of every part of a sparse run, stages with their active tokens.

    None if no case was measured in parts.
    """
    timed = [case for case in cases if case["parts_ms"]]
    if not timed:
        return None
    rows = []
    for case in timed:
        for part, ms in case["parts_ms"].items():
            active = case["stage_tokens"].get(part)
            label = f"{ms:.2f} ms"
            if active is not None:
                label += f" · {active:.0f} of {case['n_tokens']} tokens"
            rows.append(
                {
                    "case": case_name(case),
                    "part": part,
                    "ms": ms,
                    "kind": "engine" if part not in ("copies", "runtime") else "runtime",
                    "label": label,
                    "tokens": "" if active is None else f"{active:.0f}",
                }
            )
    parts = list(timed[0]["parts_ms"])
    return {
        "height": 26 * len(parts),
        "params": [_chosen(timed)],
        "data": {"values": rows},
        "transform": [{"filter": "datum.case == chosen"}],
        "encoding": {
            "y": {"field": "part", "type": "nominal", "sort": parts, "title": None},
            "x": {"field": "ms", "type": "quantitative", "title": "median milliseconds"},
        },
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 2, "opacity": 0.6},
                "encoding": {
                    "color": {
                        "field": "kind",
                        "type": "nominal",
                        "title": None,
                        "scale": {"domain": ["engine", "runtime"], "range": list(COLOURS[:2])},
                    },
                    "tooltip": [
                        {"field": "part", "title": "part"},
                        {"field": "ms", "title": "milliseconds", "format": ".3f"},
                        {"field": "tokens", "title": "active tokens"},
                    ],
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 6},
                "encoding": {"x": {"value": 0}, "text": {"field": "label"}},
            },
        ],
    }


def depth_chart(cases: Sequence[Case]) -> dict[str, Any]:
    """Draw the share of tokens at each depth."""
    rows = [
        {"case": case_name(case), "depth": depth, "share": count / sum(case["depth_histogram"])}
        for case in cases
        for depth, count in enumerate(case["depth_histogram"])
    ]
    return {
        "height": 200,
        "params": [_chosen(cases)],
        "data": {"values": rows},
        "transform": [{"filter": "datum.case == chosen"}],
        "mark": {"type": "bar", "cornerRadiusEnd": 2, "color": COLOURS[0]},
        "encoding": {
            "x": {
                "field": "depth",
                "type": "ordinal",
                "title": "depth: layers a token passes through",
                "axis": {"labelAngle": 0},
            },
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "share of tokens",
                "axis": {"format": "%"},
            },
            "tooltip": [
                {"field": "depth", "title": "depth"},
                {"field": "share", "title": "share of tokens", "format": ".1%"},
            ],
        },
    }


def memory_chart(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Draw the peak memory above the weights; None if it was not measured."""
    rows = [
        {"case": case_name(case), "path": path, "MB": case[f"{path}_peak_bytes"] / 1e6}
        for case in cases
        for path in ("dense", "sparse")
        if case[f"{path}_peak_bytes"] is not None
    ]
    if not rows:
        return None
    return {
        "height": 220,
        "data": {"values": rows},
        "mark": {"type": "bar", "cornerRadiusEnd": 2},
        "encoding": {
            **_by_case(cases),
            "xOffset": {"field": "path"},
            "y": {"field": "MB", "type": "quantitative", "title": "peak above the weights, MB"},
            "color": {
                "field": "path",
                "type": "nominal",
                "title": None,
                "scale": {"domain": ["dense", "sparse"], "range": [_NEUTRAL, COLOURS[0]]},
            },
            "tooltip": [
                {"field": "case", "title": "batch x sequence"},
                {"field": "path", "title": "path"},
                {"field": "MB", "title": "MB", "format": ".1f"},
            ],
        },
    }


def efficiency_chart(cases: Sequence[Case]) -> dict[str, Any]:
    """Draw how much of the saved operations became saved time."""
    rows = [{"case": case_name(case), "efficiency": case["efficiency"]} for case in cases]
    return {
        "height": 200,
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "bar", "cornerRadiusEnd": 2, "color": COLOURS[2]},
                "encoding": {
                    **_by_case(cases),
                    "y": {
                        "field": "efficiency",
                        "type": "quantitative",
                        "title": "FLOPs ratio / measured ratio",
                        "axis": {"format": "%"},
                    },
                    "tooltip": [
                        {"field": "case", "title": "batch x sequence"},
                        {"field": "efficiency", "title": "efficiency", "format": ".1%"},
                    ],
                },
            },
            {"mark": {"type": "rule", "strokeDash": [3, 3]}, "encoding": {"y": {"datum": 1}}},
        ],
    }


def _by_case(cases: Sequence[Case]) -> dict[str, Any]:
    return {
        "x": {
            "field": "case",
            "type": "nominal",
            "sort": list(map(case_name, cases)),
            "title": "batch x sequence",
            "axis": {"labelAngle": -45 if len(cases) > 6 else 0},
        }
    }
