"""Importance as what skipping costs: how the output changes when one token alone changes depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sdt_deploy.model.checkpoints import TokenSample
from sdt_deploy.model.probe import TokenFeatures, fit_probe, place_means, standardised
from sdt_deploy.model.transformer import DenseTransformer, SparseDepthTransformer

MAX_FREE_TOKENS = 64
"""Texts with more unpinned tokens are left out: the work grows with the square of their number."""
N_PLACED = 512
"""Tokens whose mean embedding is taken at every place."""
FIT_TOKENS = 60_000


@torch.no_grad()
def skipping_costs(
    model: SparseDepthTransformer,
    ids: Tensor,
    free: Tensor,
    wanted: Tensor,
    *,
    depths: Tensor,
    shallow_depth: int,
) -> Tensor:
    """Return ``[n]`` float32: by how much the loss is larger when a token is shallow than deep.

    Every free token in turn goes to the other of the two levels, all others stay where they are.
    The loss is 1 − cosine to the teacher.

    Args:
        model: with a head per sequence.
        ids: ``[seq]`` int64, of one text, no padding.
        free: ``[n]`` int64, places of the unpinned tokens.
        wanted: ``[width]``, the teacher's output.
        depths: ``[seq]`` integers, the layers of each token.
        shallow_depth: layers of a token that does not pass through all.
    """
    deep = depths == model.config.n_layers
    changed = depths.repeat(len(free) + 1, 1)
    row = torch.arange(len(free), device=ids.device)
    other = torch.where(deep[free], shallow_depth, model.config.n_layers)
    changed[row, free] = other.to(depths.dtype)
    rows = ids.expand_as(changed)
    output = model(rows, torch.ones_like(rows, dtype=torch.bool), depths=changed).output
    loss = 1 - functional.cosine_similarity(output, wanted[None], dim=-1)
    difference = loss[:-1] - loss[-1]
    return torch.where(deep[free], difference, -difference)


def is_measurable(sample: TokenSample, pinned_token_ids: Sequence[int]) -> bool:
    """Tell whether any text has 2 to :data:`MAX_FREE_TOKENS` unpinned tokens."""
    free = ~np.isin(sample.input_ids, pinned_token_ids)
    counts = np.add.reduceat(free, sample.cu_seqlens[:-1], dtype=np.int64)
    return bool(((counts >= 2) & (counts <= MAX_FREE_TOKENS)).any())


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """A text whose unpinned tokens were measured."""

    ids: Tensor
    """``[seq]`` int64."""
    free: Tensor
    """``[n]`` int64, places of the unpinned tokens."""
    embedded: Tensor
    """``[1, seq, d_model]``."""
    ranks: Tensor
    """``[n]`` float32, of :func:`skipping_costs` within the text, standardised."""


def measured_texts(
    model: SparseDepthTransformer,
    teacher: DenseTransformer,
    sample: TokenSample,
    thresholds: Sequence[float],
    *,
    shallow_depth: int = 1,
    max_tokens: int = FIT_TOKENS,
) -> Iterator[MeasuredText]:
    """Measure what skipping costs, text by text; for arguments see :func:`refitted_probe`.

    Gradients are kept unless the caller turns them off.
    """
    device = next(model.parameters()).device
    n_free = 0
    for start, stop in zip(sample.cu_seqlens[:-1], sample.cu_seqlens[1:], strict=True):
        if n_free >= max_tokens:
            break
        ids = torch.from_numpy(sample.input_ids[start:stop].astype(np.int64)).to(device)
        free = (~torch.isin(ids.int(), model.scorer.pinned_token_ids)).nonzero()[:, 0]
        if not 2 <= len(free) <= MAX_FREE_TOKENS:
            continue
        mask = torch.ones_like(ids, dtype=torch.bool)[None]
        embedded = model.embed(ids[None])
        depths = model.depths(model.scorer(ids[None], embedded), mask, thresholds)[0]
        wanted = teacher(ids[None], mask).output[0]
        costs = skipping_costs(model, ids, free, wanted, depths=depths, shallow_depth=shallow_depth)
        ranks = costs.argsort().argsort().float()[None]
        ranks = standardised(ranks, torch.ones_like(ranks, dtype=torch.bool))[0]
        yield MeasuredText(ids=ids, free=free, embedded=embedded, ranks=ranks)
        n_free += len(free)


@torch.no_grad()
def refitted_probe(
    model: SparseDepthTransformer,
    teacher: DenseTransformer,
    sample: TokenSample,
    thresholds: Sequence[float],
    *,
    shallow_depth: int = 1,
    max_tokens: int = FIT_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Fit the probe to the rank that the cost of skipping a token has within its text.

    The closed form is that of :func:`~sdt_deploy.model.probe.fit_probe`. The texts are short, so it
    is told what embeddings look like at the places that they do not reach: there the scores would
    otherwise drift, and long texts would be skipped too much or too little.

    Args:
        model: two levels, trained; with the probe that it was trained with.
        teacher: the dense model, on the same device.
        sample: texts; those of 2 to :data:`MAX_FREE_TOKENS` unpinned tokens are used.
        thresholds: of ``model``, around which tokens change.
        shallow_depth: see :func:`skipping_costs`.
        max_tokens: unpinned tokens to measure.

    Returns:
        ``weight [d_model]`` and ``bias []``, float32, on the CPU.
    """
    measured = list(
        measured_texts(
            model,
            teacher,
            sample,
            thresholds,
            shallow_depth=shallow_depth,
            max_tokens=max_tokens,
        )
    )
    n_free, n_all = sum(len(one.free) for one in measured), sum(len(one.ids) for one in measured)
    token_ids = torch.cat([one.ids[one.free] for one in measured])
    some = token_ids[torch.randperm(n_free, generator=torch.Generator().manual_seed(0))[:N_PLACED]]
    first = min(int(one.free[0]) for one in measured)
    return fit_probe(
        TokenFeatures(
            embedded=torch.cat([one.embedded[0, one.free].cpu() for one in measured]),
            importance=torch.cat([one.ranks.cpu() for one in measured]),
            position_ids=torch.cat([one.free.cpu() for one in measured]),
            pinned_share=1 - n_free / n_all,
            place_means=place_means(model, some, first).cpu(),
        )
    )
