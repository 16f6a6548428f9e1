from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.probe import (
    TokenFeatures,
    _attention_received,
    depth_shares,
    fit_probe,
    joined,
    padded_batches,
    set_thresholds,
    token_features,
    widest_gap,
)
from tests.samples import random_model


def config(n_layers: int = 6, **changes: object) -> ModelConfig:
    values = {
        "vocab_size": 30,
        "d_model": 12,
        "n_heads": 2,
        "d_ff": 16,
        "max_positions": 40,
        "n_layers": n_layers,
        **changes,
    }
    return ModelConfig(**values)


@given(
    n_layers=st.integers(1, 24),
    where=st.floats(0, 1),
    levels=st.sampled_from(["graded", "two-level"]),
)
def test_shares_have_the_wanted_mean(n_layers: int, where: float, levels: str) -> None:
    mean = 1 + where * (n_layers - 1)
    shares = depth_shares(n_layers, mean, levels)  # type: ignore[arg-type]
    assert shares.min() >= 0
    assert shares.sum() == pytest.approx(1)
    assert shares @ np.arange(1, n_layers + 1) == pytest.approx(mean, abs=1e-3)
    if levels == "two-level":
        assert np.count_nonzero(shares[1:-1]) == 0


def test_a_mean_out_of_reach() -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        depth_shares(6, 0.5, "graded")
    scores = np.linspace(0.1, 0.9, 50, dtype=np.float32)
    with pytest.raises(ConfigError, match="target depth"):
        set_thresholds(scores, 0.1, config(), 7.0, "graded")
    with pytest.raises(ConfigError, match="cannot be reached"):
        set_thresholds(scores, 0.5, config(), 2.0, "graded")


@given(
    seed=st.integers(0, 1000),
    target=st.floats(2, 5.5),
    pinned=st.sampled_from([0.0, 0.1]),
    levels=st.sampled_from(["graded", "two-level"]),
)
@settings(max_examples=50)
def test_thresholds_give_the_target_depth_and_lie_in_gaps(
    seed: int, target: float, pinned: float, levels: str
) -> None:
    rng = np.random.default_rng(seed)
    scores = (1 / (1 + np.exp(-rng.standard_normal(4000)))).astype(np.float32)
    thresholds = set_thresholds(scores, pinned, config(), target, levels)  # type: ignore[arg-type]
    model_config = config(thresholds=thresholds)
    limits = np.array(model_config.thresholds, dtype=np.float32)
    depths = (scores[:, None] > limits).sum(axis=1)
    mean = pinned * 6 + (1 - pinned) * depths.mean()
    assert mean == pytest.approx(target, abs=0.05)
    inner = [t for t in thresholds if t > 0]
    gaps = [np.abs(scores - np.float32(t)).min() for t in inner]
    assert min(gaps) > 1e-6
    if levels == "two-level":
        assert set(depths) == {1, 6}


def test_the_fit_finds_a_linear_importance() -> None:
    torch.manual_seed(0)
    embedded = torch.randn(4000, 12) + 3
    truth = torch.randn(12)
    features = TokenFeatures(
        embedded=embedded,
        importance=embedded @ truth - 5,
        position_ids=torch.zeros(4000, dtype=torch.long),
        pinned_share=0.0,
    )
    weight, bias = fit_probe(features)
    logits = embedded @ weight + bias
    assert logits.mean().abs() < 1e-4
    assert logits.std() == pytest.approx(1, abs=1e-3)
    assert torch.corrcoef(torch.stack([logits, features.importance]))[0, 1] > 0.999


def test_constant_importance_is_an_error() -> None:
    features = TokenFeatures(
        embedded=torch.randn(50, 4),
        importance=torch.ones(50),
        position_ids=torch.zeros(50).long(),
        pinned_share=0.0,
    )
    with pytest.raises(ConfigError, match="same importance"):
        fit_probe(features)


def sample(lengths: list[int]) -> TokenSample:
    cu = np.cumsum([0, *lengths]).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, 30, cu[-1]).astype(np.int32)
    return TokenSample(input_ids=ids, cu_seqlens=cu)


def test_batches_hold_every_sequence_once() -> None:
    data = sample([5, 2, 9, 2, 7, 30])
    seen = []
    for ids, mask in padded_batches(data, max_tokens=10**6, batch_tokens=20):
        assert mask.numel() <= 20 or len(mask) == 1
        seen += [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]
    expected = [tuple(x.tolist()) for x in np.split(data.input_ids, data.cu_seqlens[1:-1])]
    assert sorted(seen) == sorted(expected)
    assert sum(int(mask.sum()) for _, mask in padded_batches(data, max_tokens=55)) == 55
    assert sum(int(mask.sum()) for _, mask in padded_batches(data, max_tokens=54)) == 25
    assert sum(int(mask.sum()) for _, mask in padded_batches(data, max_tokens=1)) == 5


