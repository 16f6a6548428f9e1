"""Routes and attention: equal to the oracle's, complete in the page, plain where nobody looks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vl_convert

from sdt_deploy.bundle import Bundle
from sdt_deploy.console import console
from sdt_deploy.errors import CheckpointError
from sdt_deploy.explain.attention import attention_weights, oracle_of
from sdt_deploy.explain.html import MAX_ATTENTION_TOKENS, explanation_page
from sdt_deploy.explain.routing import ExplainedText, explain
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.bench.test_html import charts
from tests.browser import fetched, needs_browser, rendered
from tests.samples import CONFIGS, ExportedModel, random_model
from tests.test_cli import call

Exported = Callable[[str], ExportedModel]
IDS = np.array([[3, 7, 11, 5, 2, 9, 30], [1, 2, 3, 4, 5, 6, 41]])


def explained(sample: ExportedModel) -> tuple[ExplainedText, ...]:
    with Session.open(sample.bundle) as session:
        return explain(session, IDS % sample.model.config.vocab_size)


@pytest.mark.parametrize("name", ["active-lm", "all-grouped"])
def test_routes_and_attention_are_the_oracles(exported: Exported, name: str) -> None:
    sample = exported(name)
    config = sample.model.config
    texts = explained(sample)
    assert len(texts) == 2
    for text in texts:
        cu_seqlens = np.array([0, len(text.input_ids)], dtype=np.int32)
        expected = oracle_output(sample.model, text.input_ids, cu_seqlens)
        np.testing.assert_array_equal(text.depths, expected.depths)
        np.testing.assert_allclose(text.scores, expected.scores, rtol=0, atol=1e-5)
        activity = text.active
        np.testing.assert_array_equal(activity, expected.active)
        weights = attention_weights(oracle_of(Bundle.open(sample.bundle)), text)
        shape = (config.n_layers, config.n_heads, len(text.tokens), len(text.tokens))
        assert weights.shape == shape
        for layer in range(config.n_layers):
            active = activity[:, layer]
            assert np.isnan(weights[layer][:, ~active]).all()
            rows = weights[layer][:, active]
            np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-5)
            if config.context == "active":
                assert (rows[:, :, ~active] == 0).all()
            else:
                assert (rows > 0).all()


def test_a_probe_for_each_layer(tmp_path: Path) -> None:
    """Tokens that leave and come back: the route is no depth, and every layer has a score."""
    config, _ = CONFIGS["all-embedding"]
    config = config.replace(routing="per_layer", leaving="skip")
    model = random_model(config, 1)
    bundle = memory_bundle(model)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        (text,) = explain(session, IDS[:1] % config.vocab_size)
    cu_seqlens = np.array([0, len(text.input_ids)], dtype=np.int32)
    expected = oracle_output(model, text.input_ids, cu_seqlens)
    np.testing.assert_array_equal(text.active, expected.active)
    assert text.scores.shape == text.active.shape
    weights = attention_weights(model, text)
    np.testing.assert_array_equal(~np.isnan(weights[:, 0, :, 0]).T, text.active)
    html = explanation_page("x", config, [text], lambda text: attention_weights(model, text))
    rows = charts(html)[0]["data"]["values"]
    assert [row["active"] == "active" for row in rows] == text.active.ravel().tolist()


def test_causal_attention_looks_back_only() -> None:
    config = CONFIGS["active-lm"][0].replace(causal=True)
    model = random_model(config, 1)
    bundle = memory_bundle(model)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        (text,) = explain(session, IDS[:1] % config.vocab_size)
    weights = np.nan_to_num(attention_weights(model, text))
    assert (np.triu(weights, 1) == 0).all()
    assert weights[0].sum() > 0


@torch.no_grad()
def test_first_layer_by_hand(exported: Exported) -> None:
    """Softmax of scaled products of the embeddings' queries and keys, head by head."""
    sample = exported("active-lm")
    text, model = explained(sample)[0], sample.model
    hidden = model.embed(torch.from_numpy(text.input_ids).long()[None])[0]
    block = model.blocks[0]
    if block.pre_norm:
        hidden = block.attention_norm(hidden)
    query, key = block.attention.query(hidden), block.attention.key(hidden)
    found = attention_weights(model, text)[0]
    active = text.depths > 0
    size = query.shape[1] // model.config.n_heads
    for head in range(model.config.n_heads):
        part = slice(head * size, (head + 1) * size)
        logits = (query[:, part] @ key[:, part].T)[:, active] / size**0.5
        expected = logits.softmax(dim=-1).numpy()[active]
        np.testing.assert_allclose(found[head][np.ix_(active, active)], expected, atol=1e-5)


