"""Routes and attention as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from sdt_deploy.config import ModelConfig
from sdt_deploy.explain.routing import ExplainedText
from sdt_deploy.pages import Page

MAX_ATTENTION_TOKENS = 80
"""Maps of longer texts have cells too small to see, and make the file large."""
MAX_ATTENTION_NUMBERS = 2_000_000
"""Weights that one page holds, some 5 MB of it."""
Weights = Callable[[ExplainedText], npt.NDArray[np.float32]]
"""Gives the attention weights of a text, see
:func:`sdt_deploy.explain.attention.attention_weights`."""
_COLOURS = np.array([(0xFF, 0xF3, 0xC4), (0x56, 0xBC, 0xC4), (0x0B, 0x4F, 0x8A)])
"""From shallow to deep; what lies between is mixed."""
_STYLE = """<style>
.tokens { line-height: 2.1; overflow-wrap: anywhere; }
.token { padding: .15rem .35rem; border-radius: .3rem; cursor: default; white-space: pre; }
.token:focus { outline: 2px solid var(--ink); }
.token:hover::after, .token:focus::after { content: attr(data-tip); position: fixed; z-index: 1;
  left: 50%; bottom: 1rem; transform: translateX(-50%); background: var(--ink);
  color: var(--back); border-radius: .4rem; padding: .5rem .9rem; font-size: .9rem;
  line-height: 1.5; white-space: pre; max-width: 94vw; }
