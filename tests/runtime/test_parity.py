"""The runtime computes what the oracle computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.exporters.export import export
from sdt_deploy.model.checkpoints import Checkpoint
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session
from sdt_deploy.testing import OracleBackend, memory_bundle
from tests.samples import (
    CONFIGS,
    TOLERANCE,
    ExportedModel,
    assert_parity,
    cut_points,
    lengths_lists,
    model_configs,
    quantile_thresholds,
    random_batch,
    random_model,
    seeds,
)

Exported = Callable[[str], ExportedModel]


@given(
    data=st.data(),
    drawn=model_configs(selections=("threshold", "capacity"), causal=True),
    lengths=lengths_lists,
    seed=seeds,
)
@settings(max_examples=150, deadline=None)
def test_any_model_on_the_oracle_backend(
    data: st.DataObject,
    drawn: tuple[ModelConfig, ExportConfig],
    lengths: list[int],
    seed: int,
) -> None:
    """Routing, compaction and the loop, over random configurations, without any engine."""
    config, export_config = drawn
    model = random_model(config, seed % 10_000)
    bundle = memory_bundle(model, export_config)
    backend = OracleBackend(bundle, model)
    session = Session(bundle, backend)
    batch = random_batch(config, lengths, seed)
    wanted = data.draw(cut_points(config.n_layers))
    if config.selection == "capacity":
        thresholds = tuple(sorted(wanted))
    else:
        thresholds = quantile_thresholds(model, batch, wanted)
    result = assert_parity(session, model, batch, thresholds)
    expected = [int((result.depths > first).sum()) for first, _ in bundle.manifest.stage_layers]
    assert [call.n_rows for call in backend.calls] == [n for n in expected if n]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", ["sparse", "single", "masked"])
def test_exported_models_on_onnxruntime(exported: Exported, name: str, path: str) -> None:
    sample = exported(name)
    config = sample.model.config

    @given(lengths=lengths_lists, seed=seeds, wanted=cut_points(config.n_layers))
    @settings(max_examples=60, deadline=None)
    def check(lengths: list[int], seed: int, wanted: list[float]) -> None:
        batch = random_batch(config, lengths, seed)
        thresholds = quantile_thresholds(sample.model, batch, wanted)
        assert_parity(session, sample.model, batch, thresholds, path)

    with Session.open(sample.bundle) as session:
        check()


@pytest.mark.parametrize("name", CONFIGS)
def test_extreme_depths(exported: Exported, name: str) -> None:
    sample = exported(name)
    n_layers = sample.model.config.n_layers
    batch = random_batch(sample.model.config, [7, 1, 20, 3], 5)
    with Session.open(sample.bundle) as session:
        full = assert_parity(session, sample.model, batch, (-1.0,) * n_layers)
        assert (full.depths == n_layers).all()
        dense = assert_parity(session, sample.model, batch, path="dense")
        np.testing.assert_allclose(full.output, dense.output, rtol=0, atol=TOLERANCE)
        one = assert_parity(session, sample.model, batch, (-1.0,) + (2.0,) * (n_layers - 1))
        assert (one.depths == 1).all()
        for levels in ((-1.0,) * n_layers, (-1.0,) + (2.0,) * (n_layers - 1), (2.0,) * n_layers):
            assert_parity(session, sample.model, batch, levels, "single")
        none = assert_parity(session, sample.model, batch, (2.0,) * n_layers)
        assert (none.depths == 0).all()
        assert none.timings.stage_ms == ()
        alone = TokenBatch.from_packed(batch.input_ids[:7], [0, 7], config=sample.model.config)
        assert_parity(session, sample.model, alone)


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c[0].probe == "linear"])
def test_one_sequence_finishes_while_another_goes_on(exported: Exported, name: str) -> None:
    sample = exported(name)
    config = sample.model.config
    scores = []
    with Session.open(sample.bundle) as session:
        for token in range(config.vocab_size):
            found = session.run([token] * 5, [0, 5], path="sparse").scores
            assert found is not None
            scores.append(float(found.max()))
        low, high = int(np.argmin(scores)), int(np.argmax(scores))
        batch = TokenBatch.from_packed(
            [high] * 4 + [low] * 5 + [high] * 2, [0, 4, 9, 11], config=config
        )
        result = assert_parity(session, sample.model, batch)
    depths = result.split(result.depths)
    assert depths[1].max() < min(depths[0].max(), depths[2].max())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", ["sparse", "single", "masked"])
def test_neighbours_change_nothing(exported: Exported, name: str, path: str) -> None:
    sample = exported(name)
    config = sample.model.config
    batch = random_batch(config, [9, 28, 1, 14, 3], 11)
    with Session.open(sample.bundle) as session:
        together = session.run_batch(batch, path=path)
        for i, (start, stop) in enumerate(
            zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
        ):
            types = None
            if batch.token_type_ids is not None:
                types = batch.token_type_ids[start:stop]
            alone = session.run(
                batch.input_ids[start:stop], [0, stop - start], token_type_ids=types, path=path
            )
            np.testing.assert_array_equal(alone.depths, together.split(together.depths)[i])
            rows = slice(i, i + 1) if config.head.per_sequence else slice(start, stop)
            np.testing.assert_allclose(alone.output, together.output[rows], rtol=0, atol=1e-5)


def test_threads_share_a_session(exported: Exported) -> None:
    sample = exported("all-embedding")
    batches = [random_batch(sample.model.config, [3 + i, 11, 2 * i + 1], i) for i in range(8)]
    errors: list[BaseException] = []
    with Session.open(sample.bundle) as session:

        def work(batch: TokenBatch) -> None:
            try:
                for _ in range(10):
                    assert_parity(session, sample.model, batch)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


def test_results_belong_to_the_caller(exported: Exported) -> None:
    sample = exported("all-grouped")  # its head is the identity: the riskiest for shared buffers
    batch = random_batch(sample.model.config, [9, 4], 1)
    other = random_batch(sample.model.config, [13], 2)
    with Session.open(sample.bundle) as session:
        result = session.run_batch(batch, path="sparse")
        kept = result.output.copy(), result.depths.copy(), result.cu_seqlens.copy()
        session.run_batch(other, path="sparse")
        batch.cu_seqlens[:] = -1
        for before, after in zip(
            kept, (result.output, result.depths, result.cu_seqlens), strict=True
        ):
            np.testing.assert_array_equal(before, after)
        assert result.output.flags.writeable


@pytest.mark.parametrize(
    "way", [{}, {"routing": "per_layer"}, {"routing": "per_layer", "leaving": "skip"}]
)
def test_a_threshold_of_0_lets_every_token_through(way: dict[str, Any], tmp_path: Path) -> None:
    """Also those whose score is 0 in float32: a sigmoid underflows, ONNX Runtime's below -18."""
    config = CONFIGS["all-embedding"][0].replace(
        thresholds=(0.0, 0.0, 0.5, 0.5)[: CONFIGS["all-embedding"][0].n_layers], **way
    )
    model = random_model(config, 0)
    with torch.no_grad():
        model.scorer.weight.mul_(300)
    batch = random_batch(config, [17, 4, 30], 0)
    types = batch.token_type_ids
    found = oracle_output(model, batch.input_ids, batch.cu_seqlens, token_type_ids=types)
    assert (found.scores < 1e-9).any()
    assert found.active[:, :2].all()
    export(Checkpoint(model=model), tmp_path / "bundle")
    with Session.open(tmp_path / "bundle") as session:
        paths = ["sparse", "masked", *(["single"] if session.backend.has("single") else [])]
        for path in paths:
            result = session.run_batch(batch, path=path)  # type: ignore[arg-type]
            np.testing.assert_array_equal(result.active_layers, found.active)
            np.testing.assert_allclose(result.output, found.output, rtol=0, atol=1e-4)
            given = session.run_batch(batch, path=path, thresholds=[0.0] * config.n_layers)  # type: ignore[arg-type]
            assert given.depths.min() == config.n_layers
