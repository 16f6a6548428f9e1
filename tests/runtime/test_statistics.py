"""What a session counts, and when it warns."""

from __future__ import annotations

import dataclasses
import math
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from sdt_deploy.bundle import Bundle
from sdt_deploy.errors import ConfigError, RunCancelledError
from sdt_deploy.runtime.generation import generate
from sdt_deploy.runtime.session import Session
from sdt_deploy.runtime.statistics import (
    MIN_TOKENS,
    WINDOW_TOKENS,
    DepthDriftWarning,
    DepthMonitor,
    drifts,
    expected_mean_depth,
)
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import CONFIGS, ExportedModel, random_batch, random_model

Exported = Callable[[str], ExportedModel]
MODEL = random_model(CONFIGS["active-lm"][0], 0)
"""Three layers, thresholds 0, ⅓, ⅔."""


def uniform_bundle() -> Bundle:
    """A bundle whose calibration scores were uniform: 2 layers are expected."""
    bundle = memory_bundle(MODEL)
    quantiles = tuple(np.linspace(0.0, 1.0, 101).tolist())
    manifest = dataclasses.replace(bundle.manifest, score_quantiles=quantiles)
    return dataclasses.replace(bundle, manifest=manifest)


def test_the_expected_depth() -> None:
    bundle = uniform_bundle()
    assert expected_mean_depth(bundle.manifest) == pytest.approx(2.0)
    pinned = dataclasses.replace(bundle.manifest, pinned_share=0.5)
    assert expected_mean_depth(pinned) == pytest.approx(2.5)
    assert expected_mean_depth(memory_bundle(MODEL).manifest) is None


@pytest.mark.parametrize(
    ("drift", "reported", "expected"),
    [
        (0.9, False, False),
        (1.1, False, True),
        (-1.1, False, True),
        (0.6, True, True),
        (-0.6, True, True),
        (0.4, True, False),
    ],
)
def test_a_drift_is_over_when_it_has_halved(drift: float, reported: bool, expected: bool) -> None:
    assert drifts(drift, 1.0, reported=reported) is expected


