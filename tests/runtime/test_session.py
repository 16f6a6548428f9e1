from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import BackendError, ConfigError, InputError
from sdt_deploy.runtime import calibration
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session
from tests.samples import GOLDEN, ExportedModel, lengths_lists, random_batch, seeds

Exported = Callable[[str], ExportedModel]
CONFIG = ModelConfig(
    vocab_size=10, d_model=4, n_heads=1, n_layers=1, d_ff=4, max_positions=29, n_token_types=2
)


@given(lengths=lengths_lists, seed=seeds, left=st.booleans())
@settings(max_examples=50, deadline=None)
def test_padded_ids_are_packed(lengths: list[int], seed: int, left: bool) -> None:
    batch = random_batch(CONFIG, lengths, seed)
    assert batch.token_type_ids is not None
    mask = batch.attention_mask
    ids, types = batch.padded(batch.input_ids), batch.padded(batch.token_type_ids)
    if left:
        for row, length in enumerate(lengths):
            shift = mask.shape[1] - length
            for array in (mask, ids, types):
                array[row] = np.roll(array[row], shift)
    packed = TokenBatch.from_padded(ids, mask.astype(np.int64), types, config=CONFIG)
    np.testing.assert_array_equal(packed.input_ids, batch.input_ids)
    np.testing.assert_array_equal(packed.cu_seqlens, batch.cu_seqlens)
    np.testing.assert_array_equal(packed.token_type_ids, batch.token_type_ids)
    expected = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(packed.position_ids, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [0]), "empty"),
        (([1, 2], [0, 1]), "end at the number of tokens, 2"),
        (([1, 2], [1, 2]), "starts at 1"),
        (([1, 2], [0, 1, 1, 2]), "sequence 1 has 0 tokens"),
        (([1, 2], [0, 3, 2]), "must rise"),
        (([1, 10], [0, 2]), "token 1 has 10"),
        (([1, -1], [0, 2]), "token 1 has -1"),
        (([1.0, 2.0], [0, 2]), "integers"),
        (([[1, 2]], [0, 2]), "1 axes"),
        (([1] * 30, [0, 30]), "positions reach 29"),
        (([1, 2], [0, 2], [0, 2]), "token_type_ids must lie in 0..1"),
        (([1, 2], [0, 2], [0]), "1 token_type_ids for 2"),
        ((["a"], [0, 1]), "integers"),
    ],
)
def test_bad_packed_batches(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenBatch.from_packed(*arguments, config=CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "2 axes"),
        (([[1, 2]], [[1]]), "differ in shape"),
        (([[1, 2]], [[1, 2]]), "0 and 1"),
        (([[1, 2], [3, 4]], [[1, 1], [0, 0]]), "row 1 of attention_mask has no token"),
        (([[1, 2, 3]], [[1, 0, 1]]), "padding between"),
        (([[], []],), "empty"),
    ],
)
def test_bad_padded_batches(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenBatch.from_padded(*arguments, config=CONFIG)  # type: ignore[arg-type]


def test_bad_calls(exported: Exported) -> None:
    with Session.open(exported("active-lm").bundle) as session:
        with pytest.raises(ConfigError, match="one per layer"):
            session.run([1], [0, 1], thresholds=(0.0,))
        for nonsense in (0.5, "abc", [None] * 3):
            with pytest.raises(ConfigError, match="must be 3 numbers"):
                session.run([1], [0, 1], thresholds=nonsense)  # type: ignore[arg-type]
        session.run([1], [0, 1], thresholds=np.zeros(3, dtype=np.float32))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="must not fall"):
            session.run([1], [0, 1], thresholds=(0.5, 0.2, 0.3))
        with pytest.raises(InputError, match="path must be one of"):
            session.run([1], [0, 1], path="fast")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no tokenizer"):
            session.run(["a text"])
        with pytest.raises(InputError, match="no token types"):
            session.run([1], [0, 1], token_type_ids=[0])
        with pytest.raises(InputError, match="packed ids or attention_mask"):
            session.run([1], [0, 1], attention_mask=[[1]])
    for path in ("sparse", "single", "masked"):
        with pytest.raises(BackendError, match="closed"):
            session.run([1], [0, 1], path=path)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="no backend is called 'abacus'"):
        Session.open(exported("active-lm").bundle, backend="abacus")


def test_auto_picks_one_of_the_two_exact_paths_and_calibrates_once(exported: Exported) -> None:
    sample = exported("all-embedding")
    batch = random_batch(sample.model.config, [9, 4], 1)
    with Session.open(sample.bundle) as session:
        result = session.run_batch(batch)
        assert result.path in ("sparse", "single", "masked")
        costs = session.cost_model()
        assert session.cost_model() is costs
        other = "masked" if result.path == "sparse" else "sparse"
        expected = session.run_batch(batch, path=other)
        np.testing.assert_allclose(result.output, expected.output, rtol=0, atol=1e-5)


def test_result_describes_the_run(exported: Exported) -> None:
    sample = exported("active-lm")
    batch = random_batch(sample.model.config, [20, 9], 1)
    with Session.open(sample.bundle) as session:
        result = session.run_batch(batch, path="sparse")
    usage = result.layer_usage
    assert usage.n_tokens == 29
    assert usage.mean_depth == pytest.approx(result.depths.mean())
    assert usage.active_tokens == tuple(int((result.depths > i).sum()) for i in range(3))
    assert usage.ideal_ratio == pytest.approx(result.depths.mean() / 3)
    timings = result.timings
    engines = timings.entry_ms + sum(timings.stage_ms) + timings.head_ms
    assert engines + timings.move_ms + timings.overhead_ms == pytest.approx(timings.total_ms)
    assert 0 < timings.route_ms < timings.overhead_ms
    assert [len(piece) for piece in result.split(result.output)] == [20, 9]


def test_a_failed_allocation_does_not_poison_the_session(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = exported("active-lm")
    small, large = (random_batch(sample.model.config, [n] * 3, 0) for n in (5, 20))
    with Session.open(sample.bundle) as session:
        session.run_batch(small, path="sparse")
        allocate = session.backend.empty

        def refuse(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            raise MemoryError

        monkeypatch.setattr(session.backend, "empty", refuse)
        with pytest.raises(MemoryError):
            session.run_batch(large, path="sparse")
        monkeypatch.setattr(session.backend, "empty", allocate)
        assert session.run_batch(small, path="sparse").output.shape == (15, 53)


def test_threads_calibrate_once(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = exported("active-lm")
    calls = []
    calibrate = calibration.calibrate

    def counted(*args, **options):
        calls.append(args)
        return calibrate(*args, **options)

    monkeypatch.setattr(calibration, "calibrate", counted)
    with Session.open(sample.bundle) as session:
        threads = [threading.Thread(target=session.cost_model) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(calls) == 1


def test_a_bundle_without_the_single_graph_says_so() -> None:
    with Session.open(GOLDEN) as session:
        ids = [1] * 5
        with pytest.raises(InputError, match="--single-file"):
            session.run(ids, [0, 5], path="single")
        assert session.run(ids, [0, 5]).path in ("sparse", "masked")
