from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from sdt_deploy.bench import memory
from sdt_deploy.bench.benchmark import measure_texts
from sdt_deploy.bench.cases import default_cases, parse_cases, token_source
from sdt_deploy.bench.report import remarks, table
from sdt_deploy.bench.run import BenchOptions, run_bench
from sdt_deploy.bench.timing import WARM_UP_ROUNDS, interleave
from sdt_deploy.bundle import Bundle
from sdt_deploy.costs import dense_flops, score_flops, sparse_flops
from sdt_deploy.errors import InputError
from sdt_deploy.runtime.dispatch import needed_flops
from sdt_deploy.runtime.session import Session
from tests.samples import ExportedModel, random_batch

Exported = Callable[[str], ExportedModel]


def test_rounds_are_interleaved_and_warm() -> None:
    calls: list[str] = []
    timed = interleave(
        {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}, budget_s=0.01
    )
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(rounds) == timed["a"].n_runs + WARM_UP_ROUNDS
    assert len({tuple(one) for one in rounds}) > 1
    slow = interleave({"s": lambda: time.sleep(0.002), "f": lambda: None}, budget_s=0.01)
    assert slow["s"].median_ms > slow["f"].median_ms


def test_cases() -> None:
    assert default_cases(5) == ((2, 5), (8, 5), (16, 5))
    assert default_cases(64)[:3] == ((2, 20), (2, 64), (8, 20))
    assert parse_cases("2x20, 8X64") == ((2, 20), (8, 64))
    for bad in ("", "2x", "x2", "0x4", "2x3;", "2x3x4"):
        with pytest.raises(InputError):
            parse_cases(bad)
    grid = default_cases(512)
    assert len(grid) == 15
    assert (16, 512) in grid
    assert (2, 1024) not in grid


def test_cases_hold_real_text_between_the_special_tokens(exported: Exported) -> None:
    bundle = Bundle.open(exported("all-embedding").bundle)  # ids 1 and 2 are pinned
    texts = np.array([1, 5, 6, 7, 2, 1, 8, 9, 2]), np.array([0, 5, 9])
    source = token_source(bundle, texts)
    assert (source.before, source.after) == ((1,), (2,))
    batch = source.batches(2, 6, bundle)[0]
    assert batch.input_ids.reshape(2, 6).tolist() == [[1, 5, 6, 7, 8, 2], [1, 9, 5, 6, 7, 2]]
    assert source.batches(3, 1, bundle)[0].input_ids.tolist() == [1, 1, 1]


def test_operations_follow_the_depths_that_were_run(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9, 5], 0)
    with Session.open(sample.bundle) as session:
        result = session.run_batch(batch, path="sparse")
        depths = result.split(result.depths)
        active = [[int((d > i).sum()) for d in depths] for i in range(3)]
        expected = sparse_flops(sample.model.config, [9, 5], active)
        assert needed_flops(sample.model.config, result.depths, batch.cu_seqlens) == expected
        full = session.run_batch(batch, path="sparse", thresholds=(-1.0,) * 3)
        assert needed_flops(sample.model.config, full.depths, batch.cu_seqlens) == pytest.approx(
            dense_flops(sample.model.config, [9, 5]) + score_flops(sample.model.config, n_tokens=14)
        )


def test_real_lengths(exported: Exported) -> None:
    sample = exported("active-lm")
    batch = random_batch(sample.model.config, [3, 30, 1, 12, 7], 0)
    with Session.open(sample.bundle) as session:
        texts = batch.input_ids, batch.cu_seqlens
        found = measure_texts(
            session, texts, batch=2, budget_s=0.05, n_texts_in_file=9, n_truncated=0
        )
    assert (found.n_texts, found.n_tokens) == (5, 53)
    assert 0 < found.flops_ratio <= 1
    assert "5 of 9 real texts, in batches of 2" in remarks([], found)[0]
    assert found.full_depth_ms > 0
    assert found.ratio_padded == pytest.approx(found.sparse_ms / found.dense_padded_ms)
    assert found.ratio_sorted == pytest.approx(found.sparse_sorted_ms / found.dense_sorted_ms)


def test_peak_memory_grows_with_the_batch(exported: Exported) -> None:
    if not memory.available():
        pytest.skip("this system does not tell a process its peak memory")
    sample = exported("active-lm")
    config = sample.model.config
    small = random_batch(config, [30], 0)
    large = random_batch(config, [30] * 2000, 0)
    peaks = [
        memory.peak_bytes(sample.bundle, "onnxruntime-cpu", "dense", batch, None)
        for batch in (small, large)
    ]
    logits = 30 * 2000 * config.vocab_size * 4
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert peaks[1] > logits > peaks[0]


def test_it_says_where_sparse_loses(exported: Exported) -> None:
    import dataclasses

    outcome = run_bench(
        exported("active-lm").bundle,
        BenchOptions(cases="1x8", budget_s=0.05, with_memory=False),
    )
    (case,) = outcome.cases
    losing = dataclasses.replace(
        case,
        ratio=1.3,
        auto_ratio=1.1,
        routing_flips=2,
        sparse_peak_bytes=3,
        dense_peak_bytes=2,
    )
    winning = dataclasses.replace(case, ratio=0.7, auto_ratio=0.7, routing_flips=0)
    assert outcome.remarks[0] == "measured on random token ids"
    lines = remarks([losing, winning], None)
    assert lines[0] == "sparse is slower than dense at: 1x8 (1.30)"
    assert "by more than 2 % at: 1x8 (1.10)" in lines[1]
    assert lines[2].startswith("2 tokens took another depth")
    assert lines[3] == "sparse needs more memory than dense at: 1x8 (1.50)"
    assert remarks([winning], None) == ["sparse is faster than dense in every case"]
    assert "not measured" in remarks([dataclasses.replace(winning, max_abs_error=None)], None)[1]
    assert table([losing, winning]).row_count == 2
