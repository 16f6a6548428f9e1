"""Captured graphs, kernels and waits of the loop on a GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ExportConfig, Precision
from sdt_deploy.exporters.export import export
from sdt_deploy.gpu import driver
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.profiling.profile import profile
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.session import Session
from tests.samples import CONFIGS, in_threads, quantile_thresholds, random_batch, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(driver().problem), reason=f"{driver().problem}"),
]
TOLERANCES = {"float32": 2e-4, "float16": 2e-2}
Made = tuple[SparseDepthTransformer, Path]


@pytest.fixture(scope="module", params=["active-lm", "all-embedding"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["float32", "float16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(name: str, precision: Precision, tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = random_model(CONFIGS[name][0], seed=5)
    bundle = tmp_path_factory.mktemp("fused") / "bundle"
    config = ExportConfig(attention="fused", precision=precision)
    export(Checkpoint(model=model, provenance={}), bundle, config)
    return model, bundle


@pytest.fixture(params=["onnxruntime-cuda", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_parity_and_replays(made: Made, precision: Precision, backend: str) -> None:
    """Equal to the oracle at first, and bitwise equal to that when graphs are replayed."""
    model, path = made
    config = model.config
    rng = np.random.default_rng(3)
    flips = 0
    with Session.open(path, backend=backend) as session:
        batches = [
            random_batch(config, list(lengths), seed=seed)
            for seed, lengths in enumerate(([1], [20, 3], [7, 12, 1, 20, 20, 2, 5], [29] * 9))
        ]
        wanted = [rng.random(config.n_layers).tolist() for _ in batches]
        limits = [
            quantile_thresholds(model, batch, each)
            for batch, each in zip(batches, wanted, strict=True)
        ]
        firsts = {}
        for turn in range(3):
            for i, (batch, thresholds) in enumerate(zip(batches, limits, strict=True)):
                for kind in ("sparse", "masked", "dense"):
                    found = session.run_batch(batch, thresholds=thresholds, path=kind)  # type: ignore[arg-type]
                    if turn:
                        np.testing.assert_array_equal(found.output, firsts[i, kind])
                        continue
                    firsts[i, kind] = found.output
                    oracle = model.as_dense() if kind == "dense" else model
                    expected = oracle_output(
                        oracle,
                        batch.input_ids,
                        batch.cu_seqlens,
                        batch.token_type_ids,
                        depths=found.depths,
                    )
                    scale = np.sqrt(np.mean(expected.output**2))
                    error = np.abs(found.output - expected.output).max() / scale
                    assert error < TOLERANCES[precision], (kind, i)
                    if kind == "sparse":
                        chosen = oracle_output(
                            model,
                            batch.input_ids,
                            batch.cu_seqlens,
                            batch.token_type_ids,
                            thresholds=thresholds,
                        )
                        flips += int((found.depths != chosen.depths).sum())
    assert flips == 0


def test_it_waits_once_for_counts_and_once_at_the_end(made: Made, backend: str) -> None:
    torch = pytest.importorskip("torch")
    model, path = made
    batch, small = (random_batch(model.config, n, seed=1) for n in ([20, 3, 11], [20, 3]))
    with Session.open(path, backend=backend) as session:
        for _ in range(2):
            session.run_batch(batch, path="sparse")
            session.run_batch(batch, path="dense")
            session.run_batch(small, path="sparse")
        waits = []
        mark = session.backend.mark  # type: ignore[attr-defined]
        session.backend.mark = lambda: (waits.append(1), mark())[1]  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for chosen, kind, expected in (
                (batch, "sparse", 2),
                (batch, "dense", 1),
                (small, "sparse", 1),  # one graph, for which nothing has to be known
            ):
                waits.clear()
                session.run_batch(chosen, path=kind)  # type: ignore[arg-type]
                assert len(waits) == expected
            if backend == "torch":
                return  # compiles for sizes that are new, and waits for the GPU while it does
            # Not captured yet, so every copy that is not asynchronous would be noticed.
            fresh = random_batch(model.config, [9, 9], seed=1)
            session.run_batch(fresh, path="sparse")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_profile_has_every_piece_in_its_range(
    made: Made, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    model, path = made
    ranges: list[tuple[str, ...]] = []
    open_ranges: list[str] = []
    push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop

    def pushed(name: str) -> Any:
        open_ranges.append(name)
        ranges.append(tuple(open_ranges))
        return push(name)

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: (open_ranges.pop(), pop())[1])
    batch = random_batch(model.config, [29] * 9, seed=1)
    found = profile(Bundle.open(path), batch, backend=backend, budget_s=0.1)
    stages = [f"stage-{i:02d}" for i, n in enumerate(found.active_tokens.values()) if n]
    assert list(found.engine_ms) == ["entry", *stages, "head"]
    assert min(found.engine_ms.values()) > 0
    assert sum(found.engine_ms.values()) < found.total_ms
    once = [("run",), *(("run", name) for name in found.engine_ms)]
    assert ranges == once * (len(ranges) // len(once))
    assert not open_ranges


def test_triton_computes_what_torch_does() -> None:
    pytest.importorskip("triton")
    from tests.runtime.triton_check import check, check_attention, check_entry, check_pooling

    check("cuda", 30)
    check("cuda", 4, longest=512, largest_batch=70)
    check_attention("cuda", 24)
    check_attention("cuda", 4, longest=512, largest_batch=20)
    check_pooling("cuda", 40)
    check_entry("cuda", 24)
    check_entry("cuda", 4, longest=500, largest_batch=40)


def test_streams_threads_and_two_sessions(made: Made, backend: str) -> None:
    torch = pytest.importorskip("torch")
    model, path = made
    with Session.open(path, backend=backend) as one, Session.open(path, backend=backend) as other:
        lengths = [[9, 29, 4, 17], [3], [12, 12]]
        batches = [random_batch(model.config, each, seed=i) for i, each in enumerate(lengths)]
        expected = [one.run_batch(batch, path="sparse").output for batch in batches]

        def work(seed: int) -> None:
            session = (one, other)[seed % 2]
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(30):
                    i = (seed + turn) % len(batches)
                    found = session.run_batch(batches[i], path="sparse")
                    np.testing.assert_allclose(found.output, expected[i], rtol=0, atol=1e-3)

        in_threads(6, work)


def test_a_warm_session_captures_nothing_more(made: Made, backend: str) -> None:
    model, path = made
    lengths = [28] * 16
    with Session.open(path, backend=backend) as session:
        session.warmup([lengths])
        assert session.device_loop is not None
        warm = session.device_loop.n_graphs
        # Random models have no quantiles of scores: any depth may come, so only whole graphs.
        session.run_batch(random_batch(model.config, lengths, seed=4), path="masked")
        assert session.device_loop.n_graphs == warm > model.config.n_layers


def test_the_memory_of_a_run_is_measured() -> None:
    torch = pytest.importorskip("torch")
    memory, kept = DeviceMemory(), []
    n_bytes = 256 << 20
    taken = memory.peak_bytes(
        lambda: kept.append(torch.empty(n_bytes, dtype=torch.uint8, device="cuda"))
    )
    assert n_bytes <= taken < 2 * n_bytes
    assert memory.peak_bytes(lambda: None) < n_bytes
