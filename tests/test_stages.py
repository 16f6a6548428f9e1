"""Planning stages: the pure decision, and what is measured for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.bench.stage_costs import auto_stages
from sdt_deploy.config import ExportConfig
from sdt_deploy.errors import ConfigError, InputError
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.runtime.session import Session
from sdt_deploy.stages import StageCosts, active_rows, parse_stages, plan_stages
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import CONFIGS, assert_parity, quantile_thresholds, random_batch, random_model

numbers = st.floats(0, 10)
costs = st.builds(StageCosts, call_ms=numbers, row_ms=numbers, next_ms=numbers, next_row_ms=numbers)
CALLS_COST = StageCosts(call_ms=1.0, row_ms=0.01, next_ms=0.1, next_row_ms=0.01)


def total_ms(sizes: tuple[int, ...], rows: list[float], cost: StageCosts) -> float:
    total, first = 0.0, 0
    for size in sizes:
        total += cost.predict_ms(size, rows[first])
        first += size
    return total


def groupings(n_layers: int) -> list[tuple[int, ...]]:
    if n_layers == 0:
        return [()]
    return [(n, *rest) for n in range(1, n_layers + 1) for rest in groupings(n_layers - n)]


@given(
    rows=st.lists(st.floats(0, 100), min_size=1, max_size=7).map(lambda x: sorted(x, reverse=True)),
    cost=costs,
)
def test_no_grouping_is_cheaper(rows: list[float], cost: StageCosts) -> None:
    planned = plan_stages(rows, cost)
    assert sum(planned) == len(rows)
    best = min(total_ms(sizes, rows, cost) for sizes in groupings(len(rows)))
    assert total_ms(planned, rows, cost) == pytest.approx(best)


def test_layers_that_nobody_leaves_are_joined() -> None:
    assert plan_stages([1000] * 6, CALLS_COST) == (6,)
    assert plan_stages([1000, 500, 500, 500, 500, 500], CALLS_COST) == (1, 5)
    assert plan_stages([1000, 800, 600, 400, 200, 150], CALLS_COST) == (1, 1, 1, 1, 2)
    assert plan_stages([20, 16, 12, 8, 4, 2], CALLS_COST) == (6,)  # few rows: calls are the cost


def test_layers_without_tokens_cost_nothing() -> None:
    assert plan_stages([100, 100, 0, 0], CALLS_COST)[0] == 2


def test_rows_follow_from_the_histogram() -> None:
    assert active_rows([1, 2, 0, 5], 16) == (14.0, 10.0, 10.0)
    for bad in ([0, 0], [2, -1, 4]):
        with pytest.raises(ConfigError, match="histogram"):
            active_rows(bad, 8)
    for rising in ([1.0, 2.0], []):
        with pytest.raises(ConfigError, match="must not rise"):
            plan_stages(rising, CALLS_COST)


def test_costs_are_fitted() -> None:
    fitted = StageCosts.fit([(10, 2.0), (110, 4.0)], [(10, 3.0), (110, 8.0)])
    assert fitted.predict_ms(1, 60) == pytest.approx(3.0)
    assert fitted.predict_ms(2, 60) == pytest.approx(5.5)
    assert fitted.predict_ms(3, 60) == pytest.approx(8.0)
    noisy = StageCosts.fit([(10, 4.0), (110, 3.0)], [(10, 3.5), (110, 3.0)])
    assert min(noisy.call_ms, noisy.row_ms, noisy.next_ms, noisy.next_row_ms) >= 0


def test_sizes_are_checked() -> None:
    assert parse_stages("1, 3,2") == (1, 3, 2)
    for bad in ("", "1,,2", "1;2", "automatic", "-1"):
        with pytest.raises(InputError, match="layers of each"):
            parse_stages(bad)
    assert ExportConfig(stages=(1, 3, 2)).stage_layers(6) == ((0, 1), (1, 4), (4, 6))
    with pytest.raises(ConfigError, match="have 6 layers, the model 5"):
        ExportConfig(stages=(1, 3, 2)).stage_layers(5)
    for bad_sizes in ((0, 2), (True,), "12", (1.0,)):
        with pytest.raises(ConfigError, match="positive integers"):
            ExportConfig(stages=bad_sizes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="contradict"):
        ExportConfig(stages=(1, 2), layers_per_stage=2)
    with pytest.raises(ConfigError, match="one layer per stage"):
        ExportConfig(stages=(1, 2), attention="fused")


@pytest.mark.parametrize("name", ["all-embedding", "active-lm"])
def test_uneven_stages_run_and_count_their_rows(name: str) -> None:
    config = CONFIGS[name][0].replace(n_layers=6, thresholds=())
    model = random_model(config, 3)
    bundle = memory_bundle(model, ExportConfig(stages=(1, 3, 2)))
    backend = OracleBackend(bundle, model)
    batch = random_batch(config, [9, 30, 1, 17], 5)
    limits = quantile_thresholds(model, batch, [0.1, 0.3, 0.5, 0.6, 0.7, 0.9])
    result = assert_parity(Session(bundle, backend), model, batch, limits)
    assert [call.n_rows for call in backend.calls] == [
        int((result.depths > first).sum()) for first in (0, 1, 4)
    ]


def with_sample(name: str) -> Checkpoint:
    model = random_model(CONFIGS[name][0], 2)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 90).astype(np.int32)
    sample = TokenSample(input_ids=ids, cu_seqlens=np.array([0, 30, 60, 90], dtype=np.int32))
    return Checkpoint(model=model, provenance={}, sample=sample)


def test_planned_from_measured_times() -> None:
    checkpoint = with_sample("all-grouped")
    model = checkpoint.model
    sizes = auto_stages(checkpoint, ExportConfig(), batch=(2, 9))
    assert sum(sizes) == model.config.n_layers
    bundle = memory_bundle(model, ExportConfig(stages=sizes))
    batch = random_batch(model.config, [9, 4], 0)
    assert_parity(Session(bundle, OracleBackend(bundle, model)), model, batch)


def test_what_cannot_be_planned() -> None:
    checkpoint = with_sample("active-lm")
    for config, message in (
        (ExportConfig(attention="fused"), "for GPUs"),
        (ExportConfig(precision="bfloat16"), "for GPUs"),
        (ExportConfig(layers_per_stage=2), "given already"),
        (ExportConfig(stages=(3,)), "given already"),
    ):
        with pytest.raises(ConfigError, match=message):
            auto_stages(checkpoint, config)
    with pytest.raises(InputError, match="positions reach"):
        auto_stages(checkpoint, ExportConfig(), batch=(2, 1000))
    with pytest.raises(InputError, match="at least 8 tokens"):
        auto_stages(checkpoint, ExportConfig(), batch=(7, 1))
    with pytest.raises(ConfigError, match="no text sample"):
        auto_stages(Checkpoint(model=checkpoint.model, provenance={}), ExportConfig())
