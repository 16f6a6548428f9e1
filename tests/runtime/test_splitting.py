"""Batches that run in parts give what they give whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig, HeadConfig, ModelConfig
from sdt_deploy.costs import FIXED_SCRATCH_BYTES, scratch_bytes_per_sequence
from sdt_deploy.errors import ConfigError, InputError
from sdt_deploy.runtime import backends
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits, select, split_batch
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    ExportedModel,
    assert_parity,
    cut_points,
    lengths_lists,
    model_configs,
    quantile_thresholds,
    random_batch,
    random_model,
    seeds,
)

Exported = Callable[[str], ExportedModel]
CONFIG = CONFIGS["all-embedding"][0]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), limit=st.integers(1, 400))
def test_groups_stay_below_the_limit_and_hold_everyone_once(lengths: list[int], limit: int) -> None:
    array = np.array(lengths, dtype=np.int32)
    groups = split_batch(array, CONFIG, PartLimits(max_padded_tokens=limit))
    assert bool(groups) == (len(lengths) * max(lengths) > limit and len(lengths) > 1)
    groups = groups or [np.arange(len(lengths))]
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * array[group].max() <= limit or len(group) == 1
    minimal = sum(lengths)
    padded = sum(len(group) * int(array[group].max()) for group in groups)
    assert minimal <= padded <= len(lengths) * max(lengths)


def estimate_mb(lengths: list[int]) -> float:
    each = scratch_bytes_per_sequence(CONFIG, max(lengths))
    return (FIXED_SCRATCH_BYTES + len(lengths) * each) / 2**20


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), spare=st.floats(1.001, 30))
def test_groups_fit_into_memory(lengths: list[int], spare: float) -> None:
    fixed = FIXED_SCRATCH_BYTES / 2**20
    cap = fixed + (estimate_mb([max(lengths)]) - fixed) * spare
    array = np.array(lengths, dtype=np.int32)
    groups = split_batch(array, CONFIG, PartLimits(max_memory_mb=cap))
    assert bool(groups) == (estimate_mb(lengths) > cap)
    groups = groups or [np.arange(len(lengths))]
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        assert estimate_mb(array[group].tolist()) <= cap


def test_a_sequence_that_does_not_fit_into_memory_is_refused() -> None:
    limits = PartLimits(max_memory_mb=estimate_mb([40]))
    assert len(split_batch(np.array([40, 40]), CONFIG, limits)) == 2
    with pytest.raises(
        InputError, match=r"a sequence of 41 tokens needs about 4\.\d MB.* allows 4"
    ):
        split_batch(np.array([1, 41]), CONFIG, limits)


def test_the_estimate_counts_what_grows() -> None:
    """Twice the sequences need twice, a longer sequence more than in proportion, logits count."""
    wide = CONFIG.replace(head=HeadConfig(kind="lm"), vocab_size=30_000)
    assert scratch_bytes_per_sequence(wide, 10) > 4 * 10 * 30_000
    assert scratch_bytes_per_sequence(CONFIG, 400) > 20 * scratch_bytes_per_sequence(CONFIG, 40)


def test_a_part_is_a_batch_of_its_own() -> None:
    batch = random_batch(CONFIG, [3, 1, 4], 0)
    assert batch.token_type_ids is not None
    part = select(batch, np.array([2, 0]))
    assert part.cu_seqlens.tolist() == [0, 4, 7]
    assert part.cu_seqlens.dtype == np.int32
    rows = [4, 5, 6, 7, 0, 1, 2]
    np.testing.assert_array_equal(part.input_ids, batch.input_ids[rows])
    np.testing.assert_array_equal(part.token_type_ids, batch.token_type_ids[rows])


@given(
    data=st.data(),
    drawn=model_configs(),
    lengths=lengths_lists,
    seed=seeds,
    limit=st.integers(1, 60),
    path=st.sampled_from(["sparse", "masked"]),
)
@settings(max_examples=80, deadline=None)
def test_any_model_in_parts(
    data: st.DataObject,
    drawn: tuple[ModelConfig, ExportConfig],
    lengths: list[int],
    seed: int,
    limit: int,
    path: str,
) -> None:
    config, export_config = drawn
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model, export_config)
    limits = PartLimits(max_padded_tokens=limit)
    session = Session(bundle, OracleBackend(bundle, model), part_limits=limits)
    batch = random_batch(config, lengths, seed)
    thresholds = quantile_thresholds(model, batch, data.draw(cut_points(config.n_layers)))
    result = assert_parity(session, model, batch, thresholds, path)
    assert result.layer_usage.n_tokens == batch.n_tokens
    np.testing.assert_array_equal(result.cu_seqlens, batch.cu_seqlens)
    np.testing.assert_array_equal(result.input_ids, batch.input_ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_uneven_batch_on_onnxruntime(exported: Exported, name: str) -> None:
    sample = exported(name)
    batch = random_batch(sample.model.config, [1, 28, 2, 2, 17, 1, 3], 7)
    with Session.open(sample.bundle, max_padded_tokens=30) as session:
        result = assert_parity(session, sample.model, batch)
        n_stages = len(session.manifest.stages)
        assert len(result.timings.stage_ms) > n_stages
        auto = session.run_batch(batch)
        np.testing.assert_allclose(auto.output, result.output, rtol=0, atol=1e-5)
        dense = session.run_batch(batch, path="dense")
        assert dense.output.shape == result.output.shape


def test_a_memory_cap_splits_and_changes_nothing(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [30] * 6, 3)
    with Session.open(sample.bundle, max_memory_mb=estimate_mb([30, 30])) as session:
        for path in ("sparse", "masked"):
            result = assert_parity(session, sample.model, batch, path=path)
        n_stages = len(session.manifest.stages)
        assert len(session.run_batch(batch, path="sparse").timings.stage_ms) == 3 * n_stages
        assert result.path == "masked"


@pytest.mark.parametrize("value", [0, -3, math.inf, math.nan, "64", True])
@pytest.mark.parametrize("name", ["max_padded_tokens", "max_memory_mb", "max_depth_drift"])
def test_the_limits_are_checked(exported: Exported, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a (positive integer|finite number)"):
        Session.open(exported("active-lm").bundle, **{name: value})  # type: ignore[arg-type]


@given(st.floats(0.01, 4.0))
def test_the_longest_sequence_that_a_memory_cap_allows(max_memory_mb: float) -> None:
    config = CONFIGS["all-embedding"][0]
    limits = PartLimits(max_memory_mb=max_memory_mb)
    fits = [n for n in range(1, config.max_positions + 1) if estimate_mb([n]) <= max_memory_mb]
    if fits:
        assert limits.longest(config) == fits[-1]
    else:
        with pytest.raises(InputError, match="a sequence of 1 tokens needs about"):
            limits.longest(config)


def test_parts_are_as_large_as_the_pool_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "usable_cores", lambda: 16)
    for threads, expected in ((None, 16 * 1024), (0, 16 * 1024), (2, 2048), (6, 6 * 1024)):
        monkeypatch.setattr(backends, "pool_threads", lambda n=threads: n)
        assert backends.default_padded_tokens("onnxruntime-cpu") == expected


def test_numpy_scalars_are_numbers() -> None:
    limits = PartLimits(
        max_padded_tokens=np.int64(64),  # type: ignore[arg-type]
        max_memory_mb=np.float32(2),  # type: ignore[arg-type]
    )
    assert limits == PartLimits(max_padded_tokens=64, max_memory_mb=2.0)
    assert type(limits.max_padded_tokens) is int
