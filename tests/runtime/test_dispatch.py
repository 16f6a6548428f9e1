from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.costs import active_shares, dense_flops, head_flops, score_flops, sparse_flops
from sdt_deploy.runtime.dispatch import (
    MAX_REMEMBERED,
    CostModel,
    LinearCost,
    Path,
    Work,
    calibrate,
    calibration_sizes,
    candidates,
    expected_work,
    path_works,
    remembered_choice,
)
from sdt_deploy.testing import memory_bundle
from tests.samples import random_model

CONFIG = ModelConfig(
    vocab_size=11,
    d_model=8,
    n_heads=2,
    n_layers=2,
    d_ff=16,
    max_positions=64,
    thresholds=(0.25, 0.75),
    context="active",
    head=HeadConfig(kind="lm"),
)


def _line(fixed_ms: float, ms_per_gflop: float) -> LinearCost:
    return LinearCost(
        fixed_ms=fixed_ms, rows_ms_per_gflop=ms_per_gflop, pairs_ms_per_gflop=ms_per_gflop
    )


def test_operations_by_hand() -> None:
    layer = 2 * 3 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 9 * 2 * 8
    head, score = 3 * 2 * 8 * 11, 3 * 2 * 8
    ends = head + score
    assert head_flops(CONFIG, n_tokens=3, batch=1) == head
    assert score_flops(CONFIG, n_tokens=3) == score
    assert dense_flops(CONFIG, [3]) == 2 * layer + head
    assert sparse_flops(CONFIG, [3], [[3], [3]]) == 2 * layer + ends
    one = 2 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 1 * 2 * 8
    assert sparse_flops(CONFIG, [3], [[3], [1]]) == layer + one + ends
    every = CONFIG.replace(context="all")
    seen = 2 * (2 * 8 * 8 + 2 * 8 * 16) + 2 * 3 * 2 * 8 * 8 + 2 * 3 * 2 * 8
    assert sparse_flops(every, [3], [[3], [1]]) == layer + seen + ends
    assert sparse_flops(every, [3, 3], [[3, 3], [1, 0]]) == 2 * layer + seen + 2 * ends


