"""What is measured once the weights are there: scores, thresholds, what the probe may not see."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.choices import Levels
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import rebuilt
from sdt_deploy.model.probe import (
    padded_batches,
    place_means,
    quantiles,
    set_thresholds,
)
from sdt_deploy.model.transformer import SparseDepthTransformer

CALIBRATION_TOKENS = 200_000
POSITION_VARIANCE = 0.95
"""Share of the positions' variance that the probe may not see. Beyond it, directions are those of
single positions."""
POSITION_TOKENS = 300
FRAME_TOKENS = 30_000


@torch.no_grad()
def free_logits(model: SparseDepthTransformer, sample: TokenSample) -> tuple[Tensor, float]:
    """Return the score logits ``[n]`` of the unpinned tokens, and the share of pinned ones."""
    found, n_tokens = [], 0
    for ids, mask in padded_batches(sample, CALIBRATION_TOKENS):
        free = mask & ~torch.isin(ids.int(), model.scorer.pinned_token_ids)
        found.append(model.scorer.logits(model.embed(ids))[free])
        n_tokens += int(mask.sum())
    logits = torch.cat(found)
    return logits, 1 - len(logits) / n_tokens


@torch.no_grad()
def calibrated(
    checkpoint: Checkpoint,
    sample: TokenSample,
    *,
    target_depth: float,
    levels: Levels,
    shallow_depth: int = 1,
) -> Checkpoint:
    """Return ``checkpoint`` with thresholds, quantiles and pinned share from ``sample``.

    The probe is scaled so that the logits have mean 0 and variance 1 there, which changes no
    order; the scores then spread over (0, 1).

    Raises:
        ConfigError: if the depth cannot be reached.
    """
    if checkpoint.model.config.probe != "linear":
        return checkpoint
    model = rebuilt(checkpoint.model)
    logits, pinned_share = free_logits(model, sample)
    spread = logits.std().clamp_min(1e-6)
    model.scorer.weight.div_(spread)
    model.scorer.bias.copy_((model.scorer.bias - logits.mean()) / spread)
    logits, pinned_share = free_logits(model, sample)
    scores = logits.sigmoid().numpy()
    thresholds = set_thresholds(
        scores, pinned_share, model.config, target_depth, levels, shallow_depth=shallow_depth
    )
    made = {
        **checkpoint.provenance.get("probe", {}),
        "levels": levels,
        "target_depth": target_depth,
        "n_tokens": len(scores),
    }
    return dataclasses.replace(
        checkpoint,
        model=rebuilt(model, thresholds=thresholds),
        score_quantiles=quantiles(scores),
        pinned_share=pinned_share,
        provenance={**checkpoint.provenance, "probe": made},
    )


@dataclass(frozen=True, kw_only=True)
class ProbeFrame:
    """Keeps a probe that is trained blind to position, with logits of mean 0 and variance 1.

    What counts is the order of the scores. A mean or a scale that drifts would only make scores of
    earlier batches useless for finding limits, and a share that tells positions apart would make
    depth depend on length.
    """

    directions: Tensor
    """``[k, d_model]``, orthonormal, in which the mean embeddings of the positions differ."""
    mean: Tensor
    """``[d_model]``, of the embeddings of unpinned tokens."""
    covariance: Tensor
    """``[d_model, d_model]``, of the same."""

    @torch.no_grad()
    def place(self, weight: Tensor, bias: Tensor) -> None:
        """Bring the probe ``weight [d_model]``, ``bias []`` into the frame, in place."""
        weight.sub_(self.directions.T @ (self.directions @ weight))
        weight.div_((weight @ self.covariance @ weight).sqrt().clamp_min(1e-6))
        bias.copy_(-(self.mean @ weight))


@torch.no_grad()
def probe_frame(
    model: SparseDepthTransformer, sample: TokenSample, device: torch.device
) -> ProbeFrame:
    """Measure the frame on the first tokens of ``sample``."""
    found = []
    for ids, mask in padded_batches(sample, FRAME_TOKENS):
        free = mask & ~torch.isin(ids.int(), model.scorer.pinned_token_ids)
        found.append(model.embed(ids)[free])
    embedded = torch.cat(found)
    mean = embedded.mean(dim=0)
    covariance = (embedded - mean).T @ (embedded - mean) / len(embedded)
    return ProbeFrame(
        directions=position_directions(model, sample).to(device),
        mean=mean.to(device),
        covariance=covariance.to(device),
    )


@torch.no_grad()
def position_directions(model: SparseDepthTransformer, sample: TokenSample) -> Tensor:
    """Return orthonormal ``[k, d_model]``, in which the mean embeddings of the positions differ.

    Each position is averaged over the same tokens of ``sample``, so that nothing but the position
    differs. They are principal components, as many as hold :data:`POSITION_VARIANCE`.
    """
    spread = np.linspace(0, len(sample.input_ids) - 1, POSITION_TOKENS).astype(np.int64)
    ids = torch.from_numpy(sample.input_ids[spread]).long()
    means = place_means(model, ids)
    _, strengths, directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
    held = strengths.square().cumsum(0) / strengths.square().sum().clamp_min(1e-12)
    count = int((held < POSITION_VARIANCE).sum()) + 1
    return directions[: min(count, max(1, model.config.d_model // 4))]
