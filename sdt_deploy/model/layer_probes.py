"""Probes and thresholds for routing ``per_layer``, fitted on a text without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.choices import Importance
from sdt_deploy.config import Leaving
from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.probe import (
    Float64,
    fit_probe,
    padded_batches,
    token_features,
    widest_gap,
)
from sdt_deploy.model.transformer import SparseDepthTransformer

FIT_TOKENS = 15_000
"""Tokens that the probe of each inner layer is fitted on."""
THRESHOLD_TOKENS = 8_000
"""Tokens that thresholds are set on."""


@torch.no_grad()
def with_layer_probes(
    model: SparseDepthTransformer,
    sample: TokenSample,
    *,
    importance: Importance,
    shares: Float64,
    leaving: Leaving,
    progress: Callable[[int], None] = lambda n_tokens: None,
) -> SparseDepthTransformer:
    """Return ``model`` with a probe for each layer, and thresholds for the depths in ``shares``.

    Each probe is a ridge regression from the dense model's states before its layer to the same
    importance as that of the embeddings, which is kept. Thresholds are set one after the other, on
    what the sparse model itself makes of the tokens so far. With ``leaving="skip"`` each layer
    takes as many tokens as it would with ``exit``.

    Args:
        model: with a fitted probe on the embeddings, of routing ``once``.
        sample: packed sequences to fit on.
        importance: what the probes predict.
        shares: ``[n_layers]``, share of tokens at depth 1, 2, …, see
            :func:`sdt_deploy.model.probe.depth_shares`.
        leaving: what tokens do that a layer does not take.
        progress: called with the number of tokens after each batch.
    """
    config = model.config
    n_layers = config.n_layers
    made = SparseDepthTransformer(
        config.replace(routing="per_layer", leaving=leaving, thresholds=(0.0,) * n_layers)
    ).eval()
    weights = {name: value for name, value in model.state_dict().items() if "scorer" not in name}
    made.load_state_dict(weights, strict=False)
    made.scorer.weight[:, 0], made.scorer.bias[0] = model.scorer.weight, model.scorer.bias
    for layer in range(1, n_layers):
        features = token_features(
            model, sample, importance, max_tokens=FIT_TOKENS, layer=layer, progress=progress
        )
        made.scorer.weight[:, layer], made.scorer.bias[layer] = fit_probe(features)
    thresholds = config.thresholds  # of capacities
    if config.selection == "threshold":
        thresholds = layer_thresholds(made, sample, 1 - np.cumsum(shares) + shares)
    final = SparseDepthTransformer(made.config.replace(thresholds=thresholds)).eval()
    final.load_state_dict(made.state_dict())
    return final


def layer_thresholds(
    model: SparseDepthTransformer, sample: TokenSample, taken: Float64
) -> tuple[float, ...]:
    """Return thresholds at which layer ``i`` takes the share ``taken[i]`` of all tokens.

    Args:
        model: of routing ``per_layer``, with its probes; its thresholds are not used.
        sample: packed sequences; the first :data:`THRESHOLD_TOKENS` tokens are run.
        taken: ``[n_layers]``, pinned tokens included.
    """
    thresholds: tuple[float, ...] = ()
    for i, share in enumerate(taken):
        so_far = (*thresholds, *(0.0,) * (model.config.n_layers - i))
        scores, left, n_tokens = _candidates(model, sample, so_far, i)
        free = np.sort(scores[(scores < 1) & left].numpy())
        wanted = share * n_tokens - int(((scores >= 1) & left).sum())  # beside the pinned ones
        thresholds = (*thresholds, widest_gap(free, 1 - max(0.0, wanted) / max(1, len(free))))
    return thresholds


def _candidates(
    model: SparseDepthTransformer, sample: TokenSample, thresholds: tuple[float, ...], layer: int
) -> tuple[Tensor, Tensor, int]:
    """Return scores ``[n]`` of all tokens by the probe of ``layer``, who may be taken, and n."""
    scores, left = [], []
    for ids, mask in padded_batches(sample, THRESHOLD_TOKENS):
        found = model(ids, mask, thresholds=thresholds)
        scores.append(found.scores[mask][:, layer])
        stays = layer == 0 or model.config.leaving == "skip"
        left.append(mask[mask] if stays else found.active[mask][:, layer - 1])
    return torch.cat(scores), torch.cat(left), sum(map(len, left))
