from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from sdt_deploy.errors import ConfigError
from sdt_deploy.training.batches import MIN_CROP, DeviceTokens
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.gates import layer_forward
from tests.samples import random_model
from tests.training.test_distill import MODEL, made, texts, weights


def tokens(max_length: int = 24) -> DeviceTokens:
    return DeviceTokens(texts(60), max_length, torch.device("cpu"))


def test_a_crop_is_one_part_between_the_first_and_the_last_token() -> None:
    all_tokens, sequences = tokens(), np.arange(60)
    ids, mask, index = all_tokens.padded(sequences, 1.0, np.random.default_rng(0))
    n_shorter = 0
    for row in range(60):
        whole, start = all_tokens.lengths[row], all_tokens.starts[row]
        taken = index[row][mask[row]].numpy()
        assert (taken[0], taken[-1]) == (start, start + whole - 1)
        assert len(taken) >= min(whole, MIN_CROP)
        assert (np.diff(taken[1:-1]) == 1).all()
        assert start < taken[1]
        assert taken[-2] < taken[-1]
        assert (ids[row][mask[row]] == all_tokens.input_ids[taken]).all()
        n_shorter += len(taken) < whole
    assert 5 < n_shorter < 60
    again = all_tokens.padded(sequences, 1.0, np.random.default_rng(0))
    assert all(torch.equal(a, b) for a, b in zip(again, (ids, mask, index), strict=True))
    assert torch.equal(all_tokens.padded(sequences)[1].sum(1), torch.from_numpy(all_tokens.lengths))


def test_padding_never_goes_beyond_the_longest_length() -> None:
    assert tokens(max_length=18).padded(np.arange(60))[0].shape[1] == 18


def test_replaced_tokens_are_unpinned_ones() -> None:
    all_tokens = tokens()
    ids, mask, _ = all_tokens.padded(np.arange(60))
    pinned = torch.tensor([0, 1])
    kept = ~mask | torch.isin(ids, pinned)
    found = all_tokens.replaced(ids, kept, 0.5, pinned, np.random.default_rng(0))
    assert torch.equal(found[kept], ids[kept])
    assert not torch.isin(found[~kept], pinned).any()
    assert 0.2 < float((found != ids)[~kept].float().mean()) < 0.6


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_fused_attention_is_that_of_the_oracle(placement: str) -> None:
    model = random_model(dataclasses.replace(MODEL, norm_placement=placement), seed=3)
    hidden = torch.randn(5, 9, 16, generator=torch.Generator().manual_seed(0))
    visible = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[:, 0] = True
    for layer in model.blocks:
        torch.testing.assert_close(
            layer_forward(layer, hidden, visible), layer(hidden, visible), atol=2e-6, rtol=1e-5
        )
    assert layer_forward(model.blocks[0], hidden, visible & False).isfinite().all()


def test_a_run_with_everything_is_the_same_again_and_mixes_depths() -> None:
    options = {"crop_share": 0.5, "replaced_share": 0.2, "mixed_share": 0.5, "probe": "fixed"}
    first, second = made(**options), made(**options)
    reports = [first.run_step() for _ in range(12)]
    assert [second.run_step() for _ in range(12)] == reports
    assert all(torch.equal(a, weights(second)[k]) for k, a in weights(first).items())
    late = [report.wanted_depth for report in reports[6:]]
    assert min(late) == pytest.approx(2.5)
    assert max(late) > 2.6
    json.dumps(first.config.to_dict())


def test_a_clock_ends_the_run() -> None:
    distillation = made(n_steps=10**6, probe="fixed")
    distillation._progress = lambda step: step / 7
    while not distillation.done:
        report = distillation.run_step()
    assert report.step == 7
    assert report.wanted_depth == pytest.approx(2.5)
    assert distillation._optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("name", ["mixed_share", "crop_share", "replaced_share"])
def test_shares_lie_in_0_to_1(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        DistillConfig(target_depth=2.0, **{name: 1.5})
