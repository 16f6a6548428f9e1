"""The measurements behind ``path="auto"``, on a clock of our own."""

from dataclasses import replace

import pytest

from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.calibration import measure_costs
from sdt_deploy.runtime.dispatch import Path
from sdt_deploy.runtime.result import RunResult, Timings
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.runtime.test_dispatch import CONFIG
from tests.samples import random_model


@pytest.mark.parametrize("slow", [range(12), range(12, 24), range(5, 17)])
def test_a_machine_that_is_slow_for_a_while_is_slow_for_all_paths(slow: range) -> None:
    """Measured one after the other, the path of the slow while would look twice as expensive."""
    model = random_model(CONFIG, 0)
    bundle = memory_bundle(model)
    needs = {"sparse": 10.0, "single": 9.0}
    n_runs = 0

    with Session(bundle, OracleBackend(bundle, model)) as session:

        def run(batch: TokenBatch, path: Path) -> RunResult:
            nonlocal n_runs
            slower = 2.0 if n_runs in slow else 1.0
            n_runs += 1
            result = session.run_batch(batch, path="sparse")
            total_ms = needs[path] * slower * (1 + batch.n_tokens / 100)
            return replace(result, timings=Timings(total_ms=total_ms))

        costs = measure_costs(model.config, tuple(needs), run)  # type: ignore[arg-type]
    for flops in (1e3, 1e5, 1e7):
        sparse, single = (costs.lines[path].predict_ms(flops) for path in ("sparse", "single"))
        assert single / sparse == pytest.approx(0.9, rel=0.15)
