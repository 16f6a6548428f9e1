from __future__ import annotations

import pytest

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.costs import active_shares, dense_flops, head_flops, score_flops, sparse_flops
from sdt_deploy.runtime.dispatch import (
    CostModel,
    LinearCost,
    calibrate,
    candidates,
    expected_flops,
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
    expected = expected_flops(config, lengths, (0.75, 0.25))
    assert expected == pytest.approx(sparse_flops(config, lengths, active))
    whole = expected_flops(config, lengths, (1.0, 1.0))
    assert whole == pytest.approx(
        dense_flops(config, lengths) + score_flops(config, n_tokens=sum(lengths))
    )


def test_fit_recovers_a_line_and_never_goes_below_zero() -> None:
    line = LinearCost.fit((1e9, 3.0), (3e9, 7.0))
    assert line.fixed_ms == pytest.approx(1)
    assert line.ms_per_gflop == pytest.approx(2)
    assert line.predict_ms(2e9) == pytest.approx(5)
    falling = LinearCost.fit((1e9, 3.0), (3e9, 1.0))
    assert (falling.fixed_ms, falling.ms_per_gflop) == (3.0, 0.0)
    assert LinearCost.fit((0.0, 3.0), (0.0, 4.0)).predict_ms(1e9) == 3.0


def test_small_batches_go_masked_and_large_ones_sparse() -> None:
    model = CostModel(
        lines={
            "sparse": LinearCost(fixed_ms=1.0, ms_per_gflop=100.0),
            "masked": LinearCost(fixed_ms=0.1, ms_per_gflop=100.0),
        }
    )
    shares = (0.75, 0.25)
    assert model.choose(CONFIG, [[2]], shares) == "masked"
    assert model.choose(CONFIG, [[60] * 200], shares) == "sparse"
    assert model.choose(CONFIG, [[64] + [1] * 600], shares) == "sparse"


def test_the_single_graph_counts_skipped_operations_as_sparse_does() -> None:
    model = CostModel(
        lines={
            "sparse": LinearCost(fixed_ms=1.0, ms_per_gflop=100.0),
            "single": LinearCost(fixed_ms=0.2, ms_per_gflop=120.0),
            "masked": LinearCost(fixed_ms=0.1, ms_per_gflop=120.0),
        }
    )
    shares = (0.75, 0.25)
    assert model.choose(CONFIG, [[2]], shares) == "masked"
    assert model.choose(CONFIG, [[60] * 20], shares) == "single"
    assert model.choose(CONFIG, [[60] * 2000], shares) == "sparse"
    equal = CostModel(lines=dict.fromkeys(("sparse", "single"), LinearCost.fit((0, 1), (1, 1))))
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


def test_calibration_measures_the_paths_at_two_sizes() -> None:
    asked = []
    fixed = {"sparse": 1.0, "single": 0.7, "masked": 0.5}

    def measure(lengths: list[int]) -> dict[str, tuple[float, float]]:
        asked.append(tuple(lengths))
        flops = dense_flops(CONFIG, lengths)
        return {path: (flops, ms + flops * 1e-6) for path, ms in fixed.items()}

    costs = calibrate(CONFIG, tuple(fixed), measure)  # type: ignore[arg-type]
    assert asked == [(8,), (64,) * 4]
    assert list(costs.lines) == list(fixed)
    assert costs.lines["sparse"].fixed_ms == pytest.approx(1.0)
    assert costs.lines["single"].fixed_ms == pytest.approx(0.7)
    assert costs.lines["masked"].ms_per_gflop == pytest.approx(1000.0)