@pytest.mark.parametrize("importance", ["stability", "change", "attention", "rarity", "random"])
@torch.no_grad()
def test_importance_is_that_of_each_token(importance: str) -> None:
    """Measured in batches of any composition, a token's importance is the one it has alone."""
    model = random_model(config(3, pinned_token_ids=(0,)), 0)
    data = sample([6, 11, 4])
    found = token_features(model, data, importance, max_tokens=100)  # type: ignore[arg-type]
    free = data.input_ids != 0
    assert found.pinned_share == pytest.approx(1 - free.mean())
    assert len(found.importance) == free.sum()
    assert found.importance.std() > 0
    if importance in ("random", "rarity"):
        return
    one = TokenSample(input_ids=data.input_ids[6:17], cu_seqlens=np.array([0, 11], np.int32))
    alone = token_features(model, one, importance, max_tokens=100)  # type: ignore[arg-type]
    together = found.importance[found.importance.numel() - alone.importance.numel() :]
    torch.testing.assert_close(together, alone.importance, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_received_is_that_of_each_key() -> None:
    model = random_model(config(2), 1)
    ids, mask = next(padded_batches(sample([9, 9, 4]), 100))
    states = model.embed(ids)
    layer = model.blocks[0]
    found = _attention_received(layer, states, mask)
    torch.testing.assert_close(found.sum(dim=1), mask.sum(dim=1).float())
    assert float(found[~mask].abs().max()) == 0
    normed = layer.attention_norm(states)[:1, : int(mask[0].sum())]
    weights = torch.nn.MultiheadAttention(12, 2, batch_first=True)
    parts = (layer.attention.query, layer.attention.key, layer.attention.value)
    weights.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    weights.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    expected = weights(normed, normed, normed)[1][0].sum(dim=0)
    torch.testing.assert_close(found[0, : len(expected)], expected, atol=1e-5, rtol=0)


def test_importance_is_relative_to_the_sequence() -> None:
    model = random_model(config(3), 0)
    found = token_features(model, sample([40, 25]), "change", max_tokens=100)
    for part in (found.importance[:25], found.importance[25:]):
        assert float(part.mean()) == pytest.approx(0, abs=1e-5)
        assert float(part.square().mean()) == pytest.approx(1, abs=1e-4)


def features_of(embedded: torch.Tensor, importance: torch.Tensor, pinned: float) -> TokenFeatures:
    return TokenFeatures(
        embedded=embedded,
        importance=importance,
        position_ids=torch.arange(len(embedded)) % 20,
        pinned_share=pinned,
    )


def test_the_place_of_a_token_is_not_importance() -> None:
    """Embeddings carry their position; importance follows it too, and the probe must not."""
    torch.manual_seed(0)
    places = torch.arange(4000) % 20
    table = torch.linspace(-1, 1, 20)[:, None] * torch.randn(12)
    content, truth = torch.randn(4000, 12), torch.randn(12)
    embedded = content + table[places]
    features = features_of(embedded, content @ truth + 0.5 * places, 0.0)

    def spread_over_places(one: TokenFeatures) -> float:
        weight, bias = fit_probe(one)
        logits = embedded @ weight + bias
        assert torch.corrcoef(torch.stack([logits, content @ truth]))[0, 1] > 0.5
        return float(torch.stack([logits[places == p].mean() for p in range(20)]).std())

    blind = dataclasses.replace(features, position_ids=torch.zeros_like(features.position_ids))
    assert spread_over_places(blind) > 0.4
    assert spread_over_places(features) < 0.15


def test_samples_put_together_count_their_pinned_tokens() -> None:
    a = features_of(torch.ones(6, 2), torch.ones(6), 0.25)
    b = features_of(torch.zeros(9, 2), torch.zeros(9), 0.1)
    both = joined([a, b])
    assert both.pinned_share == pytest.approx(3 / 18)
    assert both.importance.tolist() == [1.0] * 6 + [0.0] * 9


@pytest.mark.parametrize("share", [0.05, 0.4, 0.6, 0.97])
def test_thresholds_are_no_scores(share: float) -> None:
    """Without places in the embeddings a frequent token has one score, which must not flip."""
    scores = np.sort(np.repeat([0.2, 0.5, 0.6], [30, 900, 70])).astype(np.float32)
    found = widest_gap(scores, share)
    assert np.abs(scores - found).min() > 0.04
