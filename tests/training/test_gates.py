from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.gates import routed_forward
from tests.samples import (
    CONFIGS,
    model_configs,
    random_batch,
    random_model,
    seeds,
    separated_thresholds,
)


def forward(model: SparseDepthTransformer, gate: str, limits: torch.Tensor, temperature=0.5):
    config = model.config
    batch = random_batch(config, [9, 1, 17, 4], seed=3)
    mask = torch.from_numpy(batch.attention_mask)
    ids = torch.from_numpy(batch.padded(batch.input_ids)).long()
    embedded = model.embed(ids)
    logits = model.scorer.logits(embedded)
    routed = routed_forward(
        model, ids, mask, embedded, logits, limits, gate=gate, temperature=temperature
    )
    return ids, mask, routed


@given(configs=model_configs(), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_hard_routing_is_that_of_the_oracle(
    configs: tuple[ModelConfig, ExportConfig], seed: int
) -> None:
    """In float64, where the order of operations cannot hide an error.

    In float32 a LayerNorm over two dimensions that are nearly equal amplifies rounding by 1e5 per
    layer, so that oracle and fused attention each are 6e-3 off the truth. The same amplification
    leaves 1e-10 here.
    """
    model = random_model(configs[0], seed).double()
    ids, _, _ = forward(model, "hard", torch.full((model.config.n_layers,), torch.inf))
    scores = model.scorer(ids, model.embed(ids))
    # A score that underflows to 0 lies on the threshold 0; probes are scaled so that none does.
    assume(bool((scores > 0).all()))
    wanted = np.random.default_rng(seed).uniform(0, 1, model.config.n_layers)
    thresholds = separated_thresholds(scores.detach().numpy().ravel(), np.sort(wanted))
    thresholds = tuple(np.clip(thresholds, 0, 0.999).astype(np.float32).tolist())
    limits = torch.logit(torch.tensor(thresholds))
    for gate in ("hard", "straight-through"):
        ids, mask, routed = forward(model, gate, limits)
        expected = model(ids, mask, thresholds=thresholds)
        assert torch.equal(routed.depths, expected.depths)
        torch.testing.assert_close(
            routed.hidden_states[mask], expected.hidden_states[mask], atol=1e-8, rtol=1e-8
        )


@pytest.mark.parametrize("name", ["all-embedding", "active-lm", "active-grouped"])
def test_fused_attention_is_as_exact_as_the_oracle(name: str) -> None:
    """In float32, both beside the truth in float64."""
    model = random_model(CONFIGS[name][0], 3)
    limits = torch.linspace(-0.8, 0.8, model.config.n_layers)
    ids, mask, routed = forward(model, "hard", limits)
    oracle = model(ids, mask, depths=routed.depths)
    truth = model.double()(ids, mask, depths=routed.depths).hidden_states[mask]
    error, usual = (
        float((found.hidden_states[mask] - truth).abs().max().detach())
        for found in (routed, oracle)
    )
    assert usual < 1e-5
    assert error < 10 * usual


def test_a_soft_gate_becomes_hard_as_its_temperature_falls() -> None:
    model = random_model(CONFIGS["all-embedding"][0], 5)
    limits = torch.tensor([-torch.inf, 0.1, 0.4])
    _, mask, hard = forward(model, "hard", limits)
    distances = []
    for temperature in (1.0, 0.1, 1e-5):
        _, _, soft = forward(model, "soft", limits, temperature)
        distances.append(float((soft.hidden_states - hard.hidden_states)[mask].norm().detach()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-4


@pytest.mark.parametrize("gate", ["straight-through", "soft"])
def test_the_probe_gets_a_gradient_through_the_gate(gate: str) -> None:
    model = random_model(CONFIGS["all-embedding"][0], 6)
    _, mask, routed = forward(model, gate, torch.tensor([-torch.inf, 0.0, 0.3]))
    routed.hidden_states[mask].square().sum().backward()
    assert model.scorer.weight.grad is not None
    assert model.scorer.weight.grad.abs().sum() > 0


def test_a_layer_that_everyone_takes_gives_the_probe_no_gradient() -> None:
    model = random_model(CONFIGS["all-embedding"][0], 6)
    _, mask, routed = forward(model, "straight-through", torch.full((3,), -torch.inf))
    routed.hidden_states[mask].square().sum().backward()
    assert model.scorer.weight.grad is not None
    assert float(model.scorer.weight.grad.abs().sum()) == 0.0


def test_straight_through_points_where_opening_a_gate_leads() -> None:
    """Its gradient is that of moving each state by a little of what its layer would change."""
    model = random_model(CONFIGS["all-grouped"][0].replace(n_layers=1, thresholds=()), 7)
    limits = torch.zeros(1)
    ids, mask, routed = forward(model, "straight-through", limits, temperature=0.7)
    wanted = torch.randn(routed.hidden_states.shape, generator=torch.Generator().manual_seed(0))
    (routed.hidden_states * wanted * mask[..., None]).sum().backward()
    with torch.no_grad():
        embedded = model.embed(ids)
        logits = model.scorer.logits(embedded)
        change = model.blocks[0](embedded, mask) - embedded
        gain = (change * wanted).sum(-1) * mask
        slope = torch.sigmoid(logits / 0.7) * (1 - torch.sigmoid(logits / 0.7)) / 0.7
        expected = ((gain * slope)[..., None] * embedded).sum((0, 1))
    assert model.scorer.weight.grad is not None
    torch.testing.assert_close(model.scorer.weight.grad, expected, atol=1e-3, rtol=1e-3)
