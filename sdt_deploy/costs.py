"""Operation counts and a memory estimate: pure functions of the sizes.

Counted are the matrix products, two operations per multiply-add; norms, activations, softmax and
gathers are left out on both sides. Padding is counted only where it is given in the sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from sdt_deploy.bundle import Manifest
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import ConfigError


def layer_flops(config: ModelConfig, *, n_active: float, n_context: float, n_pairs: float) -> float:
    """Operations of one layer.

    Args:
        config: the model.
        n_active: rows with queries, attention output and feed-forward.
        n_context: rows with keys and values.
        n_pairs: query–key pairs.
    """
    d, heads = config.d_model, config.n_heads * config.head_width
    keys = config.n_key_heads * config.head_width
    per_active = 4 * d * heads + (6 if config.gated else 4) * d * config.d_ff
    return n_active * per_active + n_context * 4 * d * keys + n_pairs * 4 * heads


def head_flops(config: ModelConfig, *, n_tokens: int, batch: int) -> float:
    """Operations of the head."""
    d = config.d_model
    rows = batch if config.head.per_sequence else n_tokens
    projection = 2 * d * config.output_width if config.head.kind in ("lm", "classify") else 0
    return rows * (projection + (2 * d * d if config.head.dense_tanh else 0))


def score_flops(config: ModelConfig, *, n_tokens: int) -> float:
    """Operations of the probe."""
    return n_tokens * 2 * config.d_model if config.probe == "linear" else 0


def dense_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Operations of every token through every layer; give padded lengths to count padding."""
    lengths = list(lengths)
    n_tokens = sum(lengths)
    n_pairs = sum(length * length for length in lengths)
    layer = layer_flops(config, n_active=n_tokens, n_context=n_tokens, n_pairs=n_pairs)
    return config.n_layers * layer + head_flops(config, n_tokens=n_tokens, batch=len(lengths))


def sparse_flops(
    config: ModelConfig, lengths: Iterable[int], active: Iterable[Iterable[int]]
) -> float:
    """Operations that the sparse function needs.

    Args:
        config: the model.
        lengths: tokens of each sequence.
        active: for every layer, the active tokens of each sequence.
    """
    lengths = list(lengths)
    total = head_flops(config, n_tokens=sum(lengths), batch=len(lengths))
    total += score_flops(config, n_tokens=sum(lengths))
    for counts in active:
        counts = list(counts)
        seen = counts
        if config.context == "all":
            seen = [n if count else 0 for n, count in zip(lengths, counts, strict=True)]
        total += layer_flops(
            config,
            n_active=sum(counts),
            n_context=sum(seen),
            n_pairs=sum(q * k for q, k in zip(counts, seen, strict=True)),
        )
    return total


FIXED_SCRATCH_BYTES = 4 << 20
"""What a run needs besides :func:`scratch_bytes_per_sequence`, whatever its size."""


def scratch_bytes_per_sequence(config: ModelConfig, length: int) -> float:
    """Estimate the memory above the weights that each sequence of ``length`` tokens adds to a run.

    Counted is the widest layer in float32, every token active: while it attends, the logits, their
    softmax and five times the states; in the feed-forward, twice its inner width (three times where
    it is gated), and of what the
    attention left in the arena the logits once and, buffers of the run included, eleven times the
    states. Besides, the output. That live tensors need the former follows from the graphs; what an
    arena's holes add is fitted to peaks, see ``benchmarks/memory_estimate.py``.
    """
    feed_forward = length * config.d_ff * (1.5 if config.gated else 1.0)
    states = length * config.d_model
    logits = config.n_heads * length * length
    output = config.output_width * (1 if config.head.per_sequence else length)
    return 4 * (output + max(2 * logits + 5 * states, logits + 2 * feed_forward + 11 * states))


def active_shares(manifest: Manifest, thresholds: Sequence[float]) -> tuple[float, ...]:
    """Return the share of tokens above each threshold, from the manifest's score quantiles.

    Without quantiles the scores are taken to be uniform; without a probe all of them are 1. With
    selection ``capacity`` the shares are given, up to rounding in each sequence.
    """
    if manifest.model.selection == "capacity":
        return tuple(min(1.0, max(0.0, 1.0 - threshold)) for threshold in thresholds)
    if manifest.model.probe == "none":
        return tuple(float(threshold < 1.0) for threshold in thresholds)
    return _shares(manifest.score_quantiles, manifest.pinned_share, tuple(thresholds))


@functools.lru_cache(maxsize=64)
def _shares(
    quantiles: tuple[float, ...] | None, pinned: float, thresholds: tuple[float, ...]
) -> tuple[float, ...]:
    levels = np.linspace(0.0, 1.0, 101)
    scores = levels if quantiles is None else np.asarray(quantiles)
    below = np.interp(thresholds, scores, levels, left=0.0, right=1.0)
    return tuple(float(pinned + (1 - pinned) * (1 - share)) for share in below)


def thresholds_for_depth(
    config: ModelConfig,
    target_depth: float,
    *,
    score_quantiles: Sequence[float] | None,
    pinned_share: float,
) -> tuple[float, ...]:
    """Return thresholds for another mean depth, from the score quantiles of a model.

    The model's own thresholds are moved along the quantiles, all by one factor: layers that every
    token takes stay so, and thresholds that are equal stay equal, so two levels remain two.

    Args:
        config: of a model with a probe.
        target_depth: layers per token, pinned tokens included, on text like the calibration text.
        score_quantiles: 101 of them, of the unpinned tokens of that text.
        pinned_share: share of pinned tokens in it.

    Raises:
        ConfigError: if there are no quantiles, or the depth cannot be reached.
    """
    quantiles, pinned, n_layers = score_quantiles, pinned_share, config.n_layers
    if config.selection == "capacity":
        quantiles, pinned = tuple(np.linspace(0.0, 1.0, 101)), 0.0
    if config.routing == "per_layer":
        raise ConfigError(
            "with routing 'per_layer' depths do not follow from the scores of the embeddings. Pass "
            "thresholds instead of a target depth"
        )
    if config.probe == "none" or quantiles is None:
        raise ConfigError(
            "a target depth needs score quantiles, and this model has none: it came without a "
            "fitted probe. Fit one (sdt-deploy convert --texts), distil it, or pass thresholds "
            "instead"
        )
    levels = np.linspace(0.0, 1.0, 101)
    below = np.interp(config.thresholds, quantiles, levels, left=0.0, right=1.0)
    always = int((below == 0).sum())
    lowest = pinned * n_layers + (1 - pinned) * always
    if not lowest <= target_depth <= n_layers:
        raise ConfigError(
            f"a mean depth of {target_depth} cannot be reached: pinned tokens, and layers that "
            f"every token takes, leave {lowest:.3g} to {n_layers}"
        )
    free = (target_depth - pinned * n_layers) / (1 - pinned) if pinned < 1 else n_layers
    now = n_layers - below.sum()
    if free >= now:
        below = below * ((n_layers - free) / (n_layers - now) if now < n_layers else 0.0)
    else:
        below = np.where(below > 0, 1 - (1 - below) * (free - always) / (now - always), 0.0)
    last = float(np.nextafter(np.float32(1), np.float32(0)))
    moved = np.minimum(np.interp(below, levels, quantiles), last)
    return tuple(float(value) for value in np.where(below > 0, moved, 0.0))
