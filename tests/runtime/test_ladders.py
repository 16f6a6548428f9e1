"""Sizes of captured graphs: pure decisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.errors import ConfigError
from sdt_deploy.runtime.graph_cache import MAX_GRAPHS
from sdt_deploy.runtime.ladders import Bucket, batch_bucket, likely_buckets, rung, stage_bucket


@given(st.integers(1, 200_000), st.sampled_from([1, 8, 64]), st.sampled_from([4, 8]))
def test_a_rung_holds_and_is_near(size: int, multiple: int, steps: int) -> None:
    found = rung(size, multiple=multiple, steps=steps)
    assert found >= size
    assert found % multiple == 0
    assert found < size * (1 + 1 / steps) + multiple
    assert rung(found, multiple=multiple, steps=steps) == found, "a rung is its own rung"


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_rungs_rise_with_size(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert rung(small, multiple=64, steps=8) <= rung(large, multiple=64, steps=8)


def test_the_ladder_is_short() -> None:
    """Few rungs, so that graphs are reused: 8 for each doubling, from 512 tokens on."""
    rungs = {rung(n, multiple=64, steps=8) for n in range(1, 8193)}
    assert len(rungs) == 8 + 8 * 4
    assert [n for n in sorted(rungs) if n <= 512] == list(range(64, 513, 64))


@given(st.lists(st.integers(1, 512), min_size=1, max_size=300), st.data())
def test_buckets_hold_their_batch(lengths: list[int], data: st.DataObject) -> None:
    whole = batch_bucket(lengths, max_seqlen=512)
    assert whole.batch >= len(lengths)
    assert max(lengths) <= whole.max_seqlen <= 512
    assert whole.n_tokens == whole.batch * whole.max_seqlen
    active = [data.draw(st.integers(0, n)) for n in lengths]
    if any(active):
        in_pieces = data.draw(st.booleans())
        stage = stage_bucket(sum(active), max(active), whole, in_pieces=in_pieces)
        assert sum(active) <= stage.n_tokens <= whole.n_tokens
        assert max(active) <= stage.max_seqlen <= whole.max_seqlen
        assert stage.batch == whole.batch


def test_sizes_in_use_are_rungs() -> None:
    """Batches of common sizes are not padded, so a comparison at them is one of equals."""
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        for seq in (64, 128, 256, 512):
            found = batch_bucket([seq] * batch, max_seqlen=512)
            assert (found.batch, found.max_seqlen) == (batch, seq)


def test_empty_buckets_are_refused() -> None:
    with pytest.raises(ConfigError, match="positive"):
        Bucket(n_tokens=0, batch=1, max_seqlen=1)


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 1), st.data())
def test_likely_buckets_miss_none_between(
    batch: int, longest: int, share: float, data: st.DataObject
) -> None:
    whole = batch_bucket([longest * 8] * batch, max_seqlen=512)
    in_pieces = data.draw(st.booleans())
    found = likely_buckets(whole, share, spread=0.1, in_pieces=in_pieces)
    near = data.draw(st.floats(share - 0.1, min(1.0, share + 0.1)))
    widest = data.draw(st.floats(share, min(1.0, share + 0.2)))
    n_active = max(1, round(near * whole.n_tokens))
    longest = max(1, round(widest * whole.max_seqlen))
    assert stage_bucket(n_active, longest, whole, in_pieces=in_pieces) in found


@pytest.mark.parametrize(("batch", "seq"), [(16, 512), (64, 128), (128, 256)])
def test_all_that_is_likely_fits_the_cache_of_graphs(batch: int, seq: int) -> None:
    """Of a model with 12 layers: a warm-up that throws out what it captured would be in vain."""
    whole = batch_bucket([seq] * batch, max_seqlen=512)
    shares = [1.0, *np.linspace(0.8, 0.2, 11).tolist()]
    found = [likely_buckets(whole, share, in_pieces=True) for share in shares]
    assert sum(map(len, found)) < MAX_GRAPHS
    for share, sizes in zip(shares, found, strict=True):
        assert len(sizes) < len(likely_buckets(whole, share)) or share == 1.0


def test_a_stage_without_tokens_needs_no_bucket() -> None:
    assert not likely_buckets(batch_bucket([8], max_seqlen=8), 0.0)
