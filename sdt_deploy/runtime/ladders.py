"""Sizes that captured graphs are made for: a few, so that they are reused.

A *bucket* is a triple of sizes on a ladder; a batch takes the smallest one that holds it. Rungs
grow by a quarter at most, those of tokens by a thirty-second from 2,048 on, which bounds what
padding costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sdt_deploy.errors import ConfigError

TOKEN_MULTIPLE = 64
"""Rows come in multiples of it: the height of the tiles that GPU matrix products work on."""
SEQLEN_MULTIPLE = 8
QUERY_TILE = 64
"""Queries of a sequence that the attention between the pieces of stages takes at a time; flash
attention of the libraries takes 128, too many for what is left of a sequence in deep layers.
Nothing else depends on the longest sequence there, so a finer size would save nothing."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sizes that a graph is captured for."""

    n_tokens: int
    """Rows."""
    batch: int
    """Sequences."""
    max_seqlen: int
    """Places of each sequence."""

    def __post_init__(self) -> None:
        if min(self.n_tokens, self.batch, self.max_seqlen) < 1:
            raise ConfigError(f"sizes of a bucket are positive, not {self}")


def rung(size: int, *, multiple: int, steps: int) -> int:
    """Return the smallest rung of a ladder that is at least ``size``.

    Between two powers of two there are ``steps`` rungs at most, all multiples of ``multiple``.

    Args:
        size: a positive number.
        multiple: a power of two.
        steps: a power of two; a rung is at most ``1 + 1 / steps`` of the one below it, or
            ``multiple`` larger.
    """
    step = max(multiple, (1 << (size.bit_length() - 1)) // steps)
    return -(-size // step) * step


def bucket_seqlen(longest: int, *, max_seqlen: int) -> int:
    """Return the places of each sequence in the bucket of a batch; see :func:`batch_bucket`."""
    return min(rung(longest, multiple=SEQLEN_MULTIPLE, steps=4), max(max_seqlen, longest))


def batch_bucket(lengths: Sequence[int], *, max_seqlen: int) -> Bucket:
    """Return the bucket of a padded batch; ``n_tokens`` counts its padding too.

    Args:
        lengths: tokens of each sequence.
        max_seqlen: no sequence may be longer, so neither is the bucket's; see
            :func:`sdt_deploy.buckets.longest_sequence`.
    """
    batch = rung(len(lengths), multiple=1, steps=4)
    longest = bucket_seqlen(max(lengths), max_seqlen=max_seqlen)
    return Bucket(n_tokens=batch * longest, batch=batch, max_seqlen=longest)


def largest_batch(n_sequences: int) -> int:
    """Return the largest number of sequences, up to ``n_sequences``, that is a bucket's batch."""
    while n_sequences and rung(n_sequences, multiple=1, steps=4) > n_sequences:
        n_sequences -= 1
    return n_sequences


def stage_bucket(
    n_active: int, max_seqlen: int, whole: Bucket, *, in_pieces: bool = False
) -> Bucket:
    """Return the bucket of a stage call.

    Args:
        n_active: active tokens.
        max_seqlen: active tokens of the sequence that has most.
        whole: the bucket of the batch.
        in_pieces: whether the stage pads no sequences, see :data:`QUERY_TILE`.
    """
    multiple = QUERY_TILE if in_pieces else SEQLEN_MULTIPLE
    return Bucket(
        n_tokens=min(rung(n_active, multiple=TOKEN_MULTIPLE, steps=32), whole.n_tokens),
        batch=whole.batch,
        max_seqlen=min(rung(max_seqlen, multiple=multiple, steps=8), whole.max_seqlen),
    )


def is_one_piece(whole: Bucket) -> bool:
    """Tell whether all stage calls of a batch have the rows of its bucket, however many are active.

    Then nothing has to be read back, and the whole batch is one captured graph.
    """
    return whole.n_tokens <= TOKEN_MULTIPLE


def likely_buckets(
    whole: Bucket, share: float, *, spread: float = 0.1, in_pieces: bool = False
) -> list[Bucket]:
    """Return the buckets that a stage call is likely to need, for captures made beforehand.

    Args:
        whole: the bucket of the batch.
        share: expected share of active tokens, 0 to 1.
        spread: how far the share of one batch may lie from it, and that of the sequence that has
            most active tokens twice as far above it.
        in_pieces: see :func:`stage_bucket`.
    """
    low, high, most = (min(1.0, max(0.0, share + by)) for by in (-spread, spread, 2 * spread))
    if not share:
        return []
    found = {
        stage_bucket(n_active, longest, whole, in_pieces=in_pieces)
        for n_active in _between(low * whole.n_tokens, high * whole.n_tokens, TOKEN_MULTIPLE)
        for longest in _between(share * whole.max_seqlen, most * whole.max_seqlen, SEQLEN_MULTIPLE)
    }
    return sorted(found, key=lambda bucket: (bucket.n_tokens, bucket.max_seqlen))


def _between(low: float, high: float, step: int) -> list[int]:
    """Return sizes from ``low`` to ``high`` that miss no rung between them."""
    first, last = max(1, round(low)), max(1, round(high))
    return [*range(first, last, step), last]
