"""What people are told about a model."""

from __future__ import annotations

import pytest

from sdt_deploy.config import RotaryConfig
from sdt_deploy.description import described
from sdt_deploy.model.cards import model_card
from tests.runtime.test_generation import GPT2, LLAMA
from tests.samples import CONFIGS


def test_a_llama() -> None:
    rotary = RotaryConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_max_positions=20)
    found = described(LLAMA.replace(rotary=rotary))
    assert found["attention"] == "6 heads of 8, 2 of keys and values, causal"
    assert found["positions"] == "40, rotary with theta 500000, llama3 scaling by 8"
    assert found["feed-forward"] == "d_ff 40, silu, gated"
    assert found["norms"] == "RMSNorm, pre"
    assert described(LLAMA)["positions"] == "40, rotary with theta 100"


def test_others() -> None:
    gpt2, encoder = described(GPT2), described(CONFIGS["all-embedding"][0])
    assert gpt2["attention"] == "3 heads of 8, causal"
    assert gpt2["feed-forward"] == "d_ff 40, gelu_tanh"
    assert gpt2["thresholds"] == "0.15, 0.4, 0.65"
    assert encoder["attention"] == "4 heads of 8, both ways"
    assert encoder["positions"] == "40, learned"
    assert encoder["norms"] == "LayerNorm, post"
    assert encoder["head"] == "embedding, mean"
    assert described(CONFIGS["dense-twin"][0])["routing"].startswith("none")


@pytest.mark.parametrize(
    ("changes", "routing", "said"),
    [
        ({}, "once threshold", "on its embedding; a layer runs for the tokens whose score"),
        ({"selection": "capacity"}, "once capacity", "the share of a text's tokens"),
        ({"routing": "per_layer"}, "per_layer threshold exit", "have left for good"),
        (
            {"routing": "per_layer", "leaving": "skip"},
            "per_layer threshold skip",
            "sit out this layer only",
        ),
    ],
)
def test_ways_to_route(changes: dict[str, str], routing: str, said: str) -> None:
    config = GPT2.replace(**changes)
    assert described(config)["routing"] == routing
    card = model_card(config, provenance={}, quality=None)
    assert said in card
    assert f"| routing | {routing} |" in card
    assert "| attention | 3 heads of 8, causal |" in card