@pytest.mark.parametrize("context", ["active", "all"])
def test_expected_operations_are_those_of_even_shares(context: str) -> None:
    config = CONFIG.replace(context=context)
    lengths = [8, 20, 12]
    active = [[n * share // 4 for n in lengths] for share in (3, 1)]
    expected = expected_work(config, lengths, (0.75, 0.25))
    assert sum(expected) == pytest.approx(sparse_flops(config, lengths, active))
    whole = expected_work(config, lengths, (1.0, 1.0))
    scores = score_flops(config, n_tokens=sum(lengths))
    assert sum(whole) == pytest.approx(dense_flops(config, lengths) + scores)
    assert whole.pairs == 2 * (8**2 + 20**2 + 12**2) * 4 * 8
    works = path_works(config, lengths, (1.0, 1.0), ("sparse", "single", "masked"))
    assert works["sparse"] == works["single"] == whole
    assert sum(works["masked"]) == pytest.approx(dense_flops(config, [20] * 3))
    assert works["masked"].pairs == 2 * 3 * 20**2 * 4 * 8


@given(
    st.tuples(*[st.floats(0.0, 10.0)] * 3),
    st.integers(9, 600),
    st.integers(100, 20_000),
)
def test_fit_recovers_what_was_measured(
    parts: tuple[float, float, float], longest: int, n_tokens: int
) -> None:
    fixed, rows, pairs = parts
    cost = LinearCost(fixed_ms=fixed, rows_ms_per_gflop=rows, pairs_ms_per_gflop=pairs)
    sizes = calibration_sizes(longest, n_tokens)
    works = [expected_work(CONFIG, lengths, (0.75, 0.25)) for lengths in sizes]
    found = LinearCost.fit([(work, cost.predict_ms(work)) for work in works])
    for work in works:
        assert found.predict_ms(work) == pytest.approx(cost.predict_ms(work), rel=1e-3, abs=1e-9)
    if longest > 128 and n_tokens >= 8192:  # enough for all three
        assert found.fixed_ms == pytest.approx(fixed, rel=1e-3, abs=1e-6)
        assert found.rows_ms_per_gflop == pytest.approx(rows, rel=1e-2, abs=1e-3)
        assert found.pairs_ms_per_gflop == pytest.approx(pairs, rel=1e-2, abs=1e-3)


def test_no_part_of_a_cost_falls_below_zero() -> None:
    small, wide, long = Work(1e9, 0.0), Work(3e9, 0.1e9), Work(3e9, 1e9)
    falling = LinearCost.fit([(small, 3.0), (wide, 1.0), (long, 1.0)])
    assert (falling.rows_ms_per_gflop, falling.pairs_ms_per_gflop) == (0.0, 0.0)
    assert falling.fixed_ms == pytest.approx(5 / 3)
    negative = LinearCost.fit([(small, 0.5), (wide, 3.0), (long, 3.0)])
    assert negative.fixed_ms == 0.0
    assert negative.rows_ms_per_gflop > 0.0
    free = LinearCost.fit([(small, 0.0), (wide, 0.0), (long, 0.0)])
    assert free.predict_ms(long) == 0.0


def test_long_sequences_take_the_path_that_is_faster_at_attention() -> None:
    model = CostModel(
        lines={
            "sparse": LinearCost(fixed_ms=1.0, rows_ms_per_gflop=100.0, pairs_ms_per_gflop=100.0),
            "single": LinearCost(fixed_ms=0.2, rows_ms_per_gflop=100.0, pairs_ms_per_gflop=300.0),
        }
    )
    assert model.choose(CONFIG, [[64] * 200], (0.75, 0.25)) == "sparse"
    assert model.choose(CONFIG, [[2] * 6400], (0.75, 0.25)) == "single"


def test_small_batches_go_masked_and_large_ones_sparse() -> None:
    model = CostModel(
        lines={
            "sparse": _line(1.0, 100.0),
            "masked": _line(0.1, 100.0),
        }
    )
    shares = (0.75, 0.25)
    assert model.choose(CONFIG, [[2]], shares) == "masked"
    assert model.choose(CONFIG, [[60] * 200], shares) == "sparse"
    assert model.choose(CONFIG, [[64] + [1] * 600], shares) == "sparse"


def test_the_single_graph_counts_skipped_operations_as_sparse_does() -> None:
    model = CostModel(
        lines={
            "sparse": _line(1.0, 100.0),
            "single": _line(0.2, 120.0),
            "masked": _line(0.1, 120.0),
        }
    )
    shares = (0.75, 0.25)
    assert model.choose(CONFIG, [[2]], shares) == "masked"
    assert model.choose(CONFIG, [[60] * 20], shares) == "single"
    assert model.choose(CONFIG, [[60] * 2000], shares) == "sparse"
    equal = CostModel(lines=dict.fromkeys(("sparse", "single"), _line(1.0, 0.0)))
    assert equal.choose(CONFIG, [[9]], shares) == "sparse"


def test_candidates_are_what_the_backend_runs() -> None:
    assert candidates(CONFIG, {"masked"}.__contains__) == ("sparse", "masked")
    assert candidates(CONFIG, {"single", "masked"}.__contains__) == ("sparse", "single")
    assert candidates(CONFIG, set[str]().__contains__) == ("sparse",)
    whole = CONFIG.replace(probe="none")
    assert candidates(whole, {"single", "masked"}.__contains__) == ("sparse", "masked")


def test_shares_come_from_the_quantiles_of_the_scores() -> None:
    import dataclasses

    manifest = memory_bundle(random_model(CONFIG, 0)).manifest
    assert active_shares(manifest, (0.25, 0.75)) == pytest.approx((0.75, 0.25))
    assert active_shares(manifest, (-1.0, 2.0)) == pytest.approx((1.0, 0.0))
    squared = tuple((i / 100) ** 2 for i in range(101))
    pinned = dataclasses.replace(manifest, score_quantiles=squared, pinned_share=0.2)
    dense = dataclasses.replace(manifest, model=CONFIG.replace(probe="none"))
    assert active_shares(dense, (0.5, 1.5)) == (1.0, 0.0)
    assert active_shares(pinned, (0.25, 2.0)) == pytest.approx((0.2 + 0.8 * 0.5, 0.2), abs=1e-3)


def test_calibration_measures_one_short_sequence_many_and_long_ones() -> None:
    asked = []
    fixed: dict[Path, float] = {"sparse": 1.0, "single": 0.7, "masked": 0.5}

    def measure(lengths: Sequence[int]) -> dict[Path, float]:
        asked.append(tuple(lengths))
        works = path_works(CONFIG, lengths, (0.75, 0.25), fixed)
        return {path: ms + sum(works[path]) * 1e-6 for path, ms in fixed.items()}

    sizes = calibration_sizes(512, 2048)
    costs = calibrate(CONFIG, tuple(fixed), (0.75, 0.25), measure, sizes)
    assert asked == sizes == [(8,), (64,) * 32, (512,) * 4]
    assert list(costs.lines) == list(fixed)
    for path, ms in fixed.items():
        assert costs.lines[path].fixed_ms == pytest.approx(ms)
        assert costs.lines[path].rows_ms_per_gflop == pytest.approx(1000.0)
        assert costs.lines[path].pairs_ms_per_gflop == pytest.approx(1000.0)


def test_calibration_keeps_to_what_model_and_engines_take() -> None:
    assert calibration_sizes(30, 512) == [(8,), (30,) * 17]
    assert calibration_sizes(5, 512) == [(5,), (5,) * 102]
    assert calibration_sizes(2048, 512) == [(8,), (64,) * 8, (512,)]
    limited = calibration_sizes(128, 16384, lambda length: 1024 // length)
    assert limited == [(8,), (64,) * 16, (128,) * 8]


def test_choices_of_large_batches_are_not_remembered() -> None:
    """Their lengths would be kept: tens of thousands for each of 256 batches."""
    seen: list[int] = []

    class Counted:
        def choose(self, config: object, parts: Sequence[Sequence[int]], shares: object) -> str:
            seen.append(sum(map(len, parts)))
            return "sparse"

    bundle = memory_bundle(random_model(CONFIG, 0))
    choice = remembered_choice(Counted(), bundle.manifest)  # type: ignore[arg-type]
    for n in (3, MAX_REMEMBERED, MAX_REMEMBERED + 1):
        for _ in range(2):
            assert choice(((4,) * n,), CONFIG.thresholds) == "sparse"
    assert seen == [3, MAX_REMEMBERED, *[MAX_REMEMBERED + 1] * 2]
