from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.gates import routed_forward
from tests.samples import CONFIGS, model_configs, random_batch, random_model, seeds


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
    model = random_model(configs[0], seed)
    n_layers = model.config.n_layers
    rng = np.random.default_rng(seed)
    thresholds = np.sort(rng.uniform(0, 1, n_layers)).astype(np.float32)
    thresholds[0] = 0.0 if seed % 2 else thresholds[0]
    limits = torch.logit(torch.from_numpy(thresholds))
    for gate in ("hard", "straight-through"):
        ids, mask, routed = forward(model, gate, limits)
        expected = model(ids, mask, thresholds=[float(t) for t in thresholds])
        assert torch.equal(routed.depths, expected.depths)
        torch.testing.assert_close(
            routed.hidden_states[mask], expected.hidden_states[mask], atol=1e-5, rtol=1e-5
        )


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
