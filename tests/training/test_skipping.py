from __future__ import annotations

import numpy as np
import pytest
import torch

from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.skipping import refitted_probe, skipping_costs
from tests.samples import CONFIGS, random_model

SHALLOW = 1


@pytest.fixture
def model() -> SparseDepthTransformer:
    config = CONFIGS["all-embedding"][0].replace(pinned_token_ids=(1, 2))
    return random_model(config, 4)


def random_sample(
    model: SparseDepthTransformer, lengths: np.ndarray, rng: np.random.Generator
) -> TokenSample:
    """Draw unpinned tokens."""
    return TokenSample(
        input_ids=rng.integers(3, model.config.vocab_size, lengths.sum()).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths]),
    )


def test_costs_are_those_of_each_token_deep_and_shallow(model: SparseDepthTransformer) -> None:
    ids = torch.tensor([1, 9, 7, 5, 11, 7, 2])
    free = torch.tensor([1, 2, 3, 4, 5])
    n_layers = model.config.n_layers
    depths = torch.tensor([n_layers, 1, n_layers, 1, 1, n_layers, n_layers])
    mask = torch.ones_like(ids, dtype=torch.bool)[None]
    wanted = model.as_dense()(ids[None], mask).output[0]

    def loss(place: int, depth: int) -> torch.Tensor:
        changed = depths.clone()
        changed[place] = depth
        found = model(ids[None], mask, depths=changed[None]).output[0]
        return 1 - torch.cosine_similarity(found, wanted, dim=0)

    costs = skipping_costs(model, ids, free, wanted, depths=depths, shallow_depth=SHALLOW)
    expected = torch.stack([loss(int(i), SHALLOW) - loss(int(i), n_layers) for i in free])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(costs, expected.detach(), atol=1e-5, rtol=1e-4)


def test_the_probe_ranks_tokens_by_their_cost(model: SparseDepthTransformer) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 14, 150)
    sample = random_sample(model, lengths, rng)
    thresholds = (0.0, *[0.5] * (model.config.n_layers - 1))
    dense = model.as_dense()
    weight, bias = refitted_probe(model, dense, sample, thresholds)
    correlations = []
    for i, length in enumerate(lengths):
        ids = torch.from_numpy(sample.input_ids[sample.cu_seqlens[i] :][:length]).long()
        embedded = model.embed(ids[None])
        mask = torch.ones(1, length, dtype=torch.bool)
        costs = skipping_costs(
            model,
            ids,
            torch.arange(length),
            dense(ids[None], mask).output[0],
            depths=model.depths(model.scorer(ids[None], embedded), mask, thresholds)[0],
            shallow_depth=SHALLOW,
        )
        scores = (embedded[0] @ weight + bias).detach()
        both = torch.stack([scores, costs]).argsort(dim=1).argsort(dim=1).float()
        correlations.append(float(torch.corrcoef(both)[0, 1]))
    assert np.mean(correlations) > 0.25


def test_scores_do_not_drift_where_the_texts_do_not_reach(model: SparseDepthTransformer) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 8, 200)
    sample = random_sample(model, lengths, rng)
    thresholds = (0.0, *[0.5] * (model.config.n_layers - 1))
    weight, bias = refitted_probe(model, model.as_dense(), sample, thresholds)
    longest = model.config.max_positions
    assert longest > 2 * lengths.max()
    ids = torch.randint(3, model.config.vocab_size, (300, longest))
    logits = (model.embed(ids) @ weight + bias).detach()
    unseen = logits[:, lengths.max() :]
    # More random places than dimensions, so no probe is level at all of them; without: 0.66.
    assert float(unseen.mean(dim=0).std()) < 0.45 * float(logits.std())
