"""The oracle against plainer derivations of itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from sdt_deploy.config import ModelConfig
from sdt_deploy.model.transformer import SparseDepthTransformer
from tests.samples import model_configs, random_model, seeds


def small(**changes: object) -> ModelConfig:
    values = {
        "vocab_size": 40,
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 4,
        "d_ff": 24,
        "max_positions": 20,
        **changes,
    }
    return ModelConfig(**values)


def padded(config: ModelConfig, lengths: list[int], seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, config.vocab_size, mask.shape, generator=generator)
    return ids, mask


def compacting_forward(model: SparseDepthTransformer, ids: torch.Tensor) -> torch.Tensor:
    """One sequence, derived the other way: really remove the tokens that are not active."""
    hidden = model.embed(ids[None])[0]
    scores = model.scorer(ids, hidden)
    for i, layer in enumerate(model.blocks):
        active = scores > model.config.thresholds[i]
        if not active.any():
            continue
        rows = hidden[active]
        if model.config.context == "active":
            updated = layer(rows[None], torch.ones(1, len(rows), dtype=torch.bool))[0]
        else:
            updated = layer(hidden[None], torch.ones(1, len(hidden), dtype=torch.bool))[0][active]
        hidden = hidden.clone()
        hidden[active] = updated
    return hidden


@pytest.mark.parametrize("context", ["active", "all"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@torch.no_grad()
def test_agrees_with_a_derivation_that_removes_tokens(context: str, norm_placement: str) -> None:
    config = small(context=context, norm_placement=norm_placement)
    model = random_model(config, 0)
    lengths = [7, 1, 13]
    ids, mask = padded(config, lengths, 1)
    found = model(ids, mask)
    assert len(set(found.depths[mask].tolist())) > 2
    for row, length in enumerate(lengths):
        expected = compacting_forward(model, ids[row, :length])
        torch.testing.assert_close(found.hidden_states[row, :length], expected, atol=1e-5, rtol=0)


@given(drawn=model_configs(), seed=seeds)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_full_depth_equals_dense(drawn: tuple[ModelConfig, object], seed: int) -> None:
    config = drawn[0]
    model = random_model(config, seed % 1000)
    ids, mask = padded(config, [3, 9, 1], seed % 1000)
    sparse = model(ids, mask, thresholds=(-1.0,) * config.n_layers)
    dense = model.as_dense()(ids, mask)
    assert (sparse.depths[mask] == config.n_layers).all()
    rows = ... if config.head.per_sequence else mask
    torch.testing.assert_close(sparse.output[rows], dense.output[rows], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_and_neighbours_change_nothing() -> None:
    config = small(context="all")
    model = random_model(config, 3)
    ids, mask = padded(config, [5, 12], 4)
    together = model(ids, mask)
    alone = model(ids[:1, :5], mask[:1, :5])
    torch.testing.assert_close(
        together.hidden_states[0, :5], alone.hidden_states[0], atol=2e-5, rtol=0
    )
    assert torch.equal(together.depths[0, :5], alone.depths[0])


@torch.no_grad()
def test_inactive_tokens_keep_their_state_and_depth_counts_layers() -> None:
    config = small()
    model = random_model(config, 5)
    ids, mask = padded(config, [9], 6)
    found = model(ids, mask, thresholds=(2.0,) * 4)
    assert (found.depths == 0).all()
    torch.testing.assert_close(found.hidden_states, model.embed(ids))
    found = model(ids, mask, thresholds=(-1.0, 2.0, 2.0, 2.0))
    assert (found.depths == 1).all()
    torch.testing.assert_close(found.hidden_states, model.blocks[0](model.embed(ids), mask))


@torch.no_grad()
def test_the_two_contexts_differ() -> None:
    ids, mask = padded(small(), [12], 7)
    outputs = []
    for context in ("active", "all"):
        model = random_model(small(context=context), 8)
        found = model(ids, mask)
        assert 0 < found.depths.float().mean() < 4
        outputs.append(found.output)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


@torch.no_grad()
def test_pinned_tokens_reach_full_depth_and_threshold_is_strict() -> None:
    config = small(pinned_token_ids=(3,), vocab_size=4)
    model = random_model(config, 9)
    ids, mask = padded(config, [15], 10)
    found = model(ids, mask, thresholds=(0.999999,) * 4)
    assert (found.depths[ids == 3] == 4).all()
    assert (found.depths[ids != 3] == 0).all()
    score = float(found.scores[ids != 3].max())
    exactly = model(ids, mask, thresholds=(score,) * 4)
    assert (exactly.depths[ids != 3] == 0).all()


@torch.no_grad()
def test_scores_are_float32_in_a_half_precision_model() -> None:
    config = small()
    model = random_model(config, 11)
    ids, _ = padded(config, [15], 12)
    embedded = model.embed(ids).half()
    scores = model.scorer.half()(ids, embedded)
    assert scores.dtype == torch.float32
    exact = torch.sigmoid(
        embedded.double() @ model.scorer.weight.double() + model.scorer.bias.double()
    )
    torch.testing.assert_close(scores.double(), exact, atol=1e-6, rtol=0)