</style>"""


def explanation_page(
    name: str, config: ModelConfig, texts: Sequence[ExplainedText], weights: Weights | None
) -> str:
    """Return the page.

    Args:
        name: of the bundle.
        config: its model.
        texts: at least one.
        weights: None leaves the attention out.

    Raises:
        MissingExtraError: if vl-convert-python is not installed.
    """
    n_tokens = sum(len(text.tokens) for text in texts)
    mean_depth = sum(int(text.depths.sum()) for text in texts) / n_tokens
    page = Page(
        title=f"Where tokens go: {name}",
        subtitle=f"{len(texts)} text{'s' * (len(texts) > 1)}, {n_tokens} tokens, "
        f"mean depth {mean_depth:.2f} of {config.n_layers} layers; context {config.context}",
    )
    page.html(_STYLE)
    page.text(
        "The colour of a token is its depth: how many layers it passes through. Its score, from "
        "a linear probe, decides. Point at a token, or tap it, for score and layers."
    )
    page.html(
        '<p class="tokens">depth '
        + " ".join(_token(str(depth), depth, config, "") for depth in range(config.n_layers + 1))
        + "</p>"
    )
    left = MAX_ATTENTION_NUMBERS
    for number, text in enumerate(texts, 1):
        page.heading(f"Text {number}: mean depth {text.mean_depth:.2f}")
        page.html(f'<p class="tokens">{_tokens(text, config)}</p>')
        page.chart(layers_chart(text, config), says="Layers that process each token")
        if weights is None:
            continue
        size = len(text.tokens) ** 2 * config.n_layers * config.n_heads
        if len(text.tokens) > MAX_ATTENTION_TOKENS or size > left:
            page.text(
                f"Attention is not drawn: maps are for texts of up to {MAX_ATTENTION_TOKENS} "
                f"tokens, and for as many as {MAX_ATTENTION_NUMBERS} weights fit."
            )
            continue
        left -= size
        page.text(
            "Attention of the PyTorch model on this route: what each active token (row) takes "
            "from every other (column). Rows of tokens that the layer skips are empty."
        )
        page.chart(attention_chart(text, weights(text)), says="Attention of one layer and head")
    return page.to_html()


def _tokens(text: ExplainedText, config: ModelConfig) -> str:
    spans = []
    for token, score, active in zip(text.tokens, text.scores, text.active, strict=True):
        marks, depth = "".join("■" if taken else "□" for taken in active), int(active.sum())
        shown = " ".join(f"{one:.4f}" for one in np.atleast_1d(score))
        tip = f"{token}\nscore {shown}\ndepth {depth} of {config.n_layers}\nlayers {marks}"
        spans.append(_token(token, depth, config, tip))
    return " ".join(spans)


def _token(text: str, depth: int, config: ModelConfig, tip: str) -> str:
    place = depth / config.n_layers
    colour = np.array([np.interp(place, (0, 0.5, 1), part) for part in _COLOURS.T])
    back = "#" + "".join(f"{int(part):02x}" for part in colour)
    ink = "#000" if colour @ np.array((0.299, 0.587, 0.114)) > 140 else "#fff"
    more = f' tabindex="0" data-tip="{escape(tip)}"' if tip else ""
    return f'<span class="token" style="background:{back};color:{ink}"{more}>{escape(text)}</span>'


def _token_axis(title: str, n_tokens: int) -> dict[str, Any]:
    return {
        "title": title,
        "labelExpr": "tokens[datum.value]",
        "labelLimit": 90,
        "labels": n_tokens <= MAX_ATTENTION_TOKENS,
        "ticks": False,
    }


def layers_chart(text: ExplainedText, config: ModelConfig) -> dict[str, Any]:
    """Draw tokens × layers; cells of active tokens have the colour of their score."""
    scores = text.scores
    if scores.ndim == 1:
        scores = np.repeat(scores[:, None], config.n_layers, axis=1)
    rows = [
        {
            "token": i,
            "name": token,
            "layer": layer,
            "score": round(float(scores[i, layer]), 4),
            "active": "active" if text.active[i, layer] else "skipped",
        }
        for i, token in enumerate(text.tokens)
        for layer in range(config.n_layers)
    ]
    return {
        "height": max(60, 22 * config.n_layers),
        "params": [{"name": "tokens", "value": list(text.tokens)}],
        "data": {"values": rows},
        "mark": {"type": "rect", "stroke": "#8a939e", "strokeWidth": 0.3},
        "encoding": {
            "x": {
                "field": "token",
                "type": "ordinal",
                "axis": {**_token_axis("", len(text.tokens)), "labelAngle": -60},
            },
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "sort": "descending"},
            "color": {
                "condition": {
                    "test": "datum.active == 'active'",
                    "field": "score",
                    "type": "quantitative",
                    "title": "score",
                    "scale": {"domain": [0, 1], "range": ["#cfe3f7", "#0b4f8a"]},
                },
                "value": "transparent",
            },
            "tooltip": [
                {"field": "name", "title": "token"},
                {"field": "layer", "title": "layer"},
                {"field": "active", "title": "is"},
                {"field": "score", "title": "score", "format": ".4f"},
            ],
        },
    }


def attention_chart(text: ExplainedText, weights: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Draw queries × keys of the layer and head that the reader chooses.

    Args:
        text: whose tokens they are.
        weights: ``[n_layers, n_heads, n_tokens, n_tokens]``; NaN: not processed.
    """
    n_layers, n_heads, n_tokens, _ = weights.shape
    rows = [
        {
            "layer": layer,
            "head": head,
            "w": [None if np.isnan(w) else round(float(w), 3) for w in m],
        }
        for layer in range(n_layers)
        for head, m in enumerate(weights[layer].reshape(n_heads, -1))
    ]
    chosen = [
        {
            "name": f"chosen_{name}",
            "value": 0,  # the first layer has the most rows
            "bind": {"input": "range", "min": 0, "max": count - 1, "step": 1, "name": name},
        }
        for name, count in (("layer", n_layers), ("head", n_heads))
    ]
    return {
        "height": max(160, 16 * n_tokens),
        "params": [{"name": "tokens", "value": list(text.tokens)}, *chosen],
        "data": {"values": rows},
        "transform": [
            {"filter": "datum.layer == chosen_layer && datum.head == chosen_head"},
            {"flatten": ["w"]},
            {"window": [{"op": "row_number", "as": "n"}]},
            {"calculate": f"floor((datum.n - 1) / {n_tokens})", "as": "query"},
            {"calculate": f"(datum.n - 1) % {n_tokens}", "as": "key"},
            {"calculate": "tokens[datum.query] + ' → ' + tokens[datum.key]", "as": "pair"},
            {"filter": "datum.w != null"},
        ],
        "mark": "rect",
        "encoding": {
            "x": {
                "field": "key",
                "type": "ordinal",
                "scale": {"domain": list(range(n_tokens))},
                "axis": {**_token_axis("", n_tokens), "labelAngle": -60},
            },
            "y": {
                "field": "query",
                "type": "ordinal",
                "scale": {"domain": list(range(n_tokens))},
                "axis": _token_axis("", n_tokens),
            },
            "color": {
                "field": "w",
                "type": "quantitative",
                "title": "attention",
                "scale": {"scheme": "viridis"},
            },
            "tooltip": [
                {"field": "pair", "title": "from → to"},
                {"field": "w", "title": "attention", "format": ".3f"},
            ],
        },
    }
