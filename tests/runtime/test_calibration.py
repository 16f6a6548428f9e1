"""The measurements behind ``path="auto"``, on a clock of our own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdt_deploy.config import Routing
from sdt_deploy.costs import FIXED_SCRATCH_BYTES, scratch_bytes_per_sequence
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.calibration import (
    calibration_tokens,
    measure_costs,
    thresholds_for_shares,
)
from sdt_deploy.runtime.dispatch import Path, calibration_sizes, expected_work
from sdt_deploy.runtime.result import RunResult, Timings
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.splitting import PartLimits
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.runtime.test_dispatch import CONFIG
from tests.samples import ExportedModel, random_model

Exported = Callable[[str], ExportedModel]


@pytest.mark.parametrize("slow", [range(12), range(12, 24), range(5, 17)])
def test_a_machine_that_is_slow_for_a_while_is_slow_for_all_paths(slow: range) -> None:
    """Measured one after the other, the path of the slow while would look twice as expensive."""
    model = random_model(CONFIG, 0)
    bundle = memory_bundle(model)
    needs = {"sparse": 10.0, "single": 9.0}
    n_runs = 0

    with Session(bundle, OracleBackend(bundle, model)) as session:

        def run(batch: TokenBatch, thresholds: tuple[float, ...], path: Path) -> RunResult:
            nonlocal n_runs
            slower = 2.0 if n_runs in slow else 1.0
            n_runs += 1
            result = session.run_batch(batch, thresholds=thresholds, path="sparse")
            total_ms = needs[path] * slower * (1 + batch.n_tokens / 100)
            return replace(result, timings=Timings(total_ms=total_ms))

        costs = measure_costs(
            model.config,
            (0.75, 0.25),
            tuple(needs),  # type: ignore[arg-type]
            run,
            calibration_sizes(64, 256),
        )
    for lengths in ([3], [10] * 7, [60] * 50):
        work = expected_work(model.config, lengths, (0.75, 0.25))
        sparse, single = (costs.lines[path].predict_ms(work) for path in ("sparse", "single"))
        assert single / sparse == pytest.approx(0.9, rel=0.15)


@given(
    st.lists(st.floats(2**-10, 1 - 2**-10, width=32), min_size=1, max_size=40, unique=True),
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
)
def test_as_many_scores_exceed_the_thresholds_as_are_expected(
    scores: list[float], shares: list[float]
) -> None:
    shares.sort(reverse=True)
    thresholds = thresholds_for_shares(np.array(scores, dtype=np.float32), shares)
    assert list(thresholds) == sorted(thresholds)
    for threshold, share in zip(thresholds, shares, strict=True):
        found = sum(score > threshold for score in scores)
        assert abs(found - share * len(scores)) <= 0.5 + 1e-6


def test_calibration_runs_as_deep_as_text_is_expected_to(exported: Exported) -> None:
    sample = exported("active-lm")
    seen = []
    with Session.open(sample.bundle) as session:
        run_one = session._run_one

        def run(batch: TokenBatch, thresholds: tuple[float, ...], path: Path) -> RunResult:
            result = run_one(batch, thresholds, path)
            seen.append((path, result.layer_usage))
            return result

        shares = (0.5,) * session.manifest.model.n_layers
        config = session.manifest.model
        measure_costs(config, shares, ("sparse", "single"), run, [[8], [30, 30]])
    for path in ("sparse", "single"):
        usage = [usage for taken, usage in seen if taken == path][-1]
        for n_active in usage.active_tokens:
            assert n_active == pytest.approx(usage.n_tokens / 2, abs=1)


@pytest.mark.parametrize("routing", ["once", "per_layer"])
def test_a_cost_model_can_be_asked_for_whoever_scores(routing: Routing) -> None:
    model = random_model(CONFIG.replace(routing=routing), 0)
    bundle = memory_bundle(model)
    with Session(bundle, OracleBackend(bundle, model)) as session:
        assert "sparse" in session.cost_model().lines


@pytest.mark.parametrize(
    ("max_padded_tokens", "tokens"), [(64, 512), (2048, 512), (8192, 2048), (131_072, 2048)]
)
def test_more_tokens_are_timed_where_more_run_at_once(max_padded_tokens: int, tokens: int) -> None:
    limits = PartLimits(max_padded_tokens=max_padded_tokens)
    assert calibration_tokens(limits, on_device=False) == tokens
    assert calibration_tokens(limits, on_device=True) == 16_384


def test_calibration_keeps_to_the_cap_on_memory(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = exported("all-embedding")
    config = sample.model.config
    cap = (FIXED_SCRATCH_BYTES + 1.5 * scratch_bytes_per_sequence(config, 20)) / 2**20
    run_one, seen = Session._run_one, []

    def remember(session: Session, batch: TokenBatch, *rest: Any) -> RunResult:
        seen.append((len(batch.lengths), batch.max_seqlen))
        return run_one(session, batch, *rest)

    monkeypatch.setattr(Session, "_run_one", remember)
    with Session.open(sample.bundle, max_memory_mb=cap) as session:
        session.cost_model()
    assert len(set(seen)) > 1
    for n_sequences, longest in seen:
        each = scratch_bytes_per_sequence(config, longest)
        assert (FIXED_SCRATCH_BYTES + n_sequences * each) / 2**20 <= cap
    assert max(longest for _, longest in seen) > 20


@pytest.mark.parametrize("lengths", [[-1], [0, 3], [2**31], [2.5], ["3"], [34]])
def test_lengths_to_warm_up_are_checked(exported: Exported, lengths: list[Any]) -> None:
    with (
        Session.open(exported("active-lm").bundle) as session,
        pytest.raises(InputError, match="lengths"),
    ):
        session.warmup([[4, 2], lengths])