def test_one_warning_until_it_has_recovered() -> None:
    monitor = DepthMonitor(uniform_bundle().manifest, 0.5)
    deep, right = (0, 0, 0, 1000), (0, 0, 1000, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.count(deep)  # 1,000 tokens are too few
    with pytest.warns(DepthDriftWarning, match=r"3\.00 layers.* 2\.00 were expected.*costs time"):
        monitor.count(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            monitor.count(deep)
        for _ in range(2 * WINDOW_TOKENS // 1000):
            monitor.count(right)
    drift = monitor.statistics().drift
    assert drift is not None
    assert 0 < drift < 0.25
    with pytest.warns(DepthDriftWarning, match="costs quality"):
        monitor.count((0, WINDOW_TOKENS, 0, 0))


def test_the_recent_mean_forgets() -> None:
    monitor = DepthMonitor(uniform_bundle().manifest, None)
    monitor.count((100_000, 0, 0, 0))
    monitor.count((0, 0, 0, WINDOW_TOKENS))
    found = monitor.statistics()
    assert found.mean_depth == pytest.approx(3 * WINDOW_TOKENS / (100_000 + WINDOW_TOKENS))
    faded = 100_000 / math.e
    assert found.recent_mean_depth == pytest.approx(3 * WINDOW_TOKENS / (faded + WINDOW_TOKENS))
    monitor.count((0, 0, 0, 5 * WINDOW_TOKENS))
    assert monitor.statistics().recent_mean_depth == pytest.approx(3.0, abs=0.02)


def test_threads_lose_no_count() -> None:
    monitor = DepthMonitor(uniform_bundle().manifest, 0.5)

    def work() -> None:
        for _ in range(500):
            monitor.count((1, 2, 3, 4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.statistics().n_runs == 2000
    assert monitor.statistics().depth_histogram == (2000, 4000, 6000, 8000)


def test_a_session_counts_runs_at_its_own_thresholds(exported: Exported) -> None:
    sample = exported("active-lm")
    batch = random_batch(sample.model.config, [9, 20], 1)
    with Session.open(sample.bundle, max_padded_tokens=20) as session:
        empty = session.statistics()
        assert (empty.n_runs, empty.n_tokens, empty.mean_depth, empty.drift) == (0, 0, None, None)
        session.cost_model()  # calibrates on random tokens: no traffic
        sparse = session.run_batch(batch, path="sparse")
        session.run_batch(batch, path="masked")
        session.run_batch(batch, path="dense")
        session.run_batch(batch, path="sparse", thresholds=(0.0, 0.0, 0.0))
        found = session.statistics()
    assert (found.n_runs, found.n_tokens) == (2, 58)
    expected = tuple(2 * count for count in sparse.layer_usage.depth_histogram)
    assert found.depth_histogram == expected
    assert found.mean_depth == pytest.approx(float(sparse.depths.mean()))


def test_a_session_warns() -> None:
    bundle = uniform_bundle()
    quantiles = tuple(np.linspace(0.0, 0.3, 101).tolist())  # nobody was to pass the first layer
    manifest = dataclasses.replace(bundle.manifest, score_quantiles=quantiles)
    bundle = dataclasses.replace(bundle, manifest=manifest)
    batch = random_batch(MODEL.config, [25] * (MIN_TOKENS // 25), 0)
    session = Session(bundle, OracleBackend(bundle, MODEL), max_depth_drift=0.5)
    with pytest.warns(DepthDriftWarning, match=r"1\.00 were expected") as caught:
        session.run(batch.input_ids, batch.cu_seqlens, path="sparse")
    assert caught[0].filename == __file__


def test_the_limit_is_checked(exported: Exported) -> None:
    with pytest.raises(ConfigError, match="max_depth_drift must be a finite number above 0"):
        Session.open(exported("active-lm").bundle, max_depth_drift=0)


def decoder_session(highest_score: float) -> Session:
    """A session that generates; the scores of its calibration text were uniform up to the top."""
    model = random_model(MODEL.config.replace(causal=True), 0)
    bundle = memory_bundle(model)
    quantiles = tuple(np.linspace(0.0, highest_score, 101).tolist())
    manifest = dataclasses.replace(bundle.manifest, score_quantiles=quantiles)
    bundle = dataclasses.replace(bundle, manifest=manifest)
    return Session(bundle, OracleBackend(bundle, model), max_depth_drift=0.5)


def test_generations_are_counted() -> None:
    session = decoder_session(1.0)
    prompts, cu = [4, 9, 30, 2, 2, 51, 7], [0, 4, 5, 7]
    first = generate(session, prompts, cu, max_new_tokens=6)
    second = generate(session, prompts, cu, max_new_tokens=1)
    run = session.run(prompts, cu, path="sparse")
    generate(session, prompts, cu, max_new_tokens=6, thresholds=(0.0, 0.0, 0.0))
    generate(session, prompts, cu, max_new_tokens=6, target_depth=2.5)
    stop = threading.Event()
    stop.set()
    with pytest.raises(RunCancelledError):
        generate(session, prompts, cu, max_new_tokens=6, cancel=stop)
    found = session.statistics()
    assert (found.n_runs, found.n_generations, found.n_new_tokens) == (3, 2, 3 * 6 + 3 * 1)
    assert found.n_tokens == (7 + 3 * 5) + 7 + 7  # the last new token of a sequence is not run
    usages = [one.layer_usage for one in (first, second, run)]
    assert found.depth_histogram == tuple(
        sum(counts) for counts in zip(*(one.depth_histogram for one in usages), strict=True)
    )
    depths = sum(usage.mean_depth * usage.n_tokens for usage in usages)
    assert found.mean_depth == pytest.approx(depths / found.n_tokens)
    assert found.cache_bytes == first.cache.n_bytes + second.cache.n_bytes
    assert found.dense_cache_bytes == first.cache.dense_bytes + second.cache.dense_bytes
    assert 0 < found.cache_bytes < found.dense_cache_bytes


def test_a_generation_warns() -> None:
    session = decoder_session(0.3)  # nobody was to pass the first layer
    longest = MODEL.config.max_positions
    batch = random_batch(MODEL.config, [longest - 8] * (MIN_TOKENS // longest), 0)
    options: dict[str, int] = {"max_new_tokens": 8}
    assert batch.n_tokens + 7 * len(batch.lengths) < MIN_TOKENS  # one does not say enough
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(session, batch.input_ids, batch.cu_seqlens, **options)
    with pytest.warns(DepthDriftWarning, match=r"1\.00 were expected") as caught:
        generate(session, batch.input_ids, batch.cu_seqlens, **options)
    assert caught[0].filename == __file__
