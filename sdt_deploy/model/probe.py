"""Fitting a probe in closed form, and setting thresholds for a mean depth.

The probe is a ridge regression from the embedding of a token to an importance target that is read
off the dense model. Which target is best is an experiment: ``benchmarks/importance_targets.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdt_deploy.choices import Importance, Levels
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.model.blocks import TransformerLayer
from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.transformer import SparseDepthTransformer

Float64 = npt.NDArray[np.float64]

RIDGE = 1e-2
"""Regularisation, relative to the mean variance of an embedding dimension."""
POSITION_PENALTY = 100.0
"""Weight of the predictions for the mean embeddings at each position, relative to the tokens."""
MIN_TOKENS_AT_POSITION = 16
"""Positions with fewer tokens have no mean worth the name."""
GAP_WINDOW = 0.0025
"""A threshold may move by this share of the tokens to reach a wide gap between scores."""


@dataclass(frozen=True, kw_only=True)
class TokenFeatures:
    """What is known about the unpinned tokens of a text after one pass of the dense model."""

    embedded: Tensor
    """``[n_tokens, d_model]`` float32"""
    importance: Tensor
    """``[n_tokens]`` float32"""
    position_ids: Tensor
    """``[n_tokens]`` int64, the place of each token in its sequence"""
    pinned_share: float
    """Pinned tokens over all tokens of the text."""
    place_means: Tensor | None = None
    """``[n_places, d_model]`` float32, see :func:`place_means`, where the text does not reach all
    places of the model; None: those of the tokens themselves."""


def place_means(model: SparseDepthTransformer, token_ids: Tensor, first: int = 0) -> Tensor:
    """Return the mean embedding of the same tokens at every place that the model knows.

    Args:
        model: with a table of positions.
        token_ids: ``[n_tokens]`` int64, a few hundred that are like those of the texts.
        first: place to begin with; where a special token always comes first, the one after it.

    Returns:
        ``[max_positions - first, d_model]`` float32.
    """
    places = range(first, model.config.max_positions)
    return torch.stack(
        [
            model.embeddings(token_ids, torch.full_like(token_ids, place), None).mean(dim=0)
            for place in places
        ]
    )


def padded_batches(
    sample: TokenSample, max_tokens: int, batch_tokens: int = 4096
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(input_ids, attention_mask)`` ``[batch, seq]`` of sequences of similar length.

    Args:
        sample: packed sequences.
        max_tokens: leave out the sequences beyond this many tokens, but not the first.
        batch_tokens: tokens in a batch, padding included.
    """
    lengths = np.diff(sample.cu_seqlens)
    n_used = max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))
    order = np.argsort(lengths[:n_used], kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * lengths[order[stop]] <= batch_tokens:
            stop += 1
        chosen = order[start:stop]
        mask = np.arange(lengths[chosen].max()) < lengths[chosen][:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate(
            [sample.input_ids[sample.cu_seqlens[i] : sample.cu_seqlens[i + 1]] for i in chosen]
        )
        yield torch.from_numpy(ids), torch.from_numpy(mask)
        start = stop


@torch.no_grad()
def depth_histogram(
    model: SparseDepthTransformer, sample: TokenSample, max_tokens: int = 60_000
) -> tuple[int, ...]:
    """Return how many tokens of ``sample`` pass through 0, 1, …, n_layers layers.

    Args:
        model: with its own thresholds.
        sample: packed sequences.
        max_tokens: see :func:`padded_batches`.
    """
    histogram = np.zeros(model.config.n_layers + 1, dtype=np.int64)
    for ids, mask in padded_batches(sample, max_tokens):
        if model.config.routing == "per_layer":
            depths = model(ids, mask).depths[mask]
        else:
            depths = model.depths(model.scorer(ids, model.embed(ids)), mask)[mask]
        histogram += np.bincount(depths.numpy(), minlength=len(histogram))
    return tuple(int(count) for count in histogram)


@torch.no_grad()
def token_features(
    model: SparseDepthTransformer,
    sample: TokenSample,
    importance: Importance,
    *,
    max_tokens: int,
    layer: int = 0,
    progress: Callable[[int], None] = lambda n_tokens: None,
) -> TokenFeatures:
    """Run the dense model over ``sample`` and measure the importance of every unpinned token.

    Importances: ``change`` is the length of a token's change from the first layer's output to the
    last; ``stability`` its negative; ``attention`` the attention a token receives, averaged over
    layers, heads and queries; ``rarity`` the negative log frequency of its id in ``sample``;
    ``random`` a draw. Each is brought to mean 0 and variance 1 within its sequence: what counts is
    which tokens of a sequence go deeper, wherever they stand and however long it is.

    ``embedded`` are the states that come into ``layer``; into the first one, the embeddings.
    """
    pinned = torch.tensor(model.config.pinned_token_ids, dtype=torch.long)
    counts = np.bincount(sample.input_ids, minlength=model.config.vocab_size)
    log_count = torch.from_numpy(np.log(np.maximum(counts, 1)).astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    embedded_parts, importance_parts, position_parts = [], [], []
    n_all = n_pinned = 0
    for ids, mask in padded_batches(sample, max_tokens):
        embedded = model.embed(ids)
        free = mask & ~torch.isin(ids, pinned)
        n_all, n_pinned = n_all + int(mask.sum()), n_pinned + int((mask & ~free).sum())
        if importance == "rarity":
            value = -log_count[ids]
        elif importance == "random":
            value = torch.rand(ids.shape, generator=generator)
        else:
            value = _dense_importance(model, embedded, mask, importance)
        for block in model.blocks[:layer]:
            embedded = block(embedded, mask)
        embedded_parts.append(embedded[free])
        position_parts.append(torch.arange(ids.shape[1]).expand_as(ids)[free])
        importance_parts.append(standardised(value, free)[free])
        progress(int(mask.sum()))
    return TokenFeatures(
        embedded=torch.cat(embedded_parts),
        importance=torch.cat(importance_parts),
        position_ids=torch.cat(position_parts),
        pinned_share=n_pinned / n_all,
    )


def standardised(values: Tensor, mask: Tensor) -> Tensor:
    """Bring ``values [batch, seq]`` to mean 0 and variance 1 over each row's ``mask``."""
    count = mask.sum(dim=1, keepdim=True).clamp_min(1)
    centred = torch.where(mask, values, 0.0)
    centred = torch.where(mask, values - centred.sum(dim=1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    return centred / spread.clamp_min(1e-6)


def joined(features: Sequence[TokenFeatures]) -> TokenFeatures:
    """Put the tokens of several samples together."""
    n_free = [len(one.importance) for one in features]
    n_all = [n / (1 - one.pinned_share) for n, one in zip(n_free, features, strict=True)]
    return TokenFeatures(
        embedded=torch.cat([one.embedded for one in features]),
        importance=torch.cat([one.importance for one in features]),
        position_ids=torch.cat([one.position_ids for one in features]),
        pinned_share=1 - sum(n_free) / sum(n_all),
    )


def _dense_importance(
    model: SparseDepthTransformer, embedded: Tensor, mask: Tensor, importance: Importance
) -> Tensor:
    hidden = first = embedded
    received = torch.zeros(mask.shape)
    for i, layer in enumerate(model.blocks):
        if importance == "attention":
            received += _attention_received(layer, hidden, mask)
        hidden = layer(hidden, mask)
        first = hidden if i == 0 else first
    if importance == "attention":
        return received
    change = (hidden - first).norm(dim=-1)
    return change if importance == "change" else -change


def _attention_received(layer: TransformerLayer, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return ``[batch, seq]``, the mean weight of each key over heads and valid queries."""
    states = layer.attention_norm(hidden) if layer.pre_norm else hidden
    weights = layer.attention.weights(states, mask) * mask[:, None, :, None]
    return weights.sum(dim=2).mean(dim=1)


def _means_of_places(features: TokenFeatures, rows: Tensor) -> Tensor:
    """Return the mean of ``rows [n_tokens, d_model]`` at each place that has enough of them."""
    places, counts = features.position_ids.unique(return_inverse=True, return_counts=True)[1:]
    means = torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype).index_add(0, places, rows)
    return (means / counts[:, None])[counts >= MIN_TOKENS_AT_POSITION]


def fit_probe(features: TokenFeatures) -> tuple[Tensor, Tensor]:
    """Fit ``importance ≈ weight · embedding + bias`` by ridge regression (normal equations).

    A token's place is not importance: the mean embedding at each position is pulled towards the
    same prediction, so that depth depends neither on the place nor on the length of a sequence. The
    prediction is scaled to mean 0 and variance 1, so that its sigmoid spreads over (0, 1).

    Returns:
        ``weight [d_model]`` and ``bias []``, float32.
    """
    x, y = features.embedded.double(), features.importance.double()
    mean = x.mean(dim=0)
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    means = (
        _means_of_places(features, centred)
        if features.place_means is None
        else (features.place_means.double() - mean)
    )
    if len(means) > 1:
        ridge = ridge + POSITION_PENALTY * means.T @ means / len(means)
    weight = torch.linalg.solve(covariance + ridge, centred.T @ (y - y.mean()) / len(x))
    spread = (centred @ weight).std()
    if not spread > 0:
        raise ConfigError("every token of the text has the same importance; give a longer text")
    weight = weight / spread
    return weight.float(), -(mean @ weight).float()


def depth_shares(
    n_layers: int, mean_depth: float, levels: Levels, *, shallow_depth: int = 1
) -> Float64:
    """Return the share of tokens at depth 1, 2, …, n_layers.

    ``two-level`` uses the depths ``shallow_depth`` and n_layers only; ``graded`` all of them, with
    the largest entropy that the mean allows (shares proportional to ``exp(λ · depth)``, Jaynes
    1957).

    Raises:
        ConfigError: if the mean cannot be reached.
    """
    if levels == "graded":
        shallow_depth = 1
    elif not 1 <= shallow_depth <= max(1, n_layers - 1):
        raise ConfigError(
            f"the shallow depth must lie in 1..{max(1, n_layers - 1)}, not {shallow_depth}"
        )
    if not shallow_depth <= mean_depth <= n_layers:
        raise ConfigError(
            f"a mean depth of {mean_depth:.3g} over unpinned tokens cannot be reached: every token "
            f"passes through {shallow_depth} to {n_layers} layers"
        )
    shares = np.zeros(n_layers)
    if n_layers == 1:
        return np.ones(1)
    if levels == "two-level":
        shares[-1] = (mean_depth - shallow_depth) / (n_layers - shallow_depth)
        shares[shallow_depth - 1] = 1 - shares[-1]
        return shares
    depths = np.arange(1, n_layers + 1)
    low, high = -50.0, 50.0
    for _ in range(200):
        tilt = (low + high) / 2
        weights = np.exp(tilt * (depths - depths.mean()) - abs(tilt) * (n_layers - 1) / 2)
        shares = weights / weights.sum()
        low, high = (tilt, high) if shares @ depths < mean_depth else (low, tilt)
    return shares


def capacity_thresholds(n_layers: int, target_depth: float, levels: Levels) -> tuple[float, ...]:
    """Return thresholds on standings, so 1 minus capacities, for a mean depth; see `depth_shares`.

    Raises:
        ConfigError: if the depth cannot be reached.
    """
    below = np.cumsum(depth_shares(n_layers, target_depth, levels))[:-1]
    return (0.0, *(float(share) for share in below))


def set_thresholds(
    scores: npt.NDArray[np.float32],
    pinned_share: float,
    config: ModelConfig,
    target_depth: float,
    levels: Levels,
    *,
    shallow_depth: int = 1,
) -> tuple[float, ...]:
    """Place thresholds so that the mean depth over all tokens is ``target_depth``.

    Each lies in the middle of a gap between distinct scores, the widest within reach of its place.

    Args:
        scores: ``[n_tokens]`` of the unpinned tokens of a text.
        pinned_share: share of pinned tokens in that text; they count with full depth.
        config: the model.
        target_depth: layers per token, padding excluded, pinned tokens included.
        levels: see :func:`depth_shares`.
        shallow_depth: see :func:`depth_shares`.

    Raises:
        ConfigError: if the depth cannot be reached.
    """
    n_layers = config.n_layers
    check_depth(target_depth, n_layers)
    free_mean = (target_depth - pinned_share * n_layers) / (1 - pinned_share)
    shares = depth_shares(n_layers, min(free_mean, n_layers), levels, shallow_depth=shallow_depth)
    below = np.cumsum(shares)[:-1]
    ordered = np.sort(scores)
    cuts = [0.0, *(widest_gap(ordered, share) for share in below)]
    return tuple(float(cut) for cut in np.maximum.accumulate(cuts))


def check_depth(target_depth: float, n_layers: int) -> None:
    """Check that a mean depth is one that a model can have.

    Raises:
        ConfigError: if it is not.
    """
    if not 0.0 < target_depth <= n_layers:
        raise ConfigError(f"target depth must lie in (0, {n_layers}], not {target_depth}")


def widest_gap(ordered: npt.NDArray[np.float32], share: float) -> float:
    """Return the middle of the widest gap near the place below which ``share`` of scores lie.

    Where embeddings know no places, a frequent token has one score, and the next gap may be far.
    """
    n = len(ordered)
    place = share * n
    if place < 0.5:
        return 0.0
    reach, low, high = max(1.0, GAP_WINDOW * n), n, -1
    gaps = np.zeros(0, dtype=np.float32)
    while not gaps.any() and (low > 0 or high < n - 1):
        low, high = max(0, int(place - reach)), min(n - 1, int(place + reach))
        gaps = np.diff(ordered[low : high + 1])
        reach *= 2
    if len(gaps) == 0:
        return float(np.nextafter(np.float32(1), np.float32(0)))
    at = low + int(gaps.argmax())
    return float((np.float64(ordered[at]) + np.float64(ordered[at + 1])) / 2)


def quantiles(scores: npt.NDArray[np.float32]) -> tuple[float, ...]:
    """Return the 101 quantiles of ``scores`` that manifests keep."""
    return tuple(float(q) for q in np.quantile(scores.astype(np.float64), np.linspace(0, 1, 101)))