def test_another_model_is_refused(exported: Exported) -> None:
    bundle = Bundle.open(exported("active-lm").bundle)
    assert oracle_of(bundle, exported("active-lm").native).config == bundle.manifest.model
    with pytest.raises(CheckpointError, match="configurations differ"):
        oracle_of(bundle, exported("all-grouped").native)


@pytest.fixture(scope="module")
def page(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sample = exported("active-lm")
    path = tmp_path_factory.mktemp("explain") / "routes.html"
    texts = explained(sample)
    html = explanation_page(
        "a <bundle>", sample.model.config, texts, lambda text: attention_weights(sample.model, text)
    )
    path.write_text(html)
    return path


def test_the_page_shows_all(exported: Exported, page: Path) -> None:
    sample = exported("active-lm")
    config, html = sample.model.config, page.read_text()
    assert fetched(html) == []
    assert "a &lt;bundle&gt;" in html
    tips = [unescape(tip) for tip in re.findall(r'data-tip="([^"]*)"', html)]
    texts = explained(sample)
    marks = [
        (f"score {score:.4f}\ndepth {depth} of", "■" * depth + "□" * (config.n_layers - depth))
        for text in texts
        for score, depth in zip(text.scores, text.depths, strict=True)
    ]
    assert len(tips) == len(marks)
    for tip, (said, layers) in zip(tips, marks, strict=True):
        assert said in tip
        assert layers in tip
    drawn = charts(html)
    assert len(drawn) == 2 * len(texts)
    for chart in drawn:
        assert "<path" in vl_convert.vegalite_to_svg({**chart, "width": 400})
    weights = attention_weights(sample.model, texts[0])
    rows = {(row["layer"], row["head"]): row["w"] for row in drawn[1]["data"]["values"]}
    assert len(rows) == config.n_layers * config.n_heads
    for (layer, head), values in rows.items():
        shown = np.array(values, dtype=float).reshape(weights.shape[2:])
        np.testing.assert_allclose(shown, weights[layer, head], atol=5.1e-4)


def test_long_texts_have_no_maps(exported: Exported) -> None:
    config = exported("active-lm").model.config
    n = MAX_ATTENTION_TOKENS + 1
    text = ExplainedText(
        tokens=("x",) * n,
        input_ids=np.zeros(n, np.int32),
        scores=np.zeros(n, np.float32),
        active=np.zeros((n, config.n_layers), np.bool_),
    )

    def never(_: ExplainedText) -> Any:
        raise AssertionError

    html = explanation_page("x", config, [text], never)
    assert "Attention is not drawn" in html
    assert len(charts(html)) == 1


@needs_browser
def test_a_browser_draws_it(page: Path) -> None:
    dom, said = rendered(page, width=500, dark=True)
    assert said == []
    assert dom.count('class="marks"') == 4
    assert dom.count('type="range"') == 4


def test_in_a_terminal_and_not(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = exported("active-lm")
    np.save(tmp_path / "ids.npy", IDS)
    arguments = ("explain", sample.bundle, "--ids", tmp_path / "ids.npy")
    n_layers = sample.model.config.n_layers
    lines = [line.split("\t") for line in call(*arguments).splitlines()]
    found = json.loads(call(*arguments, "--json"))
    assert len(lines) == IDS.size
    flat = [
        [str(number), token, f"{score:.4f}", str(depth), "#" * depth + "." * (n_layers - depth)]
        for number, text in enumerate(found["texts"], 1)
        for token, score, depth in zip(text["tokens"], text["scores"], text["depths"], strict=True)
    ]
    assert lines == flat
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", 1)
    text = call(*arguments)
    assert "\x1b[" in text
    assert "active tokens of each layer" in text
    assert "give one of" in call("explain", sample.bundle, code=2)
