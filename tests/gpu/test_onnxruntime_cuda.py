"""The loop on a GPU with ONNX Runtime: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sdt_deploy.gpu import driver
from sdt_deploy.runtime.session import Session
from tests.samples import (
    CONFIGS,
    ExportedModel,
    assert_parity,
    in_threads,
    quantile_thresholds,
    random_batch,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(driver().problem), reason=f"{driver().problem}"),
]
Exported = Callable[[str], ExportedModel]


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_the_oracle(exported: Exported, name: str) -> None:
    sample = exported(name)
    config = sample.model.config
    rng = np.random.default_rng(3)
    with Session.open(sample.bundle, backend="onnxruntime-cuda") as session:
        for seed, lengths in enumerate(([1], [20, 3], [7, 12, 1, 20, 20, 2, 5], [29] * 9)):
            batch = random_batch(config, list(lengths), seed=seed)
            wanted = rng.random(config.n_layers).tolist()
            thresholds = None
            if config.probe != "none":
                thresholds = quantile_thresholds(sample.model, batch, wanted)
            for path in ("sparse", "masked"):
                assert_parity(session, sample.model, batch, thresholds, path)
            assert_parity(session, sample.model, batch, path="dense")


def test_streams_and_threads(exported: Exported) -> None:
    """Threads with streams of their own get their own answers, ready on return."""
    torch = pytest.importorskip("torch")
    sample = exported("all-embedding")
    with Session.open(sample.bundle, backend="onnxruntime-cuda") as session:

        def work(seed: int) -> None:
            batch = random_batch(sample.model.config, [9, 29, 4, 17], seed=seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert_parity(session, sample.model, batch)

        in_threads(8, work)
