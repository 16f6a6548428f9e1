"""Token ids on a device, in batches of similar lengths whose order follows from a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdt_deploy.model.checkpoints import TokenSample

POOL_BATCHES = 50
"""Sequences are sorted by length within pools of so many batches."""
WIDTH_STEP = 8
"""Padded lengths are multiples of this, as fused attention wants them."""
MIN_CROP = 12
"""Tokens that a part of a sequence has at least."""


def epoch_batches(
    lengths: npt.NDArray[np.integer], batch_size: int, *, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Return the sequences of every batch of an epoch, each sequence at most once.

    The order depends on nothing but the arguments, so a run that was killed finds its place again.
    All batches have ``batch_size`` sequences (all there are, if fewer); up to ``batch_size - 1``
    sequences stay out of an epoch, others in each.
    """
    rng = np.random.default_rng([seed, epoch])
    size = min(batch_size, len(lengths))
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    pool = size * POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        chosen = order[start : start + pool]
        chosen = chosen[np.argsort(lengths[chosen], kind="stable")]
        batches += np.split(chosen, len(chosen) // size)
    return [batches[i] for i in rng.permutation(len(batches))]


class BatchStream:
    """The batch of any step, without having made those before it."""

    def __init__(self, lengths: npt.NDArray[np.integer], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.batches_per_epoch = max(1, len(lengths) // min(batch_size, len(lengths)))
        self._epoch, self._batches = -1, [np.zeros(0, dtype=np.int64)]

    def __call__(self, step: int) -> npt.NDArray[np.int64]:
        """Return the sequences of ``step``, counted from 0."""
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(
                self._lengths, self._batch_size, seed=self._seed, epoch=epoch
            )
            self._epoch = epoch
        return self._batches[place]


class DeviceTokens:
    """Packed sequences on a device; gathers padded batches there."""

    def __init__(self, sample: TokenSample, max_length: int, device: torch.device) -> None:
        self.lengths = np.minimum(np.diff(sample.cu_seqlens), max_length).astype(np.int64)
        self._max_length = max_length
        self.starts = sample.cu_seqlens[:-1].astype(np.int64)
        self.input_ids = torch.from_numpy(sample.input_ids.astype(np.int32)).to(device)

    def rows(
        self,
        sequences: npt.NDArray[np.int64],
        crop_share: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``index [batch, seq]`` into the packed rows and ``mask [batch, seq]``.

        Args:
            sequences: which.
            crop_share: share of them of which a random part is taken, of :data:`MIN_CROP` tokens
                or more; their first and last tokens stay.
            rng: draws the parts.
        """
        starts, whole = self.starts[sequences], self.lengths[sequences]
        lengths, skipped = whole, np.zeros_like(whole)
        if rng is not None and crop_share:
            cropped = (rng.random(len(whole)) < crop_share) & (whole > MIN_CROP)
            drawn = rng.integers(np.minimum(MIN_CROP, whole), whole + 1)
            lengths = np.where(cropped, drawn, whole)
            skipped = rng.integers(0, whole - lengths + 1)
        longest = int(lengths.max())
        rounded = -(-longest // WIDTH_STEP) * WIDTH_STEP
        place = np.arange(max(longest, min(rounded, self._max_length)))
        index = starts[:, None] + place + np.where(place > 0, skipped[:, None], 0)
        index = np.where(place == lengths[:, None] - 1, (starts + whole - 1)[:, None], index)
        mask = place < lengths[:, None]
        device = self.input_ids.device
        return (
            torch.from_numpy(np.where(mask, index, 0)).to(device, non_blocking=True),
            torch.from_numpy(mask).to(device, non_blocking=True),
        )

    def padded(
        self,
        sequences: npt.NDArray[np.int64],
        crop_share: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``input_ids``, ``mask`` and ``index``, all ``[batch, seq]``; padding has id 0."""
        index, mask = self.rows(sequences, crop_share, rng)
        return torch.where(mask, self.input_ids[index], 0).long(), mask, index

    def replaced(
        self, ids: Tensor, kept: Tensor, share: float, pinned: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """Return ``ids [batch, seq]`` with a share replaced by tokens drawn from the texts.

        Args:
            ids: of the batch.
            kept: ``[batch, seq]`` bool, what is never replaced.
            share: of the others that is.
            pinned: ids that are never put in.
            rng: draws.
        """
        drawn = rng.integers(0, len(self.input_ids), ids.shape)
        chosen = torch.from_numpy(rng.random(ids.shape) < share).to(ids.device)
        new = self.input_ids[torch.from_numpy(drawn).to(ids.device)]
        chosen = chosen & ~kept & ~torch.isin(new, pinned)
        return torch.where(chosen, new.long(), ids)
